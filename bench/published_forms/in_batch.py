"""The baseline of the in-batch losses: layer-wise MCL written as published, pair by pair.

Every ordered pair of nodes of different networks computes its own four similarity matrices and
masks, takes logarithms of masked sums of exponentials without a shift, and adds the terms of both
directions with the weight of that ordered pair. Pairs share nothing, and autograd keeps all
intermediate results. Results equal :func:`mclfast.layerwise_mcl_loss` wherever no exponential
overflows; an anchor without a positive contributes 0 to ``vcl`` and ``icl``, as there.

Source: arXiv 2104.12565, equations 4 to 9, and arXiv 2207.11518, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mclfast.losses.results import MCLTerms

PairFunction = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def _contrastive(logits: Tensor, positives: Tensor, others: Tensor, weights: Tensor) -> Tensor:
    """Weighted supervised contrastive term of one similarity matrix.

    Args:
        logits: similarities [B, B] divided by the temperature.
        positives: float mask [B, B] of positives.
        others: float mask [B, B] of everything except the diagonal.
        weights: weight of each anchor, [B, 1].

    Returns:
        The term, 0-dim.
    """
    partition = (torch.exp(logits) * others).sum(1, keepdim=True)
    log_prob = logits - torch.log(partition)
    # Clamped here: in the published code, an anchor without a positive gives NaN.
    return -((positives * log_prob * weights).sum(1) / positives.sum(1).clamp_min(1)).mean()


def kl_term(student: Tensor, teacher: Tensor, weights: Tensor, kl_temperature: float) -> Tensor:
    """Weighted mean over the batch of T^2 KL(softmax(teacher / T) || softmax(student / T))."""
    log_student = F.log_softmax(student / kl_temperature, dim=1)
    log_teacher = F.log_softmax(teacher.detach() / kl_temperature, dim=1)
    prob_teacher = F.softmax(teacher.detach() / kl_temperature, dim=1)
    weighted = weights * prob_teacher * (log_teacher - log_student)
    return kl_temperature**2 * weighted.sum() / weights.shape[0]


def pair_terms(
    a: Tensor, b: Tensor, labels: Tensor, weights: Tensor, temperature: float, kl_temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weighted terms of one ordered pair of nodes, summed over both directions.

    Args:
        a: unit-norm embeddings [B, D] of the first node.
        b: unit-norm embeddings [B, D] of the second node.
        labels: class of each anchor, [B].
        weights: weight of each anchor, [B].
        temperature: temperature of the contrastive terms.
        kl_temperature: temperature of the soft terms.

    Returns:
        vcl, soft_vcl, icl, soft_icl; each 0-dim.
    """
    same = torch.eq(labels.view(-1, 1), labels.view(1, -1)).to(a.dtype)
    others = 1.0 - torch.eye(labels.shape[0], dtype=a.dtype, device=a.device)
    positives = same * others
    # As in the published code, matrices are multiplied by the weights and summed afterwards.
    w = weights.unsqueeze(1)
    aa, bb, ab, ba = (
        torch.div(torch.mm(x, y.T), temperature) for x, y in ((a, a), (b, b), (a, b), (b, a))
    )
    vcl, icl = (
        _contrastive(x, positives, others, w) + _contrastive(y, positives, others, w)
        for x, y in ((aa, bb), (ab, ba))
    )
    soft_vcl, soft_icl = (
        kl_term(x, y, w, kl_temperature) + kl_term(y, x, w, kl_temperature)
        for x, y in ((aa, bb), (ab, ba))
    )
    return vcl, soft_vcl, icl, soft_icl


def layerwise_mcl_loss(
    nodes: Tensor,
    networks: Sequence[int],
    labels: Tensor,
    pair_weights: Tensor,
    *,
    temperature: float,
    kl_temperature: float,
    pair: PairFunction = pair_terms,
) -> MCLTerms:
    """Adds up the terms of all ordered pairs of nodes of different networks.

    Args:
        nodes: unit-norm embeddings [N, B, D].
        networks: index of the network of each node.
        labels: class of each anchor, [B].
        pair_weights: weight of each ordered pair and anchor, [N, N, B].
        temperature: temperature of the contrastive terms.
        kl_temperature: temperature of the soft terms.
        pair: function of one pair: :func:`pair_terms`, or that function compiled. The loop itself
            is not compiled, as that would unroll all pairs into one graph.
    """
    embeddings = nodes.unbind(0)
    total = [nodes.new_zeros(()) for _ in range(4)]
    for i, a in enumerate(embeddings):
        for j, b in enumerate(embeddings):
            if networks[i] != networks[j]:
                terms = pair(a, b, labels, pair_weights[i, j], temperature, kl_temperature)
                total = [sum_ + term for sum_, term in zip(total, terms, strict=True)]
    return MCLTerms(*total)
