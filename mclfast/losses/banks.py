"""The memory-bank losses as functions: validate, choose a backend, call it.

For data sets whose batches hold too few samples of a class to contrast: each anchor is compared
with stored embeddings, a few positives and thousands of negatives, gathered once and never kept.
Embeddings, dtypes and derivatives are as in :mod:`mclfast.losses.in_batch`; banks get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mclfast._base.checks import (
    check_banks,
    check_embeddings,
    check_indices,
    check_pair_weights,
    check_range,
    check_weights,
    describe,
    stack_nodes,
    wants_gradient,
)
from mclfast._base.tensors import statistics_dtype
from mclfast._base.transforms import without_autocast
from mclfast.kernels.families import ALL
from mclfast.losses import reference_banks, weighting
from mclfast.losses.in_batch import Networks, Nodes
from mclfast.losses.inputs import absorbed, choose, prepared
from mclfast.losses.results import (
    PUBLISHED_WEIGHTS,
    BankMCLRows,
    MCLObjective,
    MCLTerms,
    Temperature,
    Weights,
)
from mclfast.losses.weighting import detached, scaled, weighted_terms
from mclfast.ops import banks as bank_ops
from mclfast.ops.derivatives import objective, values
from mclfast.ops.in_batch import networks_of


@dataclass(frozen=True)
class _Checked:
    """The arguments that all losses share, after their checks.

    Attributes:
        nodes: [N, B, D].
        stages: number of nodes of each network.
        keys: banks, pos_idx and neg_idx.
        temperature, kl_temperature, backend: as chosen.
    """

    nodes: Tensor
    stages: tuple[int, ...]
    keys: tuple[Tensor, Tensor, Tensor]
    temperature: Temperature
    kl_temperature: Temperature
    backend: str


def _checked(
    embeddings: Any,
    banks: Any,
    pos_idx: Any,
    neg_idx: Any,
    temperature: Temperature,
    kl_temperature: Temperature,
    normalize: bool,
    backend: str,
    *,
    with_stages: bool,
) -> _Checked:
    nodes, stages = stack_nodes(embeddings, stages=with_stages)
    check_banks(banks, nodes, len(stages))
    batch = nodes.shape[1]
    check_indices("pos_idx", pos_idx, [batch, "1 + P"], nodes.device)
    # One set of negatives for the batch is a view: it is not copied for every anchor.
    if isinstance(neg_idx, Tensor) and neg_idx.dim() == 1:
        check_indices("neg_idx", neg_idx, ["K"], nodes.device)
        neg_idx = neg_idx.contiguous().expand(batch, -1)
    else:
        check_indices("neg_idx", neg_idx, [batch, "K"], nodes.device)
    nodes = prepared("embeddings", nodes, normalize)
    settings = choose(backend, temperature, kl_temperature, nodes, banks, banks=True)
    backend, temperature, kl_temperature = settings
    if backend == "reference":
        check_range("pos_idx", pos_idx, banks.shape[1])
        check_range("neg_idx", neg_idx, banks.shape[1])
    keys = banks, _with_plain_rows(pos_idx), _with_plain_rows(neg_idx)
    return _Checked(nodes, stages, keys, temperature, kl_temperature, backend)


def _with_plain_rows(index: Tensor) -> Tensor:
    """Rows of adjacent numbers, as the backends read them; any stride between rows stays."""
    return index if index.stride(-1) == 1 else index.contiguous()


def _rows(checked: _Checked) -> BankMCLRows:
    if checked.backend == "reference":
        return reference_banks.bank_mcl_rows(
            checked.nodes,
            networks_of(checked.stages),
            *checked.keys,
            temperature=checked.temperature,
            kl_temperature=checked.kl_temperature,
        )
    nodes, temperature = absorbed(checked.nodes, checked.temperature, 1)
    settings = [*checked.stages], temperature, checked.kl_temperature, ALL, checked.backend
    return BankMCLRows(*values(bank_ops.BANK_ROWS, (nodes, *checked.keys), settings)[:4])


def bank_mcl_rows(
    embeddings: Nodes,
    banks: Tensor,
    pos_idx: Tensor,
    neg_idx: Tensor,
    *,
    temperature: Temperature = 0.1,
    kl_temperature: Temperature = 3.0,
    normalize: bool = False,
    backend: str = "auto",
) -> BankMCLRows:
    """Per-anchor rows of the four mutual contrastive terms against memory banks.

    With ``keys = cat([pos_idx, neg_idx], 1)``, ``na`` the network of node a and
    ``z[m, e][r] = banks[m][keys[r]] @ E_e[r] / temperature``:

    * ``vcl[a] = logsumexp(z[na, a][:, 1:]) - z[na, a][:, 1 : 1 + P].mean()``, 0 for P = 0
    * ``icl[m, e] = logsumexp(z[m, e]) - z[m, e][:, : 1 + P].mean()``, m not the network of e
    * ``soft_vcl[a, b] = T**2 * kl(softmax(z[nb, b][:, 1:] / T) || softmax(z[na, a][:, 1:] / T))``
    * ``soft_icl[a, b] = T**2 * kl(softmax(z[nb, a] / T) || softmax(z[na, b] / T))``

    where the first distribution of a kl is a constant and T is the ``kl_temperature``.

    Args:
        embeddings: [M, L, B, D] unit-norm, or a sequence (networks) of sequences (stages) of
            [B, D]. N nodes, network-major.
        banks: [M, n, D], one bank for each network, contiguous; float32 or bfloat16 (float16 and
            float64 too), on the device of the embeddings or in pinned host memory.
        pos_idx: [B, 1 + P] int64, first the anchor's own number in the data set, then positives.
        neg_idx: [B, K] int64, or [K]: one set of negatives for the whole batch.
        temperature: divides the cosine similarities: a number in [1e-6, 1e6], or a 0-dim tensor,
            which may ask for a gradient; the published runs take 0.07.
        kl_temperature: softens the distributions the soft terms compare: a number in [1e-6, 1e6],
            or a 0-dim tensor. One that asks for a gradient gets it from the plain form.
        normalize: whether to divide every embedding by its norm first.
        backend: "auto" or a name that ``mclfast env`` lists.

    Returns:
        BankMCLRows(vcl [N, B], soft_vcl [N, N, B], icl [M, N, B], soft_icl [N, N, B]).

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        RuntimeError: the backend asked for is not available here; an index out of range (on a CPU;
            on a GPU indices are not checked).

    Examples:
        >>> import torch
        >>> from mclfast import ContrastSampler, MemoryBank, bank_mcl_rows, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> bank = MemoryBank(num_networks=2, num_samples=40, dim=16)
        >>> sampler = ContrastSampler(torch.arange(40) % 4, num_negatives=8)
        >>> embeddings = unit_norm(torch.randn(2, 1, 6, 16))
        >>> rows = bank_mcl_rows(embeddings, bank.banks, *sampler.sample(torch.arange(6), step=0))
        >>> list(rows.vcl.shape), list(rows.soft_icl.shape)
        ([2, 6], [2, 2, 6])

    Source: MCL, arXiv 2104.12565, section 3 (memory bank for ImageNet); layer-wise, arXiv
    2207.11518, section 3.
    """
    arguments = banks, pos_idx, neg_idx, temperature, kl_temperature, normalize, backend
    checked = _checked(embeddings, *arguments, with_stages=True)
    with without_autocast(checked.nodes):
        return _rows(checked)


def bank_mcl_terms(
    embeddings: Networks,
    banks: Tensor,
    pos_idx: Tensor,
    neg_idx: Tensor,
    *,
    temperature: Temperature = 0.1,
    kl_temperature: Temperature = 3.0,
    normalize: bool = False,
    backend: str = "auto",
) -> MCLTerms:
    """The four terms of mutual contrastive learning of M networks against their memory banks.

    Equals ``rows.mean(-1).sum()`` of each family of :func:`bank_mcl_rows` with one stage per
    network: sums over networks (vcl) and ordered pairs (the others), means over the batch. Terms
    can be combined in any way; for a weighted sum, :func:`bank_mcl_loss` is faster.

    Args:
        embeddings: [M, B, D] unit-norm, or a sequence of M tensors [B, D].
        banks, pos_idx, neg_idx, temperature, kl_temperature, normalize, backend: arguments of
            :func:`bank_mcl_rows`.

    Returns:
        MCLTerms(vcl, soft_vcl, icl, soft_icl), 0-dim each, differentiable to second order.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`bank_mcl_rows`.

    Examples:
        >>> import torch
        >>> from mclfast import ContrastSampler, MemoryBank, bank_mcl_terms, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> labels = torch.arange(40) % 4
        >>> bank = MemoryBank(num_networks=2, num_samples=40, dim=16)
        >>> indices = ContrastSampler(labels, num_negatives=8).sample(torch.arange(6), step=0)
        >>> embeddings = unit_norm(torch.randn(2, 6, 16))
        >>> bank_mcl_terms(embeddings, bank.banks, *indices).icl.shape
        torch.Size([])

    Source: arXiv 2104.12565, equations 4 to 9.
    """
    arguments = banks, pos_idx, neg_idx, temperature, kl_temperature, normalize, backend
    checked = _checked(embeddings, *arguments, with_stages=False)
    with without_autocast(checked.nodes):
        return weighting.bank_mcl_terms(_rows(checked))


def bank_mcl_loss(
    embeddings: Networks,
    banks: Tensor,
    pos_idx: Tensor,
    neg_idx: Tensor,
    *,
    weights: Weights = PUBLISHED_WEIGHTS,
    temperature: Temperature = 0.1,
    kl_temperature: Temperature = 3.0,
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Mutual contrastive learning against memory banks: the weighted sum of the four terms.

    Args:
        embeddings: [M, B, D] unit-norm, or a sequence of M tensors [B, D].
        banks, pos_idx, neg_idx, temperature, kl_temperature, normalize, backend: arguments of
            :func:`bank_mcl_rows`.
        weights: weights of vcl, soft_vcl, icl and soft_icl: numbers or 0-dim tensors, or one tensor
            [4]. Weights that require a gradient get it; where none does, the loss and its gradient
            are computed in one call, the fastest form.

    Returns:
        The loss, 0-dim, differentiable to second order; banks get no gradient.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`bank_mcl_rows`.

    Examples:
        >>> import torch
        >>> from mclfast import ContrastSampler, MemoryBank, bank_mcl_loss, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> labels = torch.arange(40) % 4
        >>> bank = MemoryBank(num_networks=2, num_samples=40, dim=16)
        >>> indices = ContrastSampler(labels, num_negatives=8).sample(torch.arange(6), step=0)
        >>> features = torch.randn(2, 6, 16, requires_grad=True)
        >>> bank_mcl_loss(unit_norm(features), bank.banks, *indices, temperature=0.07).backward()
        >>> bank.update(torch.arange(6), unit_norm(features).detach())
        >>> features.grad.shape
        torch.Size([2, 6, 16])

    Source: arXiv 2104.12565, equations 4 to 9; published ImageNet weights 0.1, 1, 0.1, 1 at
    temperature 0.07 with 1 positive and 8192 negatives.
    """
    arguments = banks, pos_idx, neg_idx, temperature, kl_temperature, normalize, backend
    return _plain(embeddings, weights, *arguments)[0]


def bank_mcl_objective(
    embeddings: Networks,
    banks: Tensor,
    pos_idx: Tensor,
    neg_idx: Tensor,
    *,
    weights: Weights = PUBLISHED_WEIGHTS,
    temperature: Temperature = 0.1,
    kl_temperature: Temperature = 3.0,
    normalize: bool = False,
    backend: str = "auto",
) -> MCLObjective:
    """:func:`bank_mcl_loss` together with its terms, for a log.

    Args:
        embeddings, banks, pos_idx, neg_idx, weights, temperature, kl_temperature, normalize,
            backend: arguments of :func:`bank_mcl_loss`.

    Returns:
        MCLObjective(loss, terms); the loss is that of :func:`bank_mcl_loss`, the terms give no
        gradient.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`bank_mcl_rows`.

    Examples:
        >>> import torch
        >>> from mclfast import ContrastSampler, MemoryBank, bank_mcl_objective, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> labels = torch.arange(40) % 4
        >>> bank = MemoryBank(num_networks=2, num_samples=40, dim=16)
        >>> indices = ContrastSampler(labels, num_negatives=8).sample(torch.arange(6), step=0)
        >>> embeddings = unit_norm(torch.randn(2, 6, 16))
        >>> loss, terms = bank_mcl_objective(embeddings, bank.banks, *indices)
        >>> torch.allclose(loss, terms.weighted_sum(0.1, 1, 0.1, 1))
        True
    """
    arguments = banks, pos_idx, neg_idx, temperature, kl_temperature, normalize, backend
    loss, terms = _plain(embeddings, weights, *arguments)
    return MCLObjective(loss, terms())


def layerwise_bank_mcl_terms(
    embeddings: Nodes,
    banks: Tensor,
    pos_idx: Tensor,
    neg_idx: Tensor,
    pair_weights: Tensor | None = None,
    *,
    temperature: Temperature = 0.1,
    kl_temperature: Temperature = 3.0,
    normalize: bool = False,
    backend: str = "auto",
) -> MCLTerms:
    """The four terms of layer-wise mutual contrastive learning against memory banks.

    With ``u = pair_weights + pair_weights.transpose(0, 1)``, zero inside one network, and the rows
    of :func:`bank_mcl_rows`: ``vcl = (u.sum(1) * rows.vcl).sum() / B``, the soft terms
    ``(u * rows).sum() / B``, and ``icl`` the sum over banks m and nodes e of ``rows.icl[m, e]``
    times the sum of ``u[f, e]`` over the nodes f of network m (the published scale: sums over
    ordered pairs).

    Args:
        embeddings: [M, L, B, D] unit-norm, or networks of stages of [B, D].
        banks, pos_idx, neg_idx, temperature, kl_temperature, normalize, backend: arguments of
            :func:`bank_mcl_rows`. A bank holds embeddings of its network's last stage; every stage
            is compared with it.
        pair_weights: [N, N, B] weight of each pair of nodes for each sample, as a
            :class:`mclfast.LayerMatcher` gives; None for ones.

    Returns:
        MCLTerms(vcl, soft_vcl, icl, soft_icl), 0-dim each, differentiable to second order, also
        with respect to the pair weights.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`bank_mcl_rows`.

    Examples:
        >>> import torch
        >>> from mclfast import ContrastSampler, MemoryBank, layerwise_bank_mcl_terms, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> labels = torch.arange(40) % 4
        >>> bank = MemoryBank(num_networks=2, num_samples=40, dim=16)
        >>> indices = ContrastSampler(labels, num_negatives=8).sample(torch.arange(6), step=0)
        >>> embeddings = unit_norm(torch.randn(2, 3, 6, 16))          # 2 networks of 3 stages
        >>> weights = torch.rand(6, 6, 6, requires_grad=True)
        >>> layerwise_bank_mcl_terms(embeddings, bank.banks, *indices, weights).icl.backward()
        >>> weights.grad.shape
        torch.Size([6, 6, 6])

    Source: arXiv 2207.11518, section 3.3. The published code reads the bank of the first network of
    a pair for both; here each reads its own.
    """
    arguments = banks, pos_idx, neg_idx, temperature, kl_temperature, normalize, backend
    checked = _checked(embeddings, *arguments, with_stages=True)
    given = check_pair_weights(pair_weights, checked.nodes)
    with without_autocast(checked.nodes):
        return weighting.layerwise_bank_mcl_terms(_rows(checked), checked.stages, given)


def layerwise_bank_mcl_loss(
    embeddings: Nodes,
    banks: Tensor,
    pos_idx: Tensor,
    neg_idx: Tensor,
    pair_weights: Tensor | None = None,
    *,
    weights: Weights = PUBLISHED_WEIGHTS,
    temperature: Temperature = 0.1,
    kl_temperature: Temperature = 3.0,
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Layer-wise mutual contrastive learning against memory banks: the weighted sum of the terms.

    Args:
        embeddings: [M, L, B, D] unit-norm, or networks of stages of [B, D].
        banks, pos_idx, neg_idx, temperature, kl_temperature, normalize, backend: arguments of
            :func:`bank_mcl_rows`.
        pair_weights: [N, N, B] weight of each pair of nodes for each sample; None for ones.
        weights: weights of vcl, soft_vcl, icl and soft_icl, as in :func:`bank_mcl_loss`. Weights of
            terms and of pairs that require a gradient get it; where none does, the loss and its
            gradient are computed in one call, the fastest form.

    Returns:
        The loss, 0-dim, differentiable to second order; banks get no gradient.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`bank_mcl_rows`.

    Examples:
        >>> import torch
        >>> from mclfast import ContrastSampler, MemoryBank, layerwise_bank_mcl_loss, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> labels = torch.arange(40) % 4
        >>> bank = MemoryBank(num_networks=2, num_samples=40, dim=16)
        >>> indices = ContrastSampler(labels, num_negatives=8).sample(torch.arange(6), step=0)
        >>> features = torch.randn(2, 3, 6, 16, requires_grad=True)   # 2 networks of 3 stages
        >>> layerwise_bank_mcl_loss(unit_norm(features), bank.banks, *indices).backward()
        >>> features.grad.shape
        torch.Size([2, 3, 6, 16])

    Source: arXiv 2207.11518, section 3.3; published ImageNet weights 0.01, 1, 0.01, 1.
    """
    arguments = banks, pos_idx, neg_idx, temperature, kl_temperature, normalize, backend
    return _layerwise(embeddings, pair_weights, weights, *arguments)[0]


def layerwise_bank_mcl_objective(
    embeddings: Nodes,
    banks: Tensor,
    pos_idx: Tensor,
    neg_idx: Tensor,
    pair_weights: Tensor | None = None,
    *,
    weights: Weights = PUBLISHED_WEIGHTS,
    temperature: Temperature = 0.1,
    kl_temperature: Temperature = 3.0,
    normalize: bool = False,
    backend: str = "auto",
) -> MCLObjective:
    """:func:`layerwise_bank_mcl_loss` together with its terms, for a log.

    Args:
        embeddings, banks, pos_idx, neg_idx, pair_weights, weights, temperature, kl_temperature,
            normalize, backend: arguments of :func:`layerwise_bank_mcl_loss`.

    Returns:
        MCLObjective(loss, terms); the loss is that of :func:`layerwise_bank_mcl_loss`, the terms
        give no gradient.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`bank_mcl_rows`.

    Examples:
        >>> import torch
        >>> from mclfast import ContrastSampler, MemoryBank, layerwise_bank_mcl_objective, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> labels = torch.arange(40) % 4
        >>> bank = MemoryBank(num_networks=2, num_samples=40, dim=16)
        >>> indices = ContrastSampler(labels, num_negatives=8).sample(torch.arange(6), step=0)
        >>> embeddings = unit_norm(torch.randn(2, 3, 6, 16))
        >>> result = layerwise_bank_mcl_objective(embeddings, bank.banks, *indices)
        >>> torch.allclose(result.loss, result.terms.weighted_sum(0.1, 1, 0.1, 1))
        True
    """
    arguments = banks, pos_idx, neg_idx, temperature, kl_temperature, normalize, backend
    loss, terms = _layerwise(embeddings, pair_weights, weights, *arguments)
    return MCLObjective(loss, terms())


def _plain(
    embeddings: Networks, weights: Weights, *arguments: Any
) -> tuple[Tensor, Callable[[], MCLTerms]]:
    """The loss of one stage per network, and a call that gives its terms."""
    checked = _checked(embeddings, *arguments, with_stages=False)
    with without_autocast(checked.nodes):
        lone, pairs = weighting.equal_row_weights(checked.stages, checked.nodes)
        return _weighted(checked, (lone, pairs, pairs, pairs), None, weights)


def _layerwise(
    embeddings: Nodes, pair_weights: Tensor | None, weights: Weights, *arguments: Any
) -> tuple[Tensor, Callable[[], MCLTerms]]:
    """The loss of all pairs of stages, and a call that gives its terms."""
    checked = _checked(embeddings, *arguments, with_stages=True)
    given = check_pair_weights(pair_weights, checked.nodes)
    with without_autocast(checked.nodes):
        lone, pairs, per_bank = (
            w / checked.nodes.shape[1]
            for w in weighting.bank_row_weights(given, checked.stages, checked.nodes)
        )
        return _weighted(checked, (lone, pairs, per_bank, pairs), given, weights)


def _weighted(
    checked: _Checked,
    row_weights: tuple[Tensor, Tensor, Tensor, Tensor],
    pair_weights: Tensor | None,
    weights: Weights,
) -> tuple[Tensor, Callable[[], MCLTerms]]:
    """The sum of the weighted terms, and a call that gives the terms without gradient.

    Where no weight asks for a gradient, the loss and its gradient come from one call.

    Args:
        checked: arguments that all losses share.
        row_weights: weights of the four families of rows.
        pair_weights: argument of the loss that the row weights come from.
        weights: weights of the four terms.
    """
    term_weights = check_weights(weights)
    if checked.backend == "reference" or wants_gradient(pair_weights, *term_weights):
        terms = weighted_terms(row_weights, _rows(checked))
        return terms.weighted_sum(*term_weights), lambda: detached(terms)
    nodes, temperature = absorbed(checked.nodes, checked.temperature, 1)
    settings = [*checked.stages], temperature, checked.kl_temperature, ALL, checked.backend
    loss, *rows = objective(
        bank_ops.bank_mcl_objective,
        bank_ops.BANK_ROWS,
        settings,
        4,
        (*scaled(row_weights, term_weights), nodes, *checked.keys),
        settings,
    )
    return loss, lambda: weighted_terms(row_weights, rows[:4])


def _checked_nce(
    embeddings: Networks,
    banks: Any,
    contrast_idx: Any,
    temperature: Temperature,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Temperature, str]:
    """Checks; returns (nodes, contrast_idx, temperature, backend)."""
    nodes, stages = stack_nodes(embeddings, stages=False)
    check_banks(banks, nodes, len(stages))
    check_indices("contrast_idx", contrast_idx, [nodes.shape[1], "1 + K"], nodes.device)
    if contrast_idx.shape[1] < 2:
        raise ValueError("contrast_idx: expected at least one negative in each row, got none")
    nodes = prepared("embeddings", nodes, normalize)
    backend, temperature, _ = choose(backend, temperature, 1.0, nodes, banks, banks=True)
    if backend == "reference":
        check_range("contrast_idx", contrast_idx, banks.shape[1])
    return nodes, _with_plain_rows(contrast_idx), temperature, backend


def bank_nce_log_normalizer(
    embeddings: Networks,
    banks: Tensor,
    contrast_idx: Tensor,
    *,
    temperature: Temperature = 0.1,
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The log of the normalising constants that :func:`bank_nce_loss` estimates from a batch.

    Equals ``log(n * exp(banks[i][contrast_idx] @ E_j / temperature).mean())`` for bank i and
    anchors of network j. Contrastive representation distillation keeps those of its first batch.

    Args:
        embeddings, banks, contrast_idx, temperature, normalize, backend: arguments of
            :func:`bank_nce_loss`.

    Returns:
        [M, M], 0 on the diagonal; no gradient.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`bank_nce_loss`.

    Examples:
        >>> import torch
        >>> from mclfast import ContrastSampler, MemoryBank, bank_nce_log_normalizer, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> bank = MemoryBank(num_networks=2, num_samples=40, dim=16)
        >>> sampler = ContrastSampler(torch.arange(40) % 4, num_negatives=8, num_positives=0)
        >>> contrast_idx = torch.cat(sampler.sample(torch.arange(6), step=0), 1)
        >>> embeddings = unit_norm(torch.randn(2, 6, 16))
        >>> bank_nce_log_normalizer(embeddings, bank.banks, contrast_idx).shape
        torch.Size([2, 2])
    """
    arguments = banks, contrast_idx, temperature, normalize, backend
    nodes, contrast_idx, temperature, backend = _checked_nce(embeddings, *arguments)
    with without_autocast(nodes):
        return _log_normalizer(nodes, banks, contrast_idx, temperature, backend)


def _log_normalizer(
    nodes: Tensor, banks: Tensor, contrast_idx: Tensor, temperature: Temperature, backend: str
) -> Tensor:
    if isinstance(temperature, Tensor):
        temperature = temperature.detach()
    if backend == "reference":
        return reference_banks.bank_nce_log_normalizer(
            nodes, banks, contrast_idx, temperature=temperature
        )
    nodes, temperature = absorbed(nodes.detach(), temperature, 1)
    own, noise = contrast_idx[:, :1], contrast_idx[:, 1:]
    lse = bank_ops.bank_nce_lse(nodes, banks, own, noise, temperature, backend)
    # A number made from sizes would be a constant of a compiled graph.
    share = lse.new_full((), banks.shape[1] / contrast_idx.numel(), dtype=torch.float64)
    return (lse.logsumexp(-1) + share.log()).fill_diagonal_(0.0)


def bank_nce_loss(
    embeddings: Networks,
    banks: Tensor,
    contrast_idx: Tensor,
    *,
    temperature: Temperature = 0.1,
    log_normalizer: Tensor | None = None,
    eps: float = 1e-7,
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Noise-contrastive estimation between M networks and the memory banks of the others.

    For each ordered pair of networks i, j with ``s = exp(banks[i][contrast_idx] @ E_j /
    temperature)`` [B, 1 + K], ``p = s / Z`` and ``c = K / n``:

        ``-(log(p[:, 0] / (p[:, 0] + c + eps)) + log(c / (p[:, 1:] + c + eps)).sum(1)).mean()``

    summed over the pairs. Z is a constant: ``n * s.mean()`` of this batch, or what
    ``log_normalizer`` gives.

    With two networks, the second a frozen teacher whose features are projected, this is the loss of
    contrastive representation distillation (``examples/crd_large_bank.py``).

    Args:
        embeddings: [M, B, D] unit-norm, or a sequence of M tensors [B, D].
        banks: [M, n, D], one bank for each network, see :func:`bank_mcl_rows`.
        contrast_idx: [B, 1 + K] int64, first the anchor's own number (or that of another sample of
            its class), then K noise samples of other classes.
        temperature: divides the cosine similarities: a number in [1e-6, 1e6], or a 0-dim tensor,
            which may ask for a gradient.
        log_normalizer: [M, M] log Z for bank i and anchors j, as
            :func:`bank_nce_log_normalizer` gives; None to estimate it from every batch.
        eps: added to the denominators, >= 0; the published constant unless given.
        normalize: whether to divide every embedding by its norm first.
        backend: "auto" or a name that ``mclfast env`` lists.

    Returns:
        0-dim, differentiable to second order.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`bank_mcl_rows`.

    Examples:
        >>> import torch
        >>> from mclfast import ContrastSampler, MemoryBank, bank_nce_loss, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> bank = MemoryBank(num_networks=2, num_samples=40, dim=16)
        >>> sampler = ContrastSampler(torch.arange(40) % 4, num_negatives=8, num_positives=0)
        >>> contrast_idx = torch.cat(sampler.sample(torch.arange(6), step=0), 1)
        >>> features = torch.randn(2, 6, 16, requires_grad=True)
        >>> bank_nce_loss(unit_norm(features), bank.banks, contrast_idx).backward()
        >>> features.grad.shape
        torch.Size([2, 6, 16])

    Source: MCL-OKD, arXiv 2006.04093, section 3.2; CRD, arXiv 1910.10699, equation 19.
    """
    arguments = banks, contrast_idx, temperature, normalize, backend
    nodes, contrast_idx, temperature, backend = _checked_nce(embeddings, *arguments)
    count = nodes.shape[0]
    if not isinstance(eps, (int, float)) or not 0 <= eps < 1:
        raise ValueError(f"eps: expected a number in [0, 1), got {describe(eps)}")
    with without_autocast(nodes):
        if log_normalizer is None:
            log_normalizer = _log_normalizer(nodes, banks, contrast_idx, temperature, backend)
        else:
            check_embeddings("log_normalizer", log_normalizer, [count, count])
        log_normalizer = log_normalizer.detach().to(nodes.device, statistics_dtype(nodes))
        if backend == "reference":
            return reference_banks.bank_nce_loss(
                nodes, banks, contrast_idx, log_normalizer, temperature=temperature, eps=eps
            )
        nodes, temperature = absorbed(nodes, temperature, 1)
        own, noise = contrast_idx[:, :1], contrast_idx[:, 1:]
        settings = temperature, eps, backend
        tensors = nodes, banks, own, noise, log_normalizer
        return objective(bank_ops.bank_nce, bank_ops.BANK_NCE, settings, 0, tensors, settings)[0]
