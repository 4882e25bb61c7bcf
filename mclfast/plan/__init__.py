"""How much memory a run needs under each choice of memory mode, and which choice fits.

A rehearsal runs the true training step on tensors that have a shape and no values
(:mod:`mclfast.plan.rehearsal`), so that nothing is computed and nothing large is allocated.
"""

from mclfast._base.sizes import format_bytes, parse_bytes

__all__ = ["format_bytes", "parse_bytes"]
