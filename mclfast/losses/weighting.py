"""From rows to terms: the weights of anchors and pairs of nodes, and the sums over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mclfast._base.tensors import statistics_dtype
from mclfast.losses.results import BankMCLRows, MCLRows, MCLTerms, Weight
from mclfast.ops import in_batch as ops


def equal_row_weights(stages: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Row weights that make every term a batch mean, summed over networks and ordered pairs.

    Args:
        stages: number of nodes of each network.
        like: [N, B, ...], gives the batch size, dtype and device.

    Returns:
        For vcl [N, B]; for the families of pairs [N, N, B], zero inside a network.
    """
    batch = like.shape[1]
    between = between_networks(stages, like).to(statistics_dtype(like))
    pairs = (between / batch)[..., None].expand(-1, -1, batch)
    return pairs.new_full(like.shape[:2], 1.0 / batch), pairs


def mcl_terms(rows: MCLRows) -> MCLTerms:
    """MCL: every term is the batch mean of its rows, summed over networks and ordered pairs."""
    return MCLTerms(*(term.mean(-1).sum() for term in rows[:4]))


def node_networks(stages: Sequence[int], device: torch.device) -> Tensor:
    """The network of each node, int64 [N], filled in on the device: a copy would wait for it."""
    return torch.cat([torch.full((count,), m, device=device) for m, count in enumerate(stages)])


def between_networks(stages: Sequence[int], like: Tensor) -> Tensor:
    """[N, N] bool, whether the two nodes belong to different networks."""
    index = node_networks(stages, like.device)
    return index[:, None] != index[None, :]


def both_directions(pair_weights: Tensor | None, stages: Sequence[int], like: Tensor) -> Tensor:
    """w_ab + w_ba [N, N, B], zero inside a network; ``like`` [N, B, ...] gives size and dtype."""
    if pair_weights is None:
        one = like.new_ones((), dtype=statistics_dtype(like))
        pair_weights = one.expand(like.shape[0], *like.shape[:2])
    weights = pair_weights.to(statistics_dtype(like))
    between = between_networks(stages, like)[..., None]
    return torch.where(between, weights + weights.transpose(0, 1), 0.0)


def layerwise_mcl_terms(
    rows: MCLRows, stages: Sequence[int], pair_weights: Tensor | None
) -> MCLTerms:
    """Layer-wise MCL: rows weighted by w_ab + w_ba, summed over ordered pairs, divided by B.

    The published loop visits every ordered pair and adds both directions each time, so a direction
    [a, b] is counted with w_ab and again with w_ba (arXiv 2207.11518, section 3.3). A node's own
    row (vcl) gets the weights of all the pairs it takes part in.

    Args:
        pair_weights: [N, N, B], or None for ones; entries inside one network are not used.
    """
    both = both_directions(pair_weights, stages, rows.vcl)
    batch = rows.vcl.shape[-1]
    return MCLTerms(
        vcl=(both.sum(1) * rows.vcl).sum() / batch,
        soft_vcl=(both * rows.soft_vcl).sum() / batch,
        icl=(both * rows.icl).sum() / batch,
        soft_icl=(both * rows.soft_icl).sum() / batch,
    )


def bank_mcl_terms(rows: BankMCLRows) -> MCLTerms:
    """MCL: every term is the batch mean of its rows, summed over networks and ordered pairs."""
    return MCLTerms(*(term.mean(-1).sum() for term in rows))


def bank_row_weights(
    pair_weights: Tensor | None, stages: Sequence[int], like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the rows in the layer-wise terms, for pair weights w [N, N, B] or None for ones.

    Every ordered pair of nodes adds the rows of both its directions with its weight, so with
    u = w + w^T (zero inside a network): ``vcl[a]`` gets the sum of ``u[a]``, the soft terms [a, b]
    get ``u[a, b]`` and ``icl[m, e]`` gets the sum of ``u[f, e]`` over the nodes f of network m.

    Args:
        like: [N, B, ...], gives the batch size, dtype and device.

    Returns:
        For vcl [N, B], for the soft terms [N, N, B], for icl [M, N, B].
    """
    both = both_directions(pair_weights, stages, like)
    index = node_networks(stages, both.device)
    per_bank = both.new_zeros(len(stages), *both.shape[1:]).index_add(0, index, both)
    return both.sum(1), both, per_bank


def layerwise_bank_mcl_terms(
    rows: BankMCLRows, stages: Sequence[int], pair_weights: Tensor | None
) -> MCLTerms:
    """Layer-wise MCL: rows weighted by :func:`bank_row_weights`, added up, divided by B."""
    lone, pairs, per_bank = bank_row_weights(pair_weights, stages, rows.vcl)
    batch = rows.vcl.shape[-1]
    return MCLTerms(
        vcl=(lone * rows.vcl).sum() / batch,
        soft_vcl=(pairs * rows.soft_vcl).sum() / batch,
        icl=(per_bank * rows.icl).sum() / batch,
        soft_icl=(pairs * rows.soft_icl).sum() / batch,
    )


def weighted_terms(row_weights: Sequence[Tensor], rows: Sequence[Tensor]) -> MCLTerms:
    """The four terms, each the sum of the weights of a family of rows times the rows."""
    return MCLTerms(*(ops.weighted_sum(w, r) for w, r in zip(row_weights, rows, strict=True)))


def detached(terms: MCLTerms) -> MCLTerms:
    """The same values, without gradient."""
    return MCLTerms(*(term.detach() for term in terms))


def scaled(row_weights: Sequence[Tensor], weights: Sequence[Weight]) -> list[Tensor]:
    """The row weights of each family times the weight of its term."""
    return [_scaled(w, c) for c, w in zip(weights, row_weights, strict=True)]


def _scaled(row_weights: Tensor, weight: Weight) -> Tensor:
    # The value of a tensor is not looked at: that would wait for its device.
    if not isinstance(weight, Tensor):
        return row_weights if weight == 1 else weight * row_weights
    return weight.to(row_weights) * row_weights
