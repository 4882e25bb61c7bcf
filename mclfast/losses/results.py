"""The values that the losses return: rows per anchor, terms, and a weighted sum of terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

#: A divisor of similarities or logits: a number, or a 0-dim tensor that may ask for a gradient.
Temperature = float | Tensor
#: Weight of a term: a number, or a 0-dim tensor that may ask for a gradient.
Weight = float | Tensor
#: Weights of vcl, soft_vcl, icl and soft_icl, or one tensor [4].
Weights = Sequence[Weight] | Tensor
#: The published weights of vcl, soft_vcl, icl and soft_icl on CIFAR-100.
PUBLISHED_WEIGHTS = (0.1, 1.0, 0.1, 1.0)


class MCLRows(NamedTuple):
    """Per-anchor rows of the four terms for N nodes (node = one stage of one network).

    Rows of node pairs inside one network are zero: pairs exist between networks only.

    Attributes:
        vcl: [N, R], supervised contrastive row of each node with itself.
        soft_vcl: [N, N, R], entry [a, b]: KL from b's (teacher) intra similarities to a's.
        icl: [N, N, R], entry [a, b]: supervised contrastive row with anchors of a, contrast of b.
        soft_icl: [N, N, R], entry [a, b]: KL from the similarities b -> a (teacher) to a -> b.
        valid: [R] bool, whether the anchor has a positive. Rows of ``vcl`` and ``icl`` are zero
            where it has none; sum over rows / ``valid.sum()`` renormalises.
    """

    vcl: Tensor
    soft_vcl: Tensor
    icl: Tensor
    soft_icl: Tensor
    valid: Tensor


class BankMCLRows(NamedTuple):
    """Per-anchor rows of the four terms against M memory banks, for N nodes.

    Attributes:
        vcl: [N, B], contrastive row of each node against its own network's bank, without the
            anchor's own entry.
        soft_vcl: [N, N, B], entry [a, b]: KL from b's (teacher) distribution over its own bank to
            a's over its own; zero inside a network.
        icl: [M, N, B], entry [m, e]: contrastive row of node e against the bank of network m, the
            anchor's own entry a positive; zero where e belongs to network m.
        soft_icl: [N, N, B], entry [a, b]: KL from the distribution of a over b's bank (teacher) to
            that of b over a's bank; zero inside a network.
    """

    vcl: Tensor
    soft_vcl: Tensor
    icl: Tensor
    soft_icl: Tensor


class MCLTerms(NamedTuple):
    """The four scalar terms of mutual contrastive learning, each 0-dim.

    Attributes:
        vcl: vanilla contrastive learning, inside each network.
        soft_vcl: KL between the intra-network similarity distributions of peers.
        icl: interactive contrastive learning, anchors of one network against a peer.
        soft_icl: KL between the two inter-network similarity distributions of a pair.
    """

    vcl: Tensor
    soft_vcl: Tensor
    icl: Tensor
    soft_icl: Tensor

    def weighted_sum(self, vcl: Weight, soft_vcl: Weight, icl: Weight, soft_icl: Weight) -> Tensor:
        """The terms, each times its weight, added up; 0-dim, in the dtype of the terms."""
        pairs = zip((vcl, soft_vcl, icl, soft_icl), self, strict=True)
        first, *rest = (w.to(t) * t if isinstance(w, Tensor) else w * t for w, t in pairs)
        return sum(rest, start=first)


class MCLObjective(NamedTuple):
    """A weighted sum of the four terms, computed together with its gradient.

    Attributes:
        loss: 0-dim, differentiable to second order.
        terms: the four terms unweighted, for logging; they give no gradient.
    """

    loss: Tensor
    terms: MCLTerms
