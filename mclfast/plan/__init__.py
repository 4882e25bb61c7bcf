"""How much memory a run needs under each choice of memory mode, and which choice fits.

A rehearsal runs the true training step on tensors that have a shape and no values
(:mod:`mclfast.plan.rehearsal`), so that nothing is computed and nothing large is allocated.
"""

from mclfast.plan.chooser import Chosen, choose
from mclfast.plan.estimate import Choice, Estimate
from mclfast.plan.planner import Plan, choices, make_plan
from mclfast.plan.sizes_of_data import DataFacts, facts, facts_of

__all__ = [
    "Choice",
    "Chosen",
    "DataFacts",
    "Estimate",
    "Plan",
    "choices",
    "choose",
    "facts",
    "facts_of",
    "make_plan",
]
