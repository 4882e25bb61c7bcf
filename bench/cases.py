"""The cases that can be measured: the providers of every operation, the goals, and the presets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mclfast._base.checks import unknown_name
from mclfast.bench.problem import BOTH, FORWARD, SECOND, WEIGHTS, Case, Inputs
from mclfast.bench.providers import banks, in_batch

#: The providers of each operation.
PROVIDERS = in_batch.PROVIDERS | banks.PROVIDERS


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random inputs of a case."""
    return (banks if case.k else in_batch).make_inputs(case, seed)


def truth(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """The result that the measured call must give, from the reference in float64."""
    return (banks if case.k else in_batch).truth(case, inputs)


@dataclass(frozen=True)
class Target:
    """The goal of a fast path at a shape (forward + backward, float32, CPU, two threads).

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


#: Rows of a bank: on a CPU 64 MiB in float32, more than the caches of one core's share; on a GPU
#: 512 MiB, ten times a large L2 cache and about as many as ImageNet has images.
BANK_ROWS = {"cpu": 2**17, "cuda": 2**20}
#: How many times as fast as the eager baseline, by operation and (M, L, B, K), for D = 128
#: (forward + backward, float32, CPU, two threads).
BANK_TARGETS = {
    ("bank_layerwise_mcl", 2, 4, 8, 8192): 80.0,
    ("bank_layerwise_mcl", 2, 2, 16, 2047): 15.0,
    ("bank_nce", 4, 1, 64, 16384): 10.0,
}
#: Extra memory at these shapes, as a share of the eager baseline's.
BANK_MEMORY_TARGET = 0.02


@dataclass(frozen=True)
class GpuTarget:
    """The goal of a fast path on an NVIDIA H200 (forward + backward, float32).

    Attributes:
        ms: milliseconds at most.
        bandwidth: share of the measured copy bandwidth at which it moves the bytes that must move.
        memory: MiB of extra memory at most.
    """

    ms: float
    bandwidth: float
    memory: float


#: By operation and (M, L, B, K), for D = 128.
BANK_GPU_TARGETS = {("bank_layerwise_mcl", 2, 4, 256, 8192): GpuTarget(2.0, 0.6, 300)}


def _bank_point(case: Case, device: str) -> tuple[str, int, int, int, int] | None:
    """The key of a goal of the memory-bank operations; None for a case without one."""
    plain = not case.shared_negatives and case.n >= BANK_ROWS[device] and case.mode == BOTH
    if not plain or case.device != device or case.d != 128:
        return None
    if (case.dtype, case.bank_dtype) != ("float32", "float32"):
        return None
    return case.op, case.m, case.l, case.b, case.k


def bank_target(case: Case) -> float | None:
    """How many times as fast as the eager baseline a case must be on a CPU, if that is stated."""
    point = _bank_point(case, "cpu")
    return None if point is None else BANK_TARGETS.get(point)


def gpu_target(case: Case) -> GpuTarget | None:
    """The target of a case on a GPU, if it has one."""
    point = _bank_point(case, "cuda")
    return None if point is None else BANK_GPU_TARGETS.get(point)


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


def _bank_case(
    op: str,
    mode: str,
    m: int,
    l: int,  # noqa: E741
    b: int,
    k: int,
    **kind: Any,
) -> Case:
    n = BANK_ROWS[kind.get("device", "cpu")]
    return Case(op, mode, m, l, b, **{"k": k, "n": n, **kind})


def _bank_cases(device: str) -> list[Case]:
    """The shapes with a goal; then the second order, a bank in half precision, shared negatives."""
    if device == "cpu":
        shapes, mcl = list(BANK_TARGETS), (2, 2, 16, 2047)
    else:
        shapes, mcl = [*BANK_GPU_TARGETS, ("bank_nce", 4, 1, 64, 16384)], (2, 4, 256, 8192)
    return [
        *(_bank_case(op, BOTH, *shape, device=device) for op, *shape in shapes),
        _bank_case("bank_layerwise_mcl", SECOND, *mcl, device=device),
        _bank_case("bank_layerwise_mcl", BOTH, *mcl, device=device, bank_dtype="bfloat16"),
        _bank_case("bank_layerwise_mcl", BOTH, *mcl, device=device, shared_negatives=True),
    ]


#: Names that :func:`preset` knows: seconds, minutes, the shapes with a goal, against M and B, all
#: of these; memory banks on a CPU and on a GPU; everything on a GPU.
PRESETS = ("smoke", "small", "targets", "sweeps", "paper", "bank", "bank-gpu", "gpu")


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
        small: dict[str, Any] = {"d": 16, "n": 512}
        cases += [
            _bank_case("bank_layerwise_mcl", mode, 2, 2, 8, 62, **small)
            for mode in (BOTH, WEIGHTS, SECOND)
        ]
        cases += [_bank_case("bank_nce", mode, 3, 1, 8, 63, **small) for mode in (BOTH, SECOND)]
        small |= {"bank_dtype": "bfloat16", "shared_negatives": True}
        cases.append(_bank_case("bank_layerwise_mcl", BOTH, 2, 2, 8, 62, **small))
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
    elif name in ("bank", "bank-gpu"):
        cases = _bank_cases("cpu" if name == "bank" else "cuda")
    elif name == "gpu":
        shapes = [*TARGETS, (16, 4, 1024), *SWEEP_M, *SWEEP_B]
        cases = [
            *_layerwise_cases(BOTH, shapes, device="cuda"),
            *_layerwise_cases(BOTH, list(TARGETS), device="cuda", dtype="bfloat16"),
            *_layerwise_cases(SECOND, list(TARGETS)[:3], device="cuda"),
            *_special_cases([128, 512, 2048], device="cuda"),
            *_bank_cases("cuda"),
        ]
    else:
        raise unknown_name("preset", name, PRESETS)
    return list(dict.fromkeys(cases))
