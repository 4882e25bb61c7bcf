"""Benchmark of the in-batch losses: inputs, the right result, and the providers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mclfast._base.optional import optional_import
from mclfast.bench.problem import (
    DTYPES,
    SECOND,
    WEIGHTS,
    Case,
    Inputs,
    Loss,
    Provider,
    Unavailable,
    check_backend,
    step,
)
from mclfast.bench.published_forms import in_batch
from mclfast.losses import reference, weighting
from mclfast.losses.in_batch import (
    info_nce_loss,
    layerwise_mcl_objective,
    layerwise_mcl_terms,
    supcon_loss,
)

TEMPERATURE = 0.1
KL_TEMPERATURE = 3.0
#: Published weights of vcl, soft_vcl, icl and soft_icl.
COEFFICIENTS = (0.1, 1.0, 0.1, 1.0)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random unit-norm embeddings; every class is at least twice in the batch if B >= 2.

    The embeddings of all nodes share a component, like embeddings of peers that learn one task.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    device, dtype = torch.device(case.device), DTYPES[case.dtype]
    classes = max(1, min(100, case.b // 2))
    labels = (torch.arange(case.b) % classes)[torch.randperm(case.b, generator=generator)]
    unit = torch.nn.functional.normalize(
        normal(case.b, case.d) + normal(case.nodes, case.b, case.d), dim=-1
    )
    stacked = unit.to(device, dtype)
    leaves = [stacked] if case.op == "layerwise_mcl" else [x.clone() for x in stacked.unbind(0)]
    direction = [torch.randn(x.shape, generator=generator).to(device, dtype) for x in leaves]
    weights = None
    if case.op == "layerwise_mcl":
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weights = torch.rand(case.nodes, case.nodes, case.b, generator=generator).to(device, wide)
        if case.mode == WEIGHTS:
            leaves.append(weights)
    return Inputs(
        tuple(x.requires_grad_() for x in leaves),
        tuple(a // case.l for a in range(case.nodes)),
        labels.to(device),
        weights,
        tuple(direction),
    )


def truth(case: Case, inputs: Inputs, rows: int = 64) -> tuple[Tensor, ...]:
    """Value and derivatives that the measured call must give, from the reference in float64.

    The layer-wise loss and its derivatives are sums over anchors. They are added up over blocks of
    anchors, so that float64 fits into memory at every shape.

    Args:
        case: case to compute.
        inputs: inputs of the case.
        rows: number of anchors in a block.
    """
    exact = inputs.double()
    if case.op != "layerwise_mcl":
        return step(case, exact, _reference(case, exact))()
    total: tuple[Tensor, ...] | None = None
    for start in range(0, case.b, rows):
        count = min(rows, case.b - start)
        part = step(case, exact, functools.partial(_block, case, exact, start, count))()
        total = part if total is None else tuple(x + y for x, y in zip(total, part, strict=True))
    assert total is not None
    return tuple(x.detach() for x in total)


def _block(case: Case, inputs: Inputs, start: int, count: int, leaves: Sequence[Tensor]) -> Tensor:
    weights = leaves[1] if case.mode == WEIGHTS else inputs.pair_weights
    assert weights is not None
    rows = reference.mcl_rows(
        leaves[0],
        inputs.networks,
        inputs.labels,
        temperature=TEMPERATURE,
        kl_temperature=KL_TEMPERATURE,
        row_start=start,
        row_count=count,
    )
    part = weights[..., start : start + count]
    terms = weighting.layerwise_mcl_terms(rows, inputs.stages, part)
    return terms.weighted_sum(*COEFFICIENTS) * (count / case.b)


def _published(case: Case, inputs: Inputs, pair: in_batch.PairFunction) -> Loss:
    def loss(leaves: Sequence[Tensor]) -> Tensor:
        weights = leaves[1] if case.mode == WEIGHTS else inputs.pair_weights
        assert weights is not None
        terms = in_batch.layerwise_mcl_loss(
            leaves[0],
            inputs.networks,
            inputs.labels,
            weights,
            temperature=TEMPERATURE,
            kl_temperature=KL_TEMPERATURE,
            pair=pair,
        )
        return terms.weighted_sum(*COEFFICIENTS)

    return loss


def _eager(case: Case, inputs: Inputs) -> Loss:
    return _published(case, inputs, in_batch.pair_terms)


@functools.cache
def _compiled_pair() -> in_batch.PairFunction:
    # dynamic=False compiles each shape by itself, which gives the fastest code.
    compiled: in_batch.PairFunction = torch.compile(in_batch.pair_terms, dynamic=False)
    return compiled


def _compiled(case: Case, inputs: Inputs) -> Loss:
    if case.mode == SECOND:
        raise Unavailable("torch.compile does not support double backward")
    if case.dtype not in ("float64", "float32"):
        raise Unavailable("the published form is measured in float32")
    torch._dynamo.config.recompile_limit = 64
    return _published(case, inputs, _compiled_pair())


def _layerwise(backend: str, fused: bool, case: Case, inputs: Inputs) -> Loss:
    check_backend(backend, case)
    if fused and case.mode == WEIGHTS:
        raise Unavailable("the one-sweep path gives the pair weights no gradient")
    settings: dict[str, Any] = {
        "temperature": TEMPERATURE,
        "kl_temperature": KL_TEMPERATURE,
        "backend": backend,
    }

    def loss(leaves: Sequence[Tensor]) -> Tensor:
        weights = leaves[1] if case.mode == WEIGHTS else inputs.pair_weights
        nodes = leaves[0].unflatten(0, (case.m, case.l))
        arguments = nodes, inputs.labels, weights
        if fused:
            return layerwise_mcl_objective(*arguments, weights=COEFFICIENTS, **settings).loss
        return layerwise_mcl_terms(*arguments, **settings).weighted_sum(*COEFFICIENTS)

    return loss


def _views(case: Case, inputs: Inputs) -> Tensor:
    """Labels [2B] for which SupCon of two views of B samples is the NT-Xent loss."""
    return torch.arange(case.b, device=inputs.labels.device).repeat(2)


def _contrastive(backend: str, case: Case, inputs: Inputs) -> Loss:
    check_backend(backend, case)
    options: dict[str, Any] = {"temperature": TEMPERATURE, "backend": backend}
    if case.op == "supcon":
        return lambda leaves: supcon_loss(leaves[0], inputs.labels, **options)
    if case.op == "nt_xent":
        labels = _views(case, inputs)
        return lambda leaves: supcon_loss(torch.cat(list(leaves)), labels, **options)
    return lambda leaves: info_nce_loss(leaves[0], leaves[1], **options)


def _reference(case: Case, inputs: Inputs) -> Loss:
    """The reference loss, called without backends and checks of arguments."""
    if case.op == "supcon":
        return lambda leaves: reference.supcon_loss(
            leaves[0], inputs.labels, temperature=TEMPERATURE
        )
    if case.op == "nt_xent":
        labels = _views(case, inputs)
        return lambda leaves: reference.supcon_loss(
            torch.cat(list(leaves)), labels, temperature=TEMPERATURE
        )
    return lambda leaves: reference.info_nce_loss(leaves[0], leaves[1], temperature=TEMPERATURE)


def _pml(case: Case, inputs: Inputs) -> Loss:
    """The loss of pytorch-metric-learning, for embeddings that have unit norm already."""
    try:
        losses = optional_import("pytorch_metric_learning.losses", extra="bench")
        distances = optional_import("pytorch_metric_learning.distances", extra="bench")
        reducers = optional_import("pytorch_metric_learning.reducers", extra="bench")
    except ImportError as error:
        raise Unavailable(str(error)) from None
    # By default it would normalise again, and leave anchors without loss out of the mean.
    options = {
        "temperature": TEMPERATURE,
        "distance": distances.DotProductSimilarity(normalize_embeddings=False),
        "reducer": reducers.MeanReducer(),
    }
    if case.op == "supcon":
        supcon = losses.SupConLoss(**options)
        return lambda leaves: supcon(leaves[0], inputs.labels)
    nt_xent = losses.NTXentLoss(**options)
    if case.op == "nt_xent":
        views = _views(case, inputs)
        return lambda leaves: nt_xent(torch.cat(list(leaves)), views)
    labels = _views(case, inputs)[: case.b]
    # A copy: given the same tensor twice, it takes both sides for one batch and drops the diagonal.
    copy = labels.clone()

    def info_nce(leaves: Sequence[Tensor]) -> Tensor:
        a, b = leaves
        there = nt_xent(a, labels, ref_emb=b, ref_labels=copy)
        back = nt_xent(b, labels, ref_emb=a, ref_labels=copy)
        value: Tensor = (there + back) / 2
        return value

    return info_nce


def _lightly(case: Case, inputs: Inputs) -> Loss:
    try:
        losses = optional_import("lightly.loss", extra="bench")
    except ImportError as error:
        raise Unavailable(str(error)) from None
    nt_xent = losses.NTXentLoss(temperature=TEMPERATURE)
    return lambda leaves: nt_xent(leaves[0], leaves[1])


def _matrices(per_pair: float, per_node: float = 0.0) -> Callable[[Case], float]:
    """A function that gives the bytes of the [B, B] matrices kept in a case.

    Args:
        per_pair: number of matrices for each ordered pair of nodes.
        per_node: number of matrices for each node.
    """

    def kept(case: Case) -> float:
        matrices = per_pair * 2 * case.unordered_pairs + per_node * case.nodes
        # The second order keeps the graph of the first derivative as well.
        factor = 4 if case.mode == SECOND else 1
        return factor * matrices * case.b**2 * DTYPES[case.dtype].itemsize

    return kept


def _pml_bytes(case: Case) -> float:
    """Bytes of pytorch-metric-learning, whose NTXentLoss pairs all positives and negatives."""
    size = 2 * case.b if case.op == "nt_xent" else case.b
    if case.op == "supcon":
        return 18.0 * size**2 * 4
    return 10.0 * size**3 * 4


_SPECIAL = [
    Provider("reference", functools.partial(_contrastive, "reference"), _matrices(0, 20)),
    Provider("pml", _pml, _pml_bytes),
    Provider("cpu", functools.partial(_contrastive, "cpu"), ours=True),
    Provider("triton", functools.partial(_contrastive, "triton"), ours=True),
]

#: Providers of each operation. Layer-wise MCL has two paths of ours: "rows" computes the four
#: terms, which are weighted afterwards; "fused" knows the coefficients and computes the sum.
PROVIDERS: dict[str, list[Provider]] = {
    "layerwise_mcl": [
        Provider("eager", _eager, _matrices(52)),
        Provider("compiled", _compiled, _matrices(10)),
        Provider("reference", functools.partial(_layerwise, "reference", False), _matrices(18, 4)),
        Provider("cpu-rows", functools.partial(_layerwise, "cpu", False), ours=True),
        Provider("cpu-fused", functools.partial(_layerwise, "cpu", True), ours=True),
        Provider("triton-rows", functools.partial(_layerwise, "triton", False), ours=True),
        Provider("triton-fused", functools.partial(_layerwise, "triton", True), ours=True),
    ],
    "supcon": _SPECIAL,
    "nt_xent": [*_SPECIAL, Provider("lightly", _lightly, _matrices(0, 40), tangent=True)],
    "info_nce": _SPECIAL,
}
