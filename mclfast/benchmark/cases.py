"""What is measured: operations, shapes, and the implementations (providers) of each operation.

A provider builds a function from leaves to a scalar loss. One that cannot run here raises
:class:`Unavailable` with the reason, which the report lists.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mclfast
from mclfast import _backend, reference
from mclfast._checks import unknown_name
from mclfast._optional import optional_import
from mclfast.benchmark import published

TEMPERATURE = 0.1
KL_TEMPERATURE = 3.0
#: Weights of vcl, soft_vcl, icl, soft_icl; the published ones.
COEFFICIENTS = (0.1, 1.0, 0.1, 1.0)

FORWARD = "forward"
BOTH = "forward_backward"
WEIGHTS = "forward_backward_weights"
SECOND = "second_order"
MODES = (FORWARD, BOTH, WEIGHTS, SECOND)

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
#: Largest relative difference from the reference in float64. The gradient comes in the dtype of
#: the embeddings, so half precision is judged by the rounding of its result.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
#: The same for float32 inputs that the Triton kernels round to tf32 (10 bits of mantissa).
TF32_TOLERANCE = 2e-3

Loss = Callable[[Sequence[Tensor]], Tensor]


def tolerance(case: Case, provider: Provider) -> float:
    """Largest relative difference from the reference that a provider's numbers are given for."""
    rounds = os.environ.get("MCLFAST_FP32_PRECISION", "tf32") == "tf32"
    if rounds and case.dtype == "float32" and provider.name.startswith("triton"):
        return TF32_TOLERANCE
    return TOLERANCE[case.dtype]


class Unavailable(Exception):
    """A provider cannot measure a case here; the text says why."""


@dataclass(frozen=True)
class Case:
    """One point: an operation, what is differentiated, a shape, a dtype and a device.

    Attributes:
        op: a key of :data:`PROVIDERS`.
        mode: forward (the graph is built, not used); forward_backward; forward_backward_weights
            (the pair weights get a gradient too); second_order (a product with the gradient is
            differentiated once more).
        m: networks, or views.
        l: stages of each network.
        b: batch.
        d: width of the embeddings.
        dtype: a key of :data:`DTYPES`.
        device: "cpu" or "cuda".
    """

    op: str
    mode: str
    m: int
    l: int  # noqa: E741 - the L of (M, L, B, D)
    b: int
    d: int = 128
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def nodes(self) -> int:
        """Stages of all networks, N."""
        return self.m * self.l

    @property
    def unordered_pairs(self) -> int:
        """Pairs of nodes of different networks, |X|."""
        return self.m * (self.m - 1) // 2 * self.l**2

    @property
    def name(self) -> str:
        shape = f"{self.m},{self.l},{self.b},{self.d}"
        return f"{self.op}[{self.mode},{shape},{self.dtype},{self.device}]"


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case.

    Attributes:
        leaves: what is differentiated: nodes [N, B, D] and perhaps the pair weights [N, N, B], or
            views of [B, D].
        networks: the network of each node.
        labels: [B].
        pair_weights: [N, N, B], or None for the other operations.
        direction: what the gradient is multiplied by for the second order, like the first leaves.
    """

    leaves: tuple[Tensor, ...]
    networks: tuple[int, ...]
    labels: Tensor
    pair_weights: Tensor | None
    direction: tuple[Tensor, ...]

    def double(self) -> Inputs:
        """The same numbers in float64, as leaves of their own."""
        weights = self.pair_weights
        return Inputs(
            tuple(x.detach().double().requires_grad_() for x in self.leaves),
            self.networks,
            self.labels,
            None if weights is None else weights.detach().double(),
            tuple(x.double() for x in self.direction),
        )


@dataclass(frozen=True)
class Provider:
    """An implementation of an operation.

    Attributes:
        name: how the report calls it.
        build: from a case and its inputs to the loss; may raise :class:`Unavailable`.
        kept: bytes it is expected to need, to refuse what does not fit into memory.
        ours: whether it is to be judged by the targets.
        tangent: it normalises its inputs itself, so the part of its gradient along an embedding
            is zero; the gradients are compared without that part.
    """

    name: str
    build: Callable[[Case, Inputs], Loss]
    kept: Callable[[Case], float] = lambda case: 0.0
    ours: bool = False
    tangent: bool = False


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random unit-norm embeddings, with every class at least twice in the batch where B >= 2.

    The embeddings of the nodes share a component, as those of peers that learn the same task do.
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


def step(case: Case, inputs: Inputs, loss: Loss) -> Callable[[], tuple[Tensor, ...]]:
    """The measured call: the loss, and the derivatives that the mode asks for."""
    leaves = inputs.leaves

    def forward() -> tuple[Tensor, ...]:
        return (loss(leaves),)

    def both() -> tuple[Tensor, ...]:
        value = loss(leaves)
        return (value.detach(), *torch.autograd.grad(value, leaves))

    def second() -> tuple[Tensor, ...]:
        value = loss(leaves)
        first = torch.autograd.grad(value, leaves, create_graph=True)
        pairs = zip(first, inputs.direction, strict=True)
        product = torch.stack([(g * v).sum() for g, v in pairs]).sum()
        found = torch.autograd.grad(product, leaves)
        return (value.detach(), *(g.detach() for g in first), *found)

    return {FORWARD: forward, BOTH: both, WEIGHTS: both, SECOND: second}[case.mode]


def truth(case: Case, inputs: Inputs, rows: int = 64) -> tuple[Tensor, ...]:
    """What the measured call must give, from the reference in float64.

    The layer-wise loss is a sum over anchors, and so are its derivatives: they are added up over
    blocks of ``rows`` anchors, which keeps float64 within memory at every shape.
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
        leaves[0], inputs.networks, inputs.labels, temperature=TEMPERATURE,
        kl_temperature=KL_TEMPERATURE, row_start=start, row_count=count,
    )  # fmt: skip
    part = weights[..., start : start + count]
    terms = reference.layerwise_mcl_terms(rows, inputs.networks, part)
    return terms.weighted_sum(*COEFFICIENTS) * (count / case.b)


def difference(case: Case, provider: Provider, inputs: Inputs, found: Sequence[Tensor],
               expected: Sequence[Tensor]) -> float:  # fmt: skip
    """Largest relative difference, in norm, over the value and each derivative; NaN counts."""
    worst = 0.0
    leaves = [x.detach().double() for x in inputs.leaves]
    for i, (ours, exact) in enumerate(zip(found, expected, strict=True)):
        ours = ours.detach().double()
        if provider.tangent and i > 0:
            e = leaves[(i - 1) % len(leaves)]
            ours, exact = (x - (x * e).sum(-1, keepdim=True) * e for x in (ours, exact))
        scale = float(exact.norm()) or 1.0
        error = float((ours - exact).norm()) / scale
        worst = error if math.isnan(error) else max(worst, error)
        if math.isnan(worst):
            break
    return worst


#: The device that a backend is measured on; on the other one it is no candidate.
_DEVICES = {"cpu": "cpu", "triton": "cuda"}


def _check_backend(backend: str, case: Case) -> None:
    device = _DEVICES.get(backend, case.device)
    if case.device != device:
        raise Unavailable(f"measured on {device} only")
    status = _backend.backend_report()[backend]
    if not status.available:
        raise Unavailable(status.reason)


def _published(case: Case, inputs: Inputs, pair: published.PairFunction) -> Loss:
    def loss(leaves: Sequence[Tensor]) -> Tensor:
        weights = leaves[1] if case.mode == WEIGHTS else inputs.pair_weights
        assert weights is not None
        terms = published.layerwise_mcl_loss(
            leaves[0], inputs.networks, inputs.labels, weights,
            temperature=TEMPERATURE, kl_temperature=KL_TEMPERATURE, pair=pair,
        )  # fmt: skip
        return terms.weighted_sum(*COEFFICIENTS)

    return loss


def _eager(case: Case, inputs: Inputs) -> Loss:
    return _published(case, inputs, published.pair_terms)


@functools.cache
def _compiled_pair() -> published.PairFunction:
    # dynamic=False: each shape gets code of its own, the fastest that the compiler has.
    compiled: published.PairFunction = torch.compile(published.pair_terms, dynamic=False)
    return compiled


def _compiled(case: Case, inputs: Inputs) -> Loss:
    if case.mode == SECOND:
        raise Unavailable("torch.compile does not support double backward")
    if case.dtype not in ("float64", "float32"):
        raise Unavailable("the published form is measured in float32")
    torch._dynamo.config.recompile_limit = 64
    return _published(case, inputs, _compiled_pair())


def _layerwise(backend: str, fused: bool, case: Case, inputs: Inputs) -> Loss:
    _check_backend(backend, case)
    if fused and case.mode == WEIGHTS:
        raise Unavailable("the one-sweep path gives the pair weights no gradient")
    settings: dict[str, Any] = {
        "temperature": TEMPERATURE, "kl_temperature": KL_TEMPERATURE, "backend": backend,
    }  # fmt: skip
    if fused:
        settings["coefficients"] = COEFFICIENTS

    def loss(leaves: Sequence[Tensor]) -> Tensor:
        weights = leaves[1] if case.mode == WEIGHTS else inputs.pair_weights
        nodes = leaves[0].unflatten(0, (case.m, case.l))
        result: Any = mclfast.layerwise_mcl_loss(nodes, inputs.labels, weights, **settings)
        value: Tensor = result.loss if fused else result.weighted_sum(*COEFFICIENTS)
        return value

    return loss


def _views(case: Case, inputs: Inputs) -> Tensor:
    """[2B], the labels under which two views of B samples make SupCon the NT-Xent loss."""
    return torch.arange(case.b, device=inputs.labels.device).repeat(2)


def _contrastive(backend: str, case: Case, inputs: Inputs) -> Loss:
    _check_backend(backend, case)
    options: dict[str, Any] = {"temperature": TEMPERATURE, "backend": backend}
    if case.op == "supcon":
        return lambda leaves: mclfast.supcon_loss(leaves[0], inputs.labels, **options)
    if case.op == "nt_xent":
        labels = _views(case, inputs)
        return lambda leaves: mclfast.supcon_loss(torch.cat(list(leaves)), labels, **options)
    return lambda leaves: mclfast.info_nce_loss(leaves[0], leaves[1], **options)


def _reference(case: Case, inputs: Inputs) -> Loss:
    """The specification, past every backend and argument check."""
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
    """pytorch-metric-learning, told that the embeddings have unit norm already."""
    try:
        losses = optional_import("pytorch_metric_learning.losses", extra="bench")
        distances = optional_import("pytorch_metric_learning.distances", extra="bench")
        reducers = optional_import("pytorch_metric_learning.reducers", extra="bench")
    except ImportError as error:
        raise Unavailable(str(error)) from None
    # Its defaults would normalise once more, and leave anchors without loss out of the mean.
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
    # Given the same tensor twice, it takes both sides for one batch and drops the diagonal.
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
    """Bytes of so many [B, B] matrices kept per ordered pair and per node."""

    def kept(case: Case) -> float:
        matrices = per_pair * 2 * case.unordered_pairs + per_node * case.nodes
        # The second order keeps the graph of the first derivative as well.
        factor = 4 if case.mode == SECOND else 1
        return factor * matrices * case.b**2 * DTYPES[case.dtype].itemsize

    return kept


def _pml_bytes(case: Case) -> float:
    """NTXentLoss pairs every positive with all negatives of the batch: cubic in B."""
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

#: The providers of each operation. Layer-wise MCL has two paths of ours: "rows" gives the four
#: terms and takes any weights of them afterwards; "fused" knows the coefficients beforehand.
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


@dataclass(frozen=True)
class Target:
    """What a fast path must reach at a shape (forward + backward, float32, CPU, two threads).

    Attributes:
        eager: times as fast as the eager baseline.
        compiled: times as fast as the compiled baseline.
        memory: MiB of extra memory at most.
    """

    eager: float
    compiled: float
    memory: float


#: By (M, L, B), for D = 128.
TARGETS = {
    (2, 3, 128): Target(40, 15, 8),
    (4, 3, 128): Target(70, 30, 10),
    (2, 4, 512): Target(35, 35, 20),
    (4, 4, 512): Target(45, 45, 32),
    (8, 4, 256): Target(60, 55, 40),
}
#: Times the arithmetic floor at most, for batches of at least 256.
FLOOR_TARGET = 1.6
#: Second order (all three sweeps) over forward + backward, at most.
SECOND_ORDER_TARGET = 4.0


def target(case: Case) -> Target | None:
    """The target of a case, if it has one."""
    fits = case.op == "layerwise_mcl" and case.mode == BOTH and case.device == "cpu"
    if not fits or case.dtype != "float32" or case.d != 128:
        return None
    return TARGETS.get((case.m, case.l, case.b))


def _layerwise_cases(mode: str, shapes: Sequence[tuple[int, int, int]], **kind: Any) -> list[Case]:
    return [Case("layerwise_mcl", mode, *shape, **kind) for shape in shapes]


def _special_cases(batches: Sequence[int], **kind: Any) -> list[Case]:
    return [
        Case(op, BOTH, networks, 1, batch, **kind)
        for op, networks in (("supcon", 1), ("nt_xent", 2), ("info_nce", 2))
        for batch in batches
    ]


#: Shapes (M, L, B) along which time and memory are drawn: against M at two batches, against B.
SWEEP_M = [(m, 1, b) for b in (128, 512) for m in (2, 4, 8, 16)]
SWEEP_B = [(2, 1, b) for b in (64, 128, 256, 512, 1024, 2048)]


#: What :func:`preset` knows: seconds, minutes, the shapes with a goal, against M and B, all of
#: these, on a GPU.
PRESETS = ("smoke", "small", "targets", "sweeps", "paper", "gpu")


def preset(name: str) -> list[Case]:
    """The cases of a preset, without repetition.

    Args:
        name: one of :data:`PRESETS`.

    Raises:
        ValueError: there is no such preset.
    """
    cases: list[Case]
    if name == "smoke":
        cases = [
            Case("layerwise_mcl", mode, 2, 1, 16, 16) for mode in (FORWARD, BOTH, WEIGHTS, SECOND)
        ] + _special_cases([16], d=16)
    elif name == "small":
        cases = [
            *_layerwise_cases(BOTH, [(2, 1, 64), (2, 1, 128), (4, 1, 128), (2, 3, 128)]),
            *_layerwise_cases(FORWARD, [(2, 3, 128)]),
            *_layerwise_cases(WEIGHTS, [(2, 3, 128)]),
            *_layerwise_cases(SECOND, [(2, 3, 128)]),
            *_special_cases([128]),
        ]
    elif name == "targets":
        cases = [
            *_layerwise_cases(BOTH, list(TARGETS)),
            *_layerwise_cases(SECOND, [(2, 3, 128), (4, 3, 128), (2, 4, 512)]),
            *_special_cases([128, 512]),
        ]
    elif name == "sweeps":
        cases = _layerwise_cases(BOTH, [*SWEEP_M, *SWEEP_B])
    elif name == "paper":
        cases = [
            *_layerwise_cases(BOTH, list(TARGETS)),
            *_layerwise_cases(FORWARD, [(2, 3, 128), (2, 4, 512)]),
            *_layerwise_cases(WEIGHTS, [(2, 3, 128), (2, 4, 512)]),
            *_layerwise_cases(SECOND, [(2, 3, 128), (4, 3, 128), (2, 4, 512)]),
            *_layerwise_cases(BOTH, [*SWEEP_M, *SWEEP_B]),
            *_special_cases([64, 128, 256, 512, 1024]),
        ]
    elif name == "gpu":
        shapes = [*TARGETS, (16, 4, 1024), *SWEEP_M, *SWEEP_B]
        cases = [
            *_layerwise_cases(BOTH, shapes, device="cuda"),
            *_layerwise_cases(BOTH, list(TARGETS), device="cuda", dtype="bfloat16"),
            *_layerwise_cases(SECOND, list(TARGETS)[:3], device="cuda"),
            *_special_cases([128, 512, 2048], device="cuda"),
        ]
    else:
        raise unknown_name("preset", name, PRESETS)
    return list(dict.fromkeys(cases))
