"""The losses as functions: validate, choose a backend, call it.

Embeddings are expected to have unit norm; nothing here normalises them. Statistics are computed in
float32 or wider and results come in that dtype (float32, or float64 for float64 inputs), under
autocast too. Every function is differentiable to second order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mclfast._base.checks import (
    check_embeddings,
    check_labels,
    check_pair_weights,
    check_rows,
    check_same,
    check_weights,
    stack_nodes,
    wants_gradient,
)
from mclfast._base.tensors import statistics_dtype, wide
from mclfast._base.transforms import without_autocast
from mclfast.kernels.families import ALL, SOFT_VCL, VCL
from mclfast.losses import reference, weighting
from mclfast.losses.inputs import absorbed, choose, prepared
from mclfast.losses.results import (
    PUBLISHED_WEIGHTS,
    MCLObjective,
    MCLRows,
    MCLTerms,
    Temperature,
    Weights,
)
from mclfast.losses.weighting import detached, scaled, weighted_terms
from mclfast.ops import in_batch as ops
from mclfast.ops.derivatives import objective, values

Nodes = Tensor | Sequence[Sequence[Tensor]]

Networks = Tensor | Sequence[Tensor]


def _ready(
    embeddings: Any, labels: Tensor, normalize: bool, *, with_stages: bool
) -> tuple[Tensor, tuple[int, ...], Tensor]:
    """Checks what all losses share; returns nodes [N, B, D], their number by network, labels."""
    nodes, stages = stack_nodes(embeddings, stages=with_stages)
    labels = check_labels(labels, nodes.shape[1], nodes.device)
    return prepared("embeddings", nodes, normalize), stages, labels


def _settings(
    nodes: Tensor, temperature: Temperature, kl_temperature: Temperature, backend: str
) -> tuple[Temperature, Temperature, str]:
    """Both temperatures, checked, and the name of the backend."""
    backend, temperature, kl_temperature = choose(backend, temperature, kl_temperature, nodes)
    return temperature, kl_temperature, backend


def _rows(
    nodes: Tensor,
    stages: tuple[int, ...],
    labels: Tensor,
    temperature: Temperature,
    kl_temperature: Temperature,
    backend: str,
    row_start: int = 0,
    row_count: int | None = None,
) -> MCLRows:
    """Rows of nodes that are checked, as all the arguments are but the slice of anchors."""
    row_start, row_count = check_rows(row_start, row_count, nodes.shape[1])
    if backend == "reference":
        return reference.mcl_rows(
            nodes,
            ops.networks_of(stages),
            labels,
            temperature=temperature,
            kl_temperature=kl_temperature,
            row_start=row_start,
            row_count=row_count,
        )
    nodes, temperature = absorbed(nodes, temperature, 2)
    settings = [*stages], temperature, kl_temperature, ALL, row_start, row_count, backend
    vcl, soft_vcl, icl, soft_icl, *_ = values(ops.ROWS, (nodes, labels), settings)
    valid = has_positive(labels)[row_start : row_start + row_count]
    return MCLRows(vcl, soft_vcl, icl, soft_icl, valid)


def has_positive(labels: Tensor) -> Tensor:
    """[B] bool, whether another sample has the same label; by sorting, without a [B, B] mask."""
    ordered = labels.sort().values
    after, before = (torch.searchsorted(ordered, labels, right=right) for right in (True, False))
    return after - before > 1


def _objective(
    nodes: Tensor,
    stages: tuple[int, ...],
    labels: Tensor,
    row_weights: Sequence[Tensor],
    temperature: Temperature,
    kl_temperature: Temperature,
    backend: str,
    families: int,
) -> tuple[Tensor, Sequence[Tensor]]:
    """The sum of weights times rows, with the gradient computed in the same sweep; the rows."""
    nodes, temperature = absorbed(nodes, temperature, 2)
    settings = [*stages], temperature, kl_temperature, families
    loss, *found = objective(
        ops.mcl_objective,
        ops.ROWS,
        (*settings, 0, nodes.shape[1], backend),
        4,
        (*row_weights, nodes, labels),
        (*settings, backend),
    )
    return loss, found[:4]


def _weighted(
    nodes: Tensor,
    stages: tuple[int, ...],
    labels: Tensor,
    row_weights: tuple[Tensor, Tensor],
    pair_weights: Tensor | None,
    weights: Weights,
    *settings: Any,
) -> tuple[Tensor, Callable[[], MCLTerms]]:
    """The sum of the weighted terms, and a call that gives the terms without gradient.

    Where no weight asks for a gradient, the loss and its gradient come from one sweep.

    Args:
        nodes: [N, B, D].
        stages: number of nodes of each network.
        labels: [B].
        row_weights: weights of the vcl rows [N, B] and of the rows of pairs [N, N, B].
        pair_weights: argument of the loss that the row weights come from.
        weights: weights of the four terms.
        settings: temperature, kl_temperature and backend.
    """
    term_weights = check_weights(weights)
    lone, pairs = row_weights
    every = (lone, pairs, pairs, pairs)
    temperature, kl_temperature, backend = settings
    if backend == "reference" or wants_gradient(pair_weights, *term_weights):
        terms = weighted_terms(every, _rows(nodes, stages, labels, *settings)[:4])
        return terms.weighted_sum(*term_weights), lambda: detached(terms)
    scaled_rows = scaled(every, term_weights)
    loss, found = _objective(
        nodes, stages, labels, scaled_rows, temperature, kl_temperature, backend, ALL
    )
    return loss, lambda: weighted_terms(every, found)


def mcl_rows(
    embeddings: Nodes,
    labels: Tensor,
    *,
    temperature: Temperature = 0.1,
    kl_temperature: Temperature = 3.0,
    row_start: int = 0,
    row_count: int | None = None,
    normalize: bool = False,
    backend: str = "auto",
) -> MCLRows:
    """Per-anchor rows of the four mutual contrastive terms for every node and pair of nodes.

    With ``S_ab = E_a @ E_b.T / temperature``, ``P(r)`` the other samples of r's class and T the
    ``kl_temperature``:

    * ``vcl[a, r] = logsumexp(S_aa[r, c != r]) - S_aa[r, P(r)].mean()``
    * ``icl[a, b, r]``: the same with ``S_ab``
    * ``soft_vcl[a, b, r] = T**2 * kl(softmax(S_bb[r] / T) || softmax(S_aa[r] / T))``, b detached
    * ``soft_icl[a, b, r] = T**2 * kl(softmax(S_ba[r] / T) || softmax(S_ab[r] / T))``, S_ba detached

    Rows of pairs inside one network are zero. An anchor without a positive has zero ``vcl`` and
    ``icl`` rows and ``valid`` False.

    Args:
        embeddings: [M, L, B, D] unit-norm, or a sequence (networks) of sequences (stages) of
            [B, D]; networks may differ in their number of stages. N nodes, network-major.
        labels: [B] integers.
        temperature: divides the cosine similarities: a number in [1e-6, 1e6], or a 0-dim tensor,
            which may ask for a gradient.
        kl_temperature: softens the distributions the soft terms compare: a number in [1e-6, 1e6],
            or a 0-dim tensor. One that asks for a gradient gets it from the plain form.
        row_start, row_count: compute only these anchors (R of them) against the whole batch; all
            of them by default. A batch spread over processes gives each its own slice.
        normalize: whether to divide every embedding by its norm first.
        backend: "auto" or a name that ``mclfast env`` lists.

    Returns:
        MCLRows(vcl [N, R], soft_vcl [N, N, R], icl [N, N, R], soft_icl [N, N, R], valid [R]).

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        RuntimeError: the backend asked for is not available here.

    Examples:
        >>> import torch
        >>> from mclfast import mcl_rows, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> embeddings = unit_norm(torch.randn(2, 3, 8, 16))          # 2 networks of 3 stages
        >>> rows = mcl_rows(embeddings, torch.arange(8) % 4)
        >>> list(rows.vcl.shape), list(rows.icl.shape)
        ([6, 8], [6, 6, 8])

    Source: MCL, arXiv 2104.12565, section 3; layer-wise, arXiv 2207.11518, section 3.
    """
    nodes, stages, labels = _ready(embeddings, labels, normalize, with_stages=True)
    settings = _settings(nodes, temperature, kl_temperature, backend)
    with without_autocast(nodes):
        return _rows(nodes, stages, labels, *settings, row_start, row_count)


def mcl_terms(
    embeddings: Networks,
    labels: Tensor,
    *,
    temperature: Temperature = 0.1,
    kl_temperature: Temperature = 3.0,
    normalize: bool = False,
    backend: str = "auto",
) -> MCLTerms:
    """The four terms of mutual contrastive learning between M networks, one embedding each.

    Equals ``rows.mean(-1).sum()`` of each family of :func:`mcl_rows` with one stage per network:
    sums over networks (vcl) and ordered pairs (the others), means over the batch. Terms can be
    combined in any way; for a weighted sum, :func:`mcl_loss` is faster.

    Args:
        embeddings: [M, B, D] unit-norm, or a sequence of M tensors [B, D].
        labels: [B] integers.
        temperature: divides the cosine similarities: a number in [1e-6, 1e6], or a 0-dim tensor,
            which may ask for a gradient.
        kl_temperature: softens the distributions the soft terms compare: a number in [1e-6, 1e6],
            or a 0-dim tensor. One that asks for a gradient gets it from the plain form.
        normalize: whether to divide every embedding by its norm first.
        backend: "auto" or a name that ``mclfast env`` lists.

    Returns:
        MCLTerms(vcl, soft_vcl, icl, soft_icl), 0-dim each, differentiable to second order.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mcl_rows`.

    Examples:
        >>> import torch
        >>> from mclfast import mcl_terms, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> embeddings = unit_norm(torch.randn(2, 8, 16))
        >>> terms = mcl_terms(embeddings, torch.arange(8) % 4)
        >>> terms.icl.shape, bool(terms.soft_vcl >= 0)
        (torch.Size([]), True)

    Source: arXiv 2104.12565, equations 4 to 9.
    """
    nodes, stages, labels = _ready(embeddings, labels, normalize, with_stages=False)
    settings = _settings(nodes, temperature, kl_temperature, backend)
    with without_autocast(nodes):
        return weighting.mcl_terms(_rows(nodes, stages, labels, *settings))


def mcl_loss(
    embeddings: Networks,
    labels: Tensor,
    *,
    weights: Weights = PUBLISHED_WEIGHTS,
    temperature: Temperature = 0.1,
    kl_temperature: Temperature = 3.0,
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Mutual contrastive learning between M networks: the weighted sum of :func:`mcl_terms`.

    Args:
        embeddings: [M, B, D] unit-norm, or a sequence of M tensors [B, D].
        labels: [B] integers.
        weights: weights of vcl, soft_vcl, icl and soft_icl: numbers or 0-dim tensors, or one tensor
            [4]. Weights that require a gradient get it; where none does, the loss and its gradient
            are computed in one sweep, the fastest form.
        temperature, kl_temperature, normalize, backend: arguments of :func:`mcl_terms`.

    Returns:
        The loss, 0-dim, differentiable to second order.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mcl_rows`.

    Examples:
        >>> import torch
        >>> from mclfast import mcl_loss, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> features = torch.randn(2, 8, 16, requires_grad=True)
        >>> loss = mcl_loss(unit_norm(features), torch.arange(8) % 4, weights=(0.1, 1, 0.1, 1))
        >>> loss.backward()
        >>> features.grad.shape
        torch.Size([2, 8, 16])

    Source: arXiv 2104.12565, equations 4 to 9; published weights 0.1, 1, 0.1, 1.
    """
    settings = temperature, kl_temperature, normalize, backend
    return _plain(embeddings, labels, weights, *settings)[0]


def mcl_objective(
    embeddings: Networks,
    labels: Tensor,
    *,
    weights: Weights = PUBLISHED_WEIGHTS,
    temperature: Temperature = 0.1,
    kl_temperature: Temperature = 3.0,
    normalize: bool = False,
    backend: str = "auto",
) -> MCLObjective:
    """:func:`mcl_loss` together with its terms, for a log.

    Args:
        embeddings, labels, weights, temperature, kl_temperature, normalize,
            backend: arguments of :func:`mcl_loss`.

    Returns:
        MCLObjective(loss, terms); the loss is that of :func:`mcl_loss`, the terms give no gradient.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mcl_rows`.

    Examples:
        >>> import torch
        >>> from mclfast import mcl_objective, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> features = torch.randn(2, 8, 16, requires_grad=True)
        >>> loss, terms = mcl_objective(unit_norm(features), torch.arange(8) % 4)
        >>> loss.backward()
        >>> sorted(terms._asdict()), terms.vcl.requires_grad
        (['icl', 'soft_icl', 'soft_vcl', 'vcl'], False)
    """
    settings = temperature, kl_temperature, normalize, backend
    loss, terms = _plain(embeddings, labels, weights, *settings)
    return MCLObjective(loss, terms())


def _plain(
    embeddings: Networks,
    labels: Tensor,
    weights: Weights,
    temperature: Temperature,
    kl_temperature: Temperature,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Callable[[], MCLTerms]]:
    """The loss of one embedding per network, and a call that gives its terms."""
    nodes, stages, labels = _ready(embeddings, labels, normalize, with_stages=False)
    settings = _settings(nodes, temperature, kl_temperature, backend)
    with without_autocast(nodes):
        rows = weighting.equal_row_weights(stages, nodes)
        return _weighted(nodes, stages, labels, rows, None, weights, *settings)


def layerwise_mcl_terms(
    embeddings: Nodes,
    labels: Tensor,
    pair_weights: Tensor | None = None,
    *,
    temperature: Temperature = 0.1,
    kl_temperature: Temperature = 3.0,
    normalize: bool = False,
    backend: str = "auto",
) -> MCLTerms:
    """The four terms of layer-wise mutual contrastive learning: every stage with those of peers.

    With ``u = pair_weights + pair_weights.transpose(0, 1)``, zero inside one network, and the rows
    of :func:`mcl_rows`: ``icl = (u * rows.icl).sum() / B``, the soft terms alike, and
    ``vcl = (u.sum(1) * rows.vcl).sum() / B`` (the published scale: sums over ordered pairs).

    Args:
        embeddings: [M, L, B, D] unit-norm, or networks of stages of [B, D].
        labels: [B] integers.
        pair_weights: [N, N, B] weight of each pair of nodes for each sample (N = all stages of all
            networks, network-major), as a :class:`mclfast.LayerMatcher` gives; None for ones.
        temperature, kl_temperature, normalize, backend: arguments of :func:`mcl_terms`.

    Returns:
        MCLTerms(vcl, soft_vcl, icl, soft_icl), 0-dim each, differentiable to second order, also
        with respect to the pair weights.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mcl_rows`.

    Examples:
        >>> import torch
        >>> from mclfast import layerwise_mcl_terms, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> embeddings = unit_norm(torch.randn(2, 3, 8, 16))          # 2 networks of 3 stages
        >>> weights = torch.rand(6, 6, 8, requires_grad=True)
        >>> layerwise_mcl_terms(embeddings, torch.arange(8) % 4, weights).icl.backward()
        >>> weights.grad.shape
        torch.Size([6, 6, 8])

    Source: arXiv 2207.11518, section 3.3.
    """
    nodes, stages, labels = _ready(embeddings, labels, normalize, with_stages=True)
    given = check_pair_weights(pair_weights, nodes)
    settings = _settings(nodes, temperature, kl_temperature, backend)
    with without_autocast(nodes):
        rows = _rows(nodes, stages, labels, *settings)
        return weighting.layerwise_mcl_terms(rows, stages, given)


def layerwise_mcl_loss(
    embeddings: Nodes,
    labels: Tensor,
    pair_weights: Tensor | None = None,
    *,
    weights: Weights = PUBLISHED_WEIGHTS,
    temperature: Temperature = 0.1,
    kl_temperature: Temperature = 3.0,
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Layer-wise mutual contrastive learning: the weighted sum of :func:`layerwise_mcl_terms`.

    Args:
        embeddings: [M, L, B, D] unit-norm, or networks of stages of [B, D].
        labels: [B] integers.
        pair_weights: [N, N, B] weight of each pair of nodes for each sample; None for ones.
        weights: weights of vcl, soft_vcl, icl and soft_icl, as in :func:`mcl_loss`. Weights of
            terms and of pairs that require a gradient get it; where none does, the loss and its
            gradient are computed in one sweep, the fastest form.
        temperature, kl_temperature, normalize, backend: arguments of :func:`mcl_terms`.

    Returns:
        The loss, 0-dim, differentiable to second order.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mcl_rows`.

    Examples:
        >>> import torch
        >>> from mclfast import layerwise_mcl_loss, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> features = torch.randn(2, 3, 8, 16, requires_grad=True)   # 2 networks of 3 stages
        >>> layerwise_mcl_loss(unit_norm(features), torch.arange(8) % 4).backward()
        >>> features.grad.shape
        torch.Size([2, 3, 8, 16])

    Source: arXiv 2207.11518, section 3.3; published weights 0.1, 1, 0.1, 1 on CIFAR-100.
    """
    settings = temperature, kl_temperature, normalize, backend
    return _layerwise(embeddings, labels, pair_weights, weights, *settings)[0]


def layerwise_mcl_objective(
    embeddings: Nodes,
    labels: Tensor,
    pair_weights: Tensor | None = None,
    *,
    weights: Weights = PUBLISHED_WEIGHTS,
    temperature: Temperature = 0.1,
    kl_temperature: Temperature = 3.0,
    normalize: bool = False,
    backend: str = "auto",
) -> MCLObjective:
    """:func:`layerwise_mcl_loss` together with its terms, for a log.

    Args:
        embeddings, labels, pair_weights, weights, temperature, kl_temperature, normalize,
            backend: arguments of :func:`layerwise_mcl_loss`.

    Returns:
        MCLObjective(loss, terms); the loss is that of :func:`layerwise_mcl_loss`, the terms give no
        gradient.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mcl_rows`.

    Examples:
        >>> import torch
        >>> from mclfast import layerwise_mcl_objective, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> embeddings = unit_norm(torch.randn(2, 3, 8, 16))
        >>> loss, terms = layerwise_mcl_objective(embeddings, torch.arange(8) % 4)
        >>> torch.allclose(loss, terms.weighted_sum(0.1, 1, 0.1, 1))
        True
    """
    settings = temperature, kl_temperature, normalize, backend
    loss, terms = _layerwise(embeddings, labels, pair_weights, weights, *settings)
    return MCLObjective(loss, terms())


def _layerwise(
    embeddings: Nodes,
    labels: Tensor,
    pair_weights: Tensor | None,
    weights: Weights,
    temperature: Temperature,
    kl_temperature: Temperature,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Callable[[], MCLTerms]]:
    """The loss of all pairs of stages, and a call that gives its terms."""
    nodes, stages, labels = _ready(embeddings, labels, normalize, with_stages=True)
    given = check_pair_weights(pair_weights, nodes)
    settings = _settings(nodes, temperature, kl_temperature, backend)
    with without_autocast(nodes):
        pairs = weighting.both_directions(given, stages, nodes) / nodes.shape[1]
        rows = pairs.sum(1), pairs
        return _weighted(nodes, stages, labels, rows, given, weights, *settings)


def supcon_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    temperature: Temperature = 0.1,
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Supervised contrastive loss, mean over the batch.

    Equals, with ``S = embeddings @ embeddings.T / temperature``, the mean over anchors r of
    ``logsumexp(S[r, c != r]) - S[r, positives].mean()``; an anchor without a positive counts 0.

    Args:
        embeddings: [B, D] unit-norm.
        labels: [B] integers.
        temperature: divides the cosine similarities: a number in [1e-6, 1e6], or a 0-dim tensor,
            which may ask for a gradient.
        normalize: whether to divide every embedding by its norm first.
        backend: "auto" or a name that ``mclfast env`` lists.

    Returns:
        0-dim.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mcl_rows`.

    Examples:
        >>> import torch
        >>> from mclfast import supcon_loss, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> features = torch.randn(8, 16, requires_grad=True)
        >>> supcon_loss(unit_norm(features), torch.arange(8) % 4, temperature=0.1).backward()
        >>> features.grad.shape
        torch.Size([8, 16])

    Source: arXiv 2004.11362, equation 2 (L_out).
    """
    check_embeddings("embeddings", embeddings, ["B", "D"])
    labels = check_labels(labels, embeddings.shape[0], embeddings.device)
    embeddings = prepared("embeddings", embeddings, normalize)
    backend, temperature, _ = choose(backend, temperature, 1.0, embeddings)
    with without_autocast(embeddings):
        if backend == "reference":
            return reference.supcon_loss(embeddings, labels, temperature=temperature)
        batch, nodes = embeddings.shape[0], embeddings[None]
        mean = nodes.new_full((1, batch), 1.0 / batch, dtype=statistics_dtype(nodes))
        weights = (mean, *(mean.new_zeros(1, 1, batch) for _ in range(3)))
        return _objective(nodes, (1,), labels, weights, temperature, 1.0, backend, VCL)[0]


def info_nce_loss(
    a: Tensor,
    b: Tensor,
    *,
    temperature: Temperature = 0.1,
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Symmetric InfoNCE of two views (the CLIP form).

    Equals, with ``S = a @ b.T / temperature`` and ``t = arange(B)``,
    ``(cross_entropy(S, t) + cross_entropy(S.T, t)) / 2``.

    Args:
        a, b: [B, D] unit-norm; row r of ``b`` is the positive of row r of ``a``.
        temperature: divides the cosine similarities: a number in [1e-6, 1e6], or a 0-dim tensor,
            which may ask for a gradient.
        normalize: whether to divide every embedding by its norm first.
        backend: "auto" or a name that ``mclfast env`` lists.

    Returns:
        0-dim.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mcl_rows`.

    Examples:
        >>> import torch
        >>> from mclfast import info_nce_loss, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> images, texts = unit_norm(torch.randn(2, 8, 16))
        >>> loss = info_nce_loss(images, texts, temperature=0.07)
        >>> scores = images @ texts.T / 0.07
        >>> cross_entropy, target = torch.nn.functional.cross_entropy, torch.arange(8)
        >>> eager = (cross_entropy(scores, target) + cross_entropy(scores.T, target)) / 2
        >>> torch.allclose(loss, eager)
        True

    Source: arXiv 1807.03748, equation 4; symmetric form arXiv 2103.00020, figure 3.
    """
    check_embeddings("a", a, ["B", "D"])
    check_embeddings("b", b, list(a.shape))
    check_same("b", b, "a", a)
    a, b = prepared("a", a, normalize), prepared("b", b, normalize)
    backend, temperature, _ = choose(backend, temperature, 1.0, a)
    with without_autocast(a):
        if backend == "reference":
            return reference.info_nce_loss(a, b, temperature=temperature)
        if isinstance(temperature, Tensor) or torch.compiler.is_compiling():
            (a, temperature), b = absorbed(a, temperature, 1), wide(b)
        row_lse, col_lse, diagonal = values(ops.INFO_NCE, (a, b), (temperature, backend))
        return ((row_lse + col_lse) / 2 - diagonal).mean()


def similarity_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: Temperature = 0.1,
    kl_temperature: Temperature = 3.0,
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """KL between the similarity distributions of two sets of embeddings, mean over the batch.

    Equals, with ``S(x) = x @ x.T / temperature`` and T the ``kl_temperature``,
    ``T**2 * kl_div(log_softmax(S(student) / T), softmax(S(teacher) / T), reduction="batchmean")``.
    The factor T**2 keeps the gradient's scale when T changes. The teacher gets no gradient.

    Args:
        student: [B, D] unit-norm.
        teacher: [B, D'] unit-norm; its width may differ.
        temperature: divides the cosine similarities: a number in [1e-6, 1e6], or a 0-dim tensor,
            which may ask for a gradient.
        kl_temperature: softens the distributions that are compared: a number in [1e-6, 1e6],
            or a 0-dim tensor. One that asks for a gradient gets it from the plain form.
        normalize: whether to divide every embedding by its norm first.
        backend: "auto" or a name that ``mclfast env`` lists.

    Returns:
        0-dim.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mcl_rows`.

    Examples:
        >>> import torch
        >>> from mclfast import similarity_kl_loss, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> student = torch.randn(8, 16, requires_grad=True)
        >>> teacher = unit_norm(torch.randn(8, 32))                   # may have another width
        >>> similarity_kl_loss(unit_norm(student), teacher).backward()
        >>> student.grad.shape
        torch.Size([8, 16])

    Source: arXiv 2104.12565, equation 8 (soft VCL of one ordered pair).
    """
    check_embeddings("student", student, ["B", "D"])
    check_embeddings("teacher", teacher, [student.shape[0], "D"])
    check_same("teacher", teacher, "student", student)
    student, teacher = (
        prepared(name, x, normalize)
        for name, x in (("student", student), ("teacher", teacher.detach()))
    )
    settings = choose(backend, temperature, kl_temperature, student)
    backend, temperature, kl_temperature = settings
    with without_autocast(student):
        if backend == "reference":
            return reference.similarity_kl_loss(
                student, teacher, temperature=temperature, kl_temperature=kl_temperature
            )
        batch, width = student.shape[0], max(student.shape[1], teacher.shape[1])
        # Columns of zeros change no similarity.
        nodes = torch.stack([pad(x, (0, width - x.shape[1])) for x in (student, teacher)])
        pairs = nodes.new_zeros(2, 2, batch, dtype=statistics_dtype(nodes))
        # Entry [0, 1]. A write into a tensor is lost where a graph of constants is folded
        # (``torch.func.linearize``).
        weights = pad(pairs.new_full((1, 1, batch), 1.0 / batch), (0, 0, 1, 0, 0, 1))
        factor: Temperature = 1.0
        if torch.compiler.is_compiling():
            # The operator takes the kl_temperature as a constant of the graph. The logits are
            # divided by the product of both temperatures, which need not be one.
            factor, temperature = kl_temperature**2, temperature * kl_temperature
            kl_temperature = 1.0
        loss, _ = _objective(
            nodes,
            (1, 1),
            torch.zeros(batch, dtype=torch.long, device=nodes.device),
            (pairs[0], weights, pairs, pairs),
            temperature,
            kl_temperature,
            backend,
            SOFT_VCL,
        )
        return loss * factor
