"""The baseline of the memory-bank losses, written as published: a gather for every matrix.

Layer-wise MCL: every ordered pair of nodes of different networks gathers the rows of both networks'
banks for its two inter matrices and again, without the anchor's own entry, for its two intra
matrices. Noise-contrastive estimation: every ordered pair of networks gathers once. Autograd keeps
the gathered rows [B, 1 + P + K, D] of every matrix for the backward pass. Results equal
:func:`mclfast.layerwise_bank_mcl_loss` (each network reads its own bank) and
:func:`mclfast.bank_nce_loss` wherever no exponential over- or underflows.

Source: arXiv 2104.12565, section 3; arXiv 2207.11518, section 3; arXiv 2006.04093, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mclfast.bench.published.in_batch import kl_term
from mclfast.losses.results import MCLTerms

PairFunction = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def similarities(bank: Tensor, keys: Tensor, anchors: Tensor) -> Tensor:
    """Products of anchors [B, D] with the rows of a bank [n, D] at keys [B, J]: [B, J]."""
    rows = torch.index_select(bank, 0, keys.reshape(-1)).view(*keys.shape, bank.shape[1])
    return torch.bmm(rows, anchors.unsqueeze(2)).squeeze(2)


def _contrastive(logits: Tensor, positives: int, weights: Tensor) -> Tensor:
    """Weighted mean of log-softmax over the first columns, negated.

    Args:
        logits: [B, J].
        positives: so many first columns are positives.
        weights: [B, 1].

    Returns:
        0-dim.
    """
    partition = torch.exp(logits).sum(1, keepdim=True)
    log_prob = logits[:, :positives] - torch.log(partition)
    return -((log_prob * weights).sum(1) / positives).mean()


def pair_terms(
    a: Tensor,
    b: Tensor,
    bank_a: Tensor,
    bank_b: Tensor,
    keys: Tensor,
    positives: int,
    weights: Tensor,
    temperature: float,
    kl_temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weighted terms of one ordered pair of nodes, both directions.

    Args:
        a, b: [B, D] unit-norm.
        bank_a, bank_b: [n, D], the banks of their networks.
        keys: [B, 1 + P + K], the anchor's own row first, then positives.
        positives: P, at least 1.
        weights: [B], one weight per anchor.
        temperature, kl_temperature: the temperatures of :func:`mclfast.layerwise_bank_mcl_loss`.

    Returns:
        vcl, soft_vcl, icl, soft_icl; 0-dim.
    """
    w = weights.unsqueeze(1)
    others = keys[:, 1:]
    aa, bb, ab, ba = (
        torch.div(similarities(bank, columns, anchors), temperature)
        for bank, columns, anchors in (
            (bank_a, others, a),
            (bank_b, others, b),
            (bank_a, keys, b),
            (bank_b, keys, a),
        )
    )
    vcl, icl = (
        _contrastive(x, count, w) + _contrastive(y, count, w)
        for x, y, count in ((aa, bb, positives), (ab, ba, 1 + positives))
    )
    soft_vcl, soft_icl = (
        kl_term(x, y, w, kl_temperature) + kl_term(y, x, w, kl_temperature)
        for x, y in ((aa, bb), (ab, ba))
    )
    return vcl, soft_vcl, icl, soft_icl


def layerwise_bank_mcl_loss(
    nodes: Tensor,
    networks: Sequence[int],
    banks: Tensor,
    keys: Tensor,
    positives: int,
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
        banks: [M, n, D].
        keys: [B, 1 + P + K].
        positives: P.
        pair_weights: [N, N, B].
        temperature, kl_temperature: the temperatures of :func:`mclfast.layerwise_bank_mcl_loss`.
        pair: the function of one pair: :func:`pair_terms`, or that function compiled.
    """
    embeddings, stored = nodes.unbind(0), banks.unbind(0)
    total = [nodes.new_zeros(()) for _ in range(4)]
    for i, (a, m) in enumerate(zip(embeddings, networks, strict=True)):
        for j, (b, o) in enumerate(zip(embeddings, networks, strict=True)):
            if m != o:
                terms = pair(
                    a,
                    b,
                    stored[m],
                    stored[o],
                    keys,
                    positives,
                    pair_weights[i, j],
                    temperature,
                    kl_temperature,
                )
                total = [sum_ + term for sum_, term in zip(total, terms, strict=True)]
    return MCLTerms(*total)


def nce_term(bank: Tensor, keys: Tensor, anchors: Tensor, temperature: float, eps: float) -> Tensor:
    """Noise-contrastive estimation of one network's anchors against one bank.

    Args:
        bank: [n, D].
        keys: [B, 1 + K], the anchor's own row first.
        anchors: [B, D].
        temperature, eps: the arguments of :func:`mclfast.bank_nce_loss`.

    Returns:
        0-dim.
    """
    noise = (keys.shape[1] - 1) / bank.shape[0]
    scores = torch.exp(torch.div(similarities(bank, keys, anchors), temperature))
    p = scores / (scores.detach().mean() * bank.shape[0])
    from_data = torch.log(p[:, 0] / (p[:, 0] + noise + eps)).sum()
    from_noise = torch.log(noise / (p[:, 1:] + noise + eps)).sum()
    return -(from_data + from_noise) / len(keys)


def bank_nce_loss(
    nodes: Tensor,
    banks: Tensor,
    keys: Tensor,
    *,
    temperature: float,
    eps: float,
    term: Callable[..., Tensor] = nce_term,
) -> Tensor:
    """The loop over all ordered pairs of networks.

    Args:
        nodes: [M, B, D] unit-norm.
        banks: [M, n, D].
        keys: [B, 1 + K].
        temperature, eps: the arguments of :func:`mclfast.bank_nce_loss`.
        term: the function of one pair: :func:`nce_term`, or that function compiled.
    """
    total = nodes.new_zeros(())
    for i, bank in enumerate(banks.unbind(0)):
        for j, anchors in enumerate(nodes.unbind(0)):
            if i != j:
                total = total + term(bank, keys, anchors, temperature, eps)
    return total
