"""The baseline: layer-wise MCL written as published, pair by pair.

Every ordered pair of nodes of different networks computes its own four similarity matrices and
masks, takes logarithms of masked sums of exponentials without a shift, and adds the terms of both
directions with the weight of that ordered pair. Nothing is shared between pairs, and autograd keeps
what each step needs. Results equal :func:`mclfast.layerwise_mcl_loss` wherever no exponential
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
        logits: [B, B].
        positives, others: [B, B] float masks, the latter without the diagonal.
        weights: [B, 1].

    Returns:
        0-dim.
    """
    partition = (torch.exp(logits) * others).sum(1, keepdim=True)
    log_prob = logits - torch.log(partition)
    # The published code divides by the count itself: NaN for an anchor without a positive.
    return -((positives * log_prob * weights).sum(1) / positives.sum(1).clamp_min(1)).mean()


def kl_term(student: Tensor, teacher: Tensor, weights: Tensor, kl_temperature: float) -> Tensor:
    """Batch mean of weighted rows of T^2 KL(softmax(teacher / T) || softmax(student / T))."""
    log_student = F.log_softmax(student / kl_temperature, dim=1)
    log_teacher = F.log_softmax(teacher.detach() / kl_temperature, dim=1)
    prob_teacher = F.softmax(teacher.detach() / kl_temperature, dim=1)
    weighted = weights * prob_teacher * (log_teacher - log_student)
    return kl_temperature**2 * weighted.sum() / weights.shape[0]


def pair_terms(
    a: Tensor, b: Tensor, labels: Tensor, weights: Tensor, temperature: float, kl_temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weighted terms of one ordered pair of nodes, both directions.

    Args:
        a, b: [B, D] unit-norm.
        labels: [B].
        weights: [B], one weight per anchor.
        temperature, kl_temperature: the temperatures of :func:`mclfast.layerwise_mcl_loss`.

    Returns:
        vcl, soft_vcl, icl, soft_icl; 0-dim.
    """
    same = torch.eq(labels.view(-1, 1), labels.view(1, -1)).to(a.dtype)
    others = 1.0 - torch.eye(labels.shape[0], dtype=a.dtype, device=a.device)
    positives = same * others
    # Like the published code, which multiplies matrices by the weight and sums afterwards.
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
    """The loop over all ordered pairs.

    Args:
        nodes: [N, B, D] unit-norm.
        networks: the network of each node.
        labels: [B].
        pair_weights: [N, N, B].
        temperature, kl_temperature: the temperatures of :func:`mclfast.layerwise_mcl_loss`.
        pair: the function of one pair: :func:`pair_terms`, or that function compiled. (The loop
            itself is not compiled: that would unroll every pair into one graph.)
    """
    embeddings = nodes.unbind(0)
    total = [nodes.new_zeros(()) for _ in range(4)]
    for i, a in enumerate(embeddings):
        for j, b in enumerate(embeddings):
            if networks[i] != networks[j]:
                terms = pair(a, b, labels, pair_weights[i, j], temperature, kl_temperature)
                total = [sum_ + term for sum_, term in zip(total, terms, strict=True)]
    return MCLTerms(*total)
