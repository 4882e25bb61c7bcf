"""The peers of a run: networks with their heads, what they share, what they put out."""

from mclfast.cohort.cohort import Cohort
from mclfast.cohort.outputs import Batch, PeerOutputs, Setup

__all__ = ["Batch", "Cohort", "PeerOutputs", "Setup"]
