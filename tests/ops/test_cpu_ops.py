"""The C++ operators of torch.ops.mclfast_cpu against the reference and its autograd.

float64 must agree to rounding. In float32 the error, measured against the reference in float64,
may not exceed 1.5 times that of the reference in float32.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mclfast import mcl_rows
from mclfast.kernels.families import ALL, EACH
from mclfast.losses import reference

if not hasattr(torch.ops.mclfast_cpu, "mcl_rows_forward"):
    pytest.importorskip("mclfast._C", reason="the C++ extension is not built")
if not hasattr(torch.ops.mclfast_cpu, "mcl_rows_forward"):
    pytest.skip("the C++ extension has no CPU operators", allow_module_level=True)

ops = torch.ops.mclfast_cpu

NAMES = ("vcl", "soft_vcl", "icl", "soft_icl")


def library_path() -> str:
    loaded = [path for path in torch.ops.loaded_libraries if "mclfast" in path]
    return loaded[0] if loaded else str(importlib.import_module("mclfast._C").__file__)


# `make asan` and `make tsan` must not test the ordinary build by mistake.
KIND = {"1": "asan", "thread": "tsan"}.get(os.environ.get("MCLFAST_SANITIZE", ""), "")
assert KIND in library_path()


@dataclass
class Case:
    """Arguments of one mcl_rows call; v_nodes and cotangents for the gradients."""

    nodes: Tensor  # [N, B, D]
    labels: Tensor  # [B]
    networks: list[int]
    temperature: float
    kl_temperature: float
    families: int
    row_start: int
    row_count: int
    cotangents: tuple[Tensor, ...]  # [N, R] and three of [N, N, R]
    v_nodes: Tensor  # [N, B, D]

    def to(self, dtype: torch.dtype) -> Case:
        return Case(
            **{
                **self.__dict__,
                "nodes": self.nodes.to(dtype),
                "v_nodes": self.v_nodes.to(dtype),
                "cotangents": tuple(g.to(dtype) for g in self.cotangents),
            }
        )

    @property
    def statics(self) -> tuple[Any, ...]:
        return (
            self.temperature,
            self.kl_temperature,
            self.families,
            self.row_start,
            self.row_count,
        )


def make_case(
    networks: list[int],
    batch: int,
    width: int,
    *,
    classes: int = 5,
    temperature: float = 0.1,
    kl_temperature: float = 3.0,
    families: int = ALL,
    rows: tuple[int, int] | None = None,
    agreement: str = "random",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    count = len(networks)
    noise = {"random": 1.0, "similar": 1e-2, "identical": 0.0}[agreement]
    base = normal(1, batch, width) if agreement != "random" else 0.0
    nodes = torch.nn.functional.normalize(base + noise * normal(count, batch, width), dim=-1)
    # Exact in float32, so that every precision sees the same numbers.
    nodes = nodes.float().double()
    # Class numbers that no array could be indexed with.
    labels = torch.randint(classes, (batch,), generator=generator) * 1_000_003_000_000 - 7
    start, stop = rows or (0, batch)
    r = stop - start
    cotangents = (normal(count, r), *(normal(count, count, r) for _ in range(3)))
    case = Case(
        nodes,
        labels,
        networks,
        temperature,
        kl_temperature,
        families,
        start,
        r,
        tuple(g.float().double() for g in cotangents),
        normal(count, batch, width).float().double(),
    )
    return case.to(dtype)


def reference_rows(case: Case, nodes: Tensor) -> list[Tensor]:
    rows = reference.mcl_rows(
        nodes,
        case.networks,
        case.labels,
        temperature=case.temperature,
        kl_temperature=case.kl_temperature,
        row_start=case.row_start,
        row_count=case.row_count,
    )
    return [
        getattr(rows, name) if case.families & bit else torch.zeros_like(getattr(rows, name))
        for bit, name in zip(EACH, NAMES, strict=True)
    ]


def reference_results(case: Case, second: bool) -> dict[str, Tensor]:
    nodes = case.nodes.clone().requires_grad_()
    cotangents = [g.clone().requires_grad_() for g in case.cotangents]
    rows = reference_rows(case, nodes)
    out = {name: row.detach() for name, row in zip(NAMES, rows, strict=True)}
    total = sum((g * row).sum() for g, row in zip(cotangents, rows, strict=True))
    if not (isinstance(total, Tensor) and total.requires_grad):
        total = nodes.sum() * 0
    (grad,) = torch.autograd.grad(total, nodes, create_graph=second)
    out["grad"] = grad.detach()
    if second and grad.requires_grad:
        inputs = [nodes, *cotangents]
        phi = (case.v_nodes * grad).sum()
        h = torch.autograd.grad(phi, inputs, allow_unused=True)
        for name, value, like in zip(("nodes", *NAMES), h, inputs, strict=True):
            out[f"h_{name}"] = torch.zeros_like(like) if value is None else value
    return out


def op_results(case: Case, second: bool) -> dict[str, Tensor]:
    where = (case.nodes, case.labels, case.networks)
    *rows, lse, kl_lse = ops.mcl_rows_forward(*where, *case.statics)
    out = dict(zip(NAMES, rows, strict=True))
    statics = (*where, lse, kl_lse, *case.statics)
    out["grad"] = ops.mcl_rows_backward(*case.cotangents, *statics)
    if second:
        h = ops.mcl_rows_double_backward(case.v_nodes, *case.cotangents, *statics)
        out.update(zip(("h_nodes", *(f"h_{name}" for name in NAMES)), h, strict=True))
    if case.row_count == case.nodes.shape[1]:
        *fused, fused_lse, fused_kl_lse, grad = ops.mcl_rows_fused(
            *case.cotangents, *where, case.temperature, case.kl_temperature, case.families
        )
        # Forward and fused share their code: equal to the last bit.
        for one, other in zip([*fused, fused_lse, fused_kl_lse], [*rows, lse, kl_lse], strict=True):
            assert torch.equal(one, other)
        # Not rounded to the dtype of the nodes yet.
        grad = grad.to(out["grad"].dtype)
        tolerance = 1e3 * torch.finfo(grad.dtype).eps / case.temperature
        assert relative_error(grad.double(), out["grad"], scale=1.0) < tolerance
    return out


def relative_error(value: Tensor, truth: Tensor, scale: float = 0.0) -> float:
    error = (value.double() - truth.double()).norm().item()
    return error / max(truth.double().norm().item(), scale, 1e-30)


def assert_equal_to_reference(case: Case, tolerance: float = 1e-10) -> None:
    expected, got = reference_results(case, True), op_results(case, True)
    for name, truth in expected.items():
        value = got[name]
        assert value.shape == truth.shape and value.dtype == truth.dtype
        assert torch.isfinite(value).all(), name
        # A gradient that cancels to nothing has no scale of its own.
        error = relative_error(value, truth, scale=1.0)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def assert_as_accurate_as_eager(case: Case, second: bool = True, factor: float = 1.5) -> None:
    """`case` in float64: the truth; both the operators and the reference run in float32."""
    truth = reference_results(case, second)
    eager = reference_results(case.to(torch.float32), second)
    ours = op_results(case.to(torch.float32), second)
    for name, exact in truth.items():
        assert torch.isfinite(ours[name]).all(), name
        # Rounding of a logit, the floor of anything computed from logits in float32.
        floor = 1.2e-7 / case.temperature * exact.numel() ** 0.5 * 0.1
        allowed = factor * (eager[name].double() - exact).norm().item() + floor
        got = (ours[name].double() - exact).norm().item()
        assert got <= allowed, f"{name}: error {got:.3e}, allowed {allowed:.3e}"


SHAPES = [
    pytest.param([0, 1], 1, 4, id="batch-1"),
    pytest.param([0, 1], 2, 1, id="2x1"),
    pytest.param([0, 0, 1, 1], 7, 7, id="7x7"),
    pytest.param([0, 0, 1, 1, 1, 2], 17, 5, id="uneven-stages"),
    pytest.param([3, 0, 3, -1], 33, 9, id="unordered-networks"),
    pytest.param([0, 1], 70, 128, id="70x128"),
    pytest.param([0], 19, 3, id="one-node"),
    pytest.param([5, 5, 5], 19, 3, id="one-network"),
]


@pytest.mark.parametrize("networks, batch, width", SHAPES)
def test_float64_rows_and_both_orders(networks: list[int], batch: int, width: int) -> None:
    assert_equal_to_reference(make_case(networks, batch, width))


@pytest.mark.parametrize("kl_temperature", [1.0, 2.0, 2.5, 3.0, 4.0, 0.5, 20.0])
@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.07])
def test_float64_temperatures(temperature: float, kl_temperature: float) -> None:
    case = make_case([0, 0, 1, 2], 21, 6, temperature=temperature, kl_temperature=kl_temperature)
    assert_equal_to_reference(case)


@pytest.mark.parametrize("temperature", [0.02, 0.005, 1e-3])
@pytest.mark.parametrize("kl_temperature", [1.0, 3.0])
def test_float64_sharp_temperatures(temperature: float, kl_temperature: float) -> None:
    case = make_case([0, 1, 1], 21, 6, temperature=temperature, kl_temperature=kl_temperature)
    assert_equal_to_reference(case, 1e-9)


@pytest.mark.parametrize("families", range(1, 16))
@pytest.mark.parametrize("temperature", [0.1, 1e-3], ids=["tiles", "bands"])
def test_families(families: int, temperature: float) -> None:
    assert_equal_to_reference(
        make_case([0, 0, 1, 2], 13, 5, families=families, temperature=temperature), 1e-9
    )


@pytest.mark.parametrize("classes", [1, 2, 1000])
def test_class_sizes(classes: int) -> None:
    """One class, two, and nothing but classes of one sample."""
    case = make_case([0, 1, 1], 23, 6, classes=classes)
    assert_equal_to_reference(case)
    if classes == 1000:
        got = op_results(case, False)
        assert got["vcl"].count_nonzero() == 0 and got["icl"].count_nonzero() == 0


@pytest.mark.parametrize("agreement", ["similar", "identical"])
def test_float64_agreeing_networks(agreement: str) -> None:
    assert_equal_to_reference(make_case([0, 0, 1, 1], 23, 6, agreement=agreement))


def test_embeddings_need_not_be_unit_norm() -> None:
    case = make_case([0, 0, 1], 19, 6)
    case.nodes *= torch.linspace(0.01, 30, 19, dtype=torch.float64)[:, None]
    assert_equal_to_reference(case, 1e-9)


@pytest.mark.parametrize("rows", [(0, 1), (0, 9), (5, 12), (22, 23), (4, 4)])
def test_row_slice(rows: tuple[int, int]) -> None:
    assert_equal_to_reference(make_case([0, 0, 1, 2], 23, 6, rows=rows))


def test_slices_add_up_to_the_whole() -> None:
    whole = make_case([0, 1, 1], 29, 8)
    expected = op_results(whole, True)
    parts = []
    for start, stop in [(0, 10), (10, 11), (11, 29)]:
        cotangents = tuple(g[..., start:stop] for g in whole.cotangents)
        part = Case(**{**whole.__dict__, "cotangents": cotangents})
        part.row_start, part.row_count = start, stop - start
        parts.append(op_results(part, True))
    for name, value in expected.items():
        pieces = [part[name] for part in parts]
        adds = name in ("grad", "h_nodes")
        got = torch.stack(pieces).sum(0) if adds else torch.cat(pieces, -1)
        assert relative_error(got, value) < 1e-12, name


@pytest.mark.parametrize("agreement", ["random", "similar", "identical"])
@pytest.mark.parametrize(
    "networks, batch, width", [([0, 0, 1, 1], 128, 128), ([0, 1, 1], 77, 33), ([0, 1, 1], 48, 7)]
)
@pytest.mark.parametrize("temperature", [0.1, 0.07, 0.02, 0.005, 1e-3])
def test_float32_is_as_accurate_as_eager(
    networks: list[int], batch: int, width: int, temperature: float, agreement: str
) -> None:
    assert_as_accurate_as_eager(
        make_case(networks, batch, width, temperature=temperature, agreement=agreement, classes=10)
    )


@pytest.mark.parametrize("kl_temperature", [1.0, 2.5, 4.0])
@pytest.mark.parametrize("rows", [None, (30, 70)], ids=["tiles", "bands"])
def test_float32_kl_temperatures(kl_temperature: float, rows: tuple[int, int] | None) -> None:
    assert_as_accurate_as_eager(
        make_case([0, 0, 1], 96, 64, kl_temperature=kl_temperature, rows=rows)
    )


def test_float32_large_batch() -> None:
    assert_as_accurate_as_eager(make_case([0, 1], 512, 128, classes=100))


def test_float32_few_classes() -> None:
    assert_as_accurate_as_eager(make_case([0, 1], 512, 64, classes=2))


@pytest.mark.parametrize("temperature", [0.1, 1e-3, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_antipodal_embeddings_stay_finite(temperature: float, dtype: torch.dtype) -> None:
    case = make_case([0, 1], 6, 3, temperature=temperature, dtype=dtype, classes=2)
    case.nodes[:, 1::2] = -case.nodes[:, ::2]
    for name, value in op_results(case, True).items():
        assert torch.isfinite(value).all(), name


def test_opposite_networks_stay_finite() -> None:
    """Similarities of 1 one way and -1 the other: sums that differ by a factor of exp(100)."""
    e = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]]])
    found, want = (
        mcl_rows(e[:, None], torch.zeros(2).long(), temperature=0.02, kl_temperature=1.0, **backend)
        for backend in ({"backend": "cpu"}, {"backend": "reference"})
    )
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_inside(dtype: torch.dtype) -> None:
    case = make_case([0, 0, 1], 40, 32, dtype=torch.float32)
    case.nodes = case.nodes.to(dtype)
    expected = op_results(Case(**{**case.__dict__, "nodes": case.nodes.float()}), True)
    got = op_results(case, True)
    for name, value in expected.items():
        wanted = dtype if name in ("grad", "h_nodes") else torch.float32
        assert got[name].dtype == wanted, name
        assert torch.equal(got[name], value.to(wanted)), name


def test_strided_arguments() -> None:
    case = make_case([0, 1, 1], 12, 6)
    expected = op_results(case, True)
    strided = Case(**case.__dict__)
    strided.nodes = case.nodes.transpose(0, 1).contiguous().transpose(0, 1)
    strided.v_nodes = case.v_nodes.transpose(1, 2).contiguous().transpose(1, 2)
    strided.labels = case.labels.to(torch.int64).repeat_interleave(2)[::2]
    strided.cotangents = tuple(
        g.transpose(0, -1).contiguous().transpose(0, -1) for g in case.cotangents
    )
    for name, value in op_results(strided, True).items():
        assert torch.equal(value, expected[name]), name


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("temperature", [0.1, 1e-3], ids=["tiles", "bands"])
def test_thread_counts_agree_and_runs_repeat(threads: Any, temperature: float) -> None:
    case = make_case([0, 0, 1, 1, 2], 45, 24, temperature=temperature, dtype=torch.float32)
    results = []
    for count in (1, 2, 4):
        threads(count)
        first, again = op_results(case, True), op_results(case, True)
        for name, value in first.items():
            assert torch.equal(value, again[name]), f"{name} with {count} threads"
        results.append(first)
    for other in results[1:]:
        for name, value in results[0].items():
            assert relative_error(other[name], value) < 2e-5, name


CAPABILITY_SCRIPT = """
import sys, torch
torch.ops.load_library(sys.argv[1])
ops = torch.ops.mclfast_cpu
saved = torch.load(sys.argv[2])
where = (saved["nodes"], saved["labels"], saved["networks"])
*rows, lse, kl_lse = ops.mcl_rows_forward(*where, *saved["statics"])
rest = (*saved["cotangents"], *where, lse, kl_lse, *saved["statics"])
out = [*rows, ops.mcl_rows_backward(*rest), *ops.mcl_rows_double_backward(saved["v"], *rest)]
torch.save((ops.capability(), out), sys.argv[3])
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.1, 1e-3], ids=["tiles", "bands"])
def test_instruction_sets_agree(tmp_path: Any, dtype: torch.dtype, temperature: float) -> None:
    case = make_case([0, 0, 1], 37, 21, dtype=dtype, temperature=temperature)
    torch.save(
        {
            "nodes": case.nodes,
            "labels": case.labels,
            "networks": case.networks,
            "statics": case.statics,
            "cotangents": case.cotangents,
            "v": case.v_nodes,
        },
        tmp_path / "case.pt",
    )
    expected = op_results(case, True)
    tolerance = (1e-5 if dtype == torch.float32 else 1e-13) / temperature
    for capability in ("default", "avx2", "avx512"):
        run = subprocess.run(
            [
                sys.executable,
                "-c",
                CAPABILITY_SCRIPT,
                library_path(),
                tmp_path / "case.pt",
                tmp_path / "out.pt",
            ],
            env={**os.environ, "MCLFAST_CPU_CAPABILITY": capability},
            capture_output=True,
            text=True,
        )
        if run.returncode and "MCLFAST_CPU_CAPABILITY" in run.stderr and capability != "default":
            continue  # not a processor of that kind
        assert run.returncode == 0, run.stderr
        name, got = torch.load(tmp_path / "out.pt")
        assert name == capability
        for value, wanted in zip(got, expected.values(), strict=True):
            assert relative_error(value, wanted, scale=1.0) < tolerance


def test_unknown_capability_is_refused() -> None:
    code = "import sys, torch; torch.ops.load_library(sys.argv[1]); "
    code += "torch.ops.mclfast_cpu.capability()"
    run = subprocess.run(
        [sys.executable, "-c", code, library_path()],
        env={**os.environ, "MCLFAST_CPU_CAPABILITY": "mmx"},
        capture_output=True,
        text=True,
    )
    assert "default, avx2 or avx512" in run.stderr and "got mmx" in run.stderr


def test_large_batches_use_bands() -> None:
    """A batch whose [B, B] logits are too large to keep agrees with the sum of its slices."""
    whole = make_case([0, 1], 3000, 4, classes=300, dtype=torch.float32)
    got = op_results(whole, False)
    part = Case(**{**whole.__dict__, "row_start": 1000, "row_count": 7})
    part.cotangents = tuple(g[..., 1000:1007].contiguous() for g in whole.cotangents)
    expected = reference_results(part.to(torch.float64), False)
    for name in NAMES:
        assert relative_error(got[name][..., 1000:1007], expected[name]) < 1e-5, name


BAD_CALLS = {
    "nodes must be [N, B, D]": {"nodes": torch.randn(8, 4)},
    "nodes must be float16, bfloat16, float32 or float64": {
        "nodes": torch.ones(2, 8, 4, dtype=torch.int64)
    },
    "labels must be [B]=[8]": {"labels": torch.zeros(7, dtype=torch.int64)},
    "labels must be integers, got Float": {"labels": torch.zeros(8)},
    "networks must name the network of each of the 2 nodes, got 3": {"networks": [0, 1, 2]},
    "temperature must be finite and positive, got 0": {"temperature": 0.0},
    "kl_temperature must be finite and positive, got -1": {"kl_temperature": -1.0},
    "families must be a bit mask in 1 .. 15, got 16": {"families": 16},
    "row_start must be in 0 .. 8, got 9": {"row_start": 9},
    "row_count must be in 0 .. 5 for row_start 3, got 6": {"row_start": 3, "row_count": 6},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_argument_errors(message: str) -> None:
    arguments: dict[str, Any] = {
        "nodes": torch.randn(2, 8, 4),
        "labels": torch.zeros(8, dtype=torch.int64),
        "networks": [0, 1],
        "temperature": 0.1,
        "kl_temperature": 3.0,
        "families": ALL,
        "row_start": 0,
        "row_count": 8,
    }
    with pytest.raises(RuntimeError) as error:
        ops.mcl_rows_forward(**{**arguments, **BAD_CALLS[message]})
    assert message in str(error.value)


def test_cotangent_shapes_are_checked() -> None:
    case = make_case([0, 1], 8, 4)
    case.cotangents = (*case.cotangents[:2], case.cotangents[2][:, :1], case.cotangents[3])
    with pytest.raises(RuntimeError, match=r"g_icl must be \[2, 2, 8\], got \[2, 1, 8\]"):
        op_results(case, False)


def info_nce_rows(a: Tensor, b: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    logits = reference.similarity_logits(reference.wide(a), reference.wide(b), temperature)
    return logits.logsumexp(1), logits.logsumexp(0), logits.diagonal()


def info_nce_inputs(batch: int, width: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(batch)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float().double()

    embeddings = [torch.nn.functional.normalize(normal(batch, width), dim=-1) for _ in range(2)]
    embeddings = [e.float().double() for e in embeddings]
    return (embeddings, [normal(batch) for _ in range(3)], [normal(batch, width) for _ in range(2)])


def info_nce_reference(
    inputs: tuple[list[Tensor], list[Tensor], list[Tensor]], temperature: float
) -> list[Tensor]:
    embeddings, cotangents, tangents = inputs
    a, b = (e.clone().requires_grad_() for e in embeddings)
    g = [c.clone().requires_grad_() for c in cotangents]
    rows = info_nce_rows(a, b, temperature)
    total = sum((c * row).sum() for c, row in zip(g, rows, strict=True))
    grads = torch.autograd.grad(total, [a, b], create_graph=True)
    phi = sum((v * grad).sum() for v, grad in zip(tangents, grads, strict=True))
    h = torch.autograd.grad(phi, [a, b, *g])
    return [x.detach() for x in (*rows, *grads, *h)]


def info_nce_ops(
    inputs: tuple[list[Tensor], list[Tensor], list[Tensor]], temperature: float
) -> list[Tensor]:
    (a, b), g, v = inputs
    rows = ops.info_nce_forward(a, b, temperature)
    rest = (*g, a, b, rows[0], rows[1], temperature)
    return [*rows, *ops.info_nce_backward(*rest), *ops.info_nce_double_backward(*v, *rest)]


@pytest.mark.parametrize("temperature", [0.1, 0.005, 1e-3])
@pytest.mark.parametrize("batch, width", [(1, 3), (2, 1), (7, 7), (65, 33), (130, 128)])
def test_info_nce(batch: int, width: int, temperature: float) -> None:
    inputs = info_nce_inputs(batch, width)
    truth = info_nce_reference(inputs, temperature)
    for value, exact in zip(info_nce_ops(inputs, temperature), truth, strict=True):
        assert relative_error(value, exact, scale=1.0) < 1e-9
    if batch < 10:
        return  # too few numbers to compare the errors of two computations
    single = tuple([x.float() for x in group] for group in inputs)
    eager, ours = info_nce_reference(single, temperature), info_nce_ops(single, temperature)
    for value, plain, exact in zip(ours, eager, truth, strict=True):
        floor = 1.2e-8 / temperature * exact.numel() ** 0.5
        allowed = 1.5 * (plain.double() - exact).norm().item() + floor
        assert (value.double() - exact).norm().item() <= allowed


def test_info_nce_repeats_and_half_precision() -> None:
    inputs = info_nce_inputs(65, 16)
    single = tuple([x.float() for x in group] for group in inputs)
    for one, other in zip(info_nce_ops(single, 0.1), info_nce_ops(single, 0.1), strict=True):
        assert torch.equal(one, other)
    (a, b), g, _ = single
    row_lse, col_lse, _ = ops.info_nce_forward(a.bfloat16(), b.bfloat16(), 0.1)
    grads = ops.info_nce_backward(*g, a.bfloat16(), b.bfloat16(), row_lse, col_lse, 0.1)
    assert row_lse.dtype == torch.float32
    assert all(grad.dtype == torch.bfloat16 for grad in grads)


def test_info_nce_errors() -> None:
    with pytest.raises(RuntimeError, match=r"b must be \[4, 3\], got \[5, 3\]"):
        ops.info_nce_forward(torch.randn(4, 3), torch.randn(5, 3), 0.1)
