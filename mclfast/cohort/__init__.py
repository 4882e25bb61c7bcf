"""The peers of a run: their networks and heads, the parts they share, and their outputs."""

from mclfast.cohort.cohort import Cohort
from mclfast.cohort.outputs import Batch, PeerOutputs, Setup

__all__ = ["Batch", "Cohort", "PeerOutputs", "Setup"]
