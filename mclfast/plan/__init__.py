"""How much memory a run needs under each choice of memory mode, and which choice fits.

A rehearsal runs the true training step on tensors that have a shape and no values
(:mod:`mclfast.plan.rehearsal`), so that nothing is computed and nothing large is allocated.
"""

from mclfast.plan.choose import Chosen
from mclfast.plan.estimate import Choice, Estimate
from mclfast.plan.planner import Plan, choices, make_plan

__all__ = ["Choice", "Chosen", "Estimate", "Plan", "choices", "make_plan"]
