"""Baseline: every network learns from the labels alone."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from mclfast._base.tensors import wide
from mclfast.cohort.outputs import Batch, PeerOutputs
from mclfast.methods.base import Method

# PyTorch's own default, -100, would leave wrong labels of that number out without a word.
_NO_LABEL = -(2**63)


class Baseline(Method):
    """Sum over networks of the cross entropy of their logits; the peers do not interact."""

    uses_maps = False

    @property
    def repeatable(self) -> bool:
        return True

    def loss(self, outputs: PeerOutputs, batch: Batch) -> dict[str, Tensor]:
        total = sum_cross_entropy(outputs, batch.labels)
        return {"loss": total, "ce": total}


def sum_cross_entropy(outputs: PeerOutputs, labels: Tensor) -> Tensor:
    """Cross entropy of every classifier, summed over networks and stages, 0-dim."""
    heads = [logits for stages in outputs.logits for logits in stages]
    first, *rest = (cross_entropy(wide(logits), labels, ignore_index=_NO_LABEL) for logits in heads)
    return sum(rest, start=first)
