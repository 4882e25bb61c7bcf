"""The memory-bank operators of torch.ops.mclfast_cpu against literal loops and their autograd.

float64 must agree to rounding. In float32 the error, measured against the literal form in float64,
may not exceed twice that of the literal form in float32.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import literal_bank
from mclfast.kernels.families import ALL, SOFT_ICL, SOFT_VCL

if not hasattr(torch.ops.mclfast_cpu, "bank_mcl_forward"):
    pytest.importorskip("mclfast._C", reason="the C++ extension is not built")
if not hasattr(torch.ops.mclfast_cpu, "bank_mcl_forward"):
    pytest.skip("the C++ extension has no memory-bank operators", allow_module_level=True)

ops = torch.ops.mclfast_cpu

NAMES = ("vcl", "soft_vcl", "icl", "soft_icl")
GRADIENTS = ("h_nodes", *(f"h_{name}" for name in NAMES))


def library_path() -> str:
    loaded = [path for path in torch.ops.loaded_libraries if "mclfast" in path]
    return loaded[0] if loaded else str(importlib.import_module("mclfast._C").__file__)


# `make asan` and `make tsan` must not test the ordinary build by mistake.
KIND = {"1": "asan", "thread": "tsan"}.get(os.environ.get("MCLFAST_SANITIZE", ""), "")
assert KIND in library_path()


@dataclass
class Case:
    """Arguments of one bank_mcl call; v_nodes and cotangents for the gradients."""

    nodes: Tensor  # [N, B, D]
    banks: Tensor  # [M, n, D]
    pos_idx: Tensor  # [B, 1 + P]
    neg_idx: Tensor  # [B, K]
    networks: list[int]
    temperature: float
    kl_temperature: float
    families: int
    cotangents: tuple[Tensor, ...]
    v_nodes: Tensor  # [N, B, D]

    def to(self, dtype: torch.dtype) -> Case:
        return replace(
            self,
            nodes=self.nodes.to(dtype),
            banks=self.banks.to(dtype),
            v_nodes=self.v_nodes.to(dtype),
            cotangents=tuple(g.to(dtype) for g in self.cotangents),
        )

    @property
    def where(self) -> tuple[Any, ...]:
        return (self.nodes, self.banks, self.pos_idx, self.neg_idx, self.networks)

    @property
    def statics(self) -> tuple[Any, ...]:
        return (self.temperature, self.kl_temperature, self.families)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    # Exact in float32, so that every precision sees the same numbers.
    return torch.randn(*shape, generator=generator, dtype=torch.float64).float().double()


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1).float().double()


def make_case(
    networks: list[int],
    batch: int,
    width: int,
    positives: int,
    negatives: int,
    *,
    samples: int = 50,
    temperature: float = 0.1,
    kl_temperature: float = 3.0,
    families: int = ALL,
    shared: bool = False,
    agreement: float = 0.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    count, members = len(networks), max(networks) + 1

    def keys(rows: int, columns: int) -> Tensor:
        return torch.randint(samples, (rows, columns), generator=generator)

    base, bank_base = normal(generator, 1, batch, width), normal(generator, 1, samples, width)
    nodes = unit(agreement * base + (1 - agreement) * normal(generator, count, batch, width))
    banks = unit(
        agreement * bank_base + (1 - agreement) * normal(generator, members, samples, width)
    )
    negative_keys = keys(1, negatives).expand(batch, -1) if shared else keys(batch, negatives)
    shapes = [(count,), (count, count), (members, count), (count, count)]
    return Case(
        nodes,
        banks,
        keys(batch, 1 + positives),
        negative_keys,
        networks,
        temperature,
        kl_temperature,
        families,
        tuple(normal(generator, *shape, batch) for shape in shapes),
        normal(generator, count, batch, width),
    ).to(dtype)


def literal_results(case: Case, second: bool = True) -> dict[str, Tensor]:
    nodes = case.nodes.clone().requires_grad_()
    cotangents = [g.clone().requires_grad_() for g in case.cotangents]
    out = literal_bank.mcl_rows(nodes, *case.where[1:], *case.statics)
    total = sum((g * out[name]).sum() for g, name in zip(cotangents, NAMES, strict=True))
    results = {name: value.detach() for name, value in out.items()}
    assert isinstance(total, Tensor)
    (grad,) = torch.autograd.grad(total + 0 * nodes.sum(), nodes, create_graph=second)
    results["grad"] = grad.detach()
    if second:
        inputs = [nodes, *cotangents]
        # The zeros keep every input in the graph.
        phi = (case.v_nodes * grad).sum() + sum(0 * x.sum() for x in inputs)
        results.update(zip(GRADIENTS, torch.autograd.grad(phi, inputs), strict=True))
    return results


def op_results(case: Case) -> dict[str, Tensor]:
    *rows, lse, kl_lse = ops.bank_mcl_forward(*case.where, *case.statics)
    out = dict(zip((*NAMES, "lse", "kl_lse"), (*rows, lse, kl_lse), strict=True))
    rest = (*case.cotangents, *case.where, lse, kl_lse, *case.statics)
    out["grad"] = ops.bank_mcl_backward(*rest)
    h = ops.bank_mcl_double_backward(case.v_nodes, *rest)
    out.update(zip(GRADIENTS, h, strict=True))
    *fused, grad = ops.bank_mcl_fused(*case.cotangents, *case.where, *case.statics)
    # Forward and fused share their code: equal to the last bit.
    for one, other in zip(fused, [*rows, lse, kl_lse], strict=True):
        assert torch.equal(one, other)
    # Not rounded to the dtype of the nodes yet.
    grad = grad.to(out["grad"].dtype)
    tolerance = 100 * torch.finfo(grad.dtype).eps / case.temperature
    assert relative_error(grad, out["grad"], scale=1.0) < tolerance
    return out


def relative_error(value: Tensor, truth: Tensor, scale: float = 0.0) -> float:
    error = (value.double() - truth.double()).norm().item()
    return error / max(truth.double().norm().item(), scale, 1e-30)


def assert_equal_to_literal(case: Case, tolerance: float = 1e-10) -> None:
    expected, got = literal_results(case), op_results(case)
    for name, truth in expected.items():
        value = got[name]
        assert value.shape == truth.shape and value.dtype == truth.dtype, name
        assert torch.isfinite(value).all(), name
        # A gradient that cancels to nothing has no scale of its own.
        error = relative_error(value, truth, scale=1.0)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def assert_as_accurate_as_eager(case: Case, factor: float = 2.0) -> None:
    """`case` in float64: the truth; the operators and the literal form run in float32."""
    truth = literal_results(case)
    eager, ours = literal_results(case.to(torch.float32)), op_results(case.to(torch.float32))
    for name, exact in truth.items():
        assert torch.isfinite(ours[name]).all(), name
        # Rounding of a logit, the floor of anything computed from logits in float32.
        floor = 1.2e-7 / case.temperature * exact.numel() ** 0.5 * 0.1
        allowed = factor * (eager[name].double() - exact).norm().item() + floor
        got = (ours[name].double() - exact).norm().item()
        assert got <= allowed, f"{name}: error {got:.3e}, allowed {allowed:.3e}"


SHAPES = [
    pytest.param([0, 1], 1, 7, 0, 1, id="one-sample-one-negative"),
    pytest.param([0, 0, 1, 1], 3, 7, 2, 9, id="two-networks"),
    pytest.param([0, 1, 1, 1, 2, 2], 2, 5, 1, 70, id="uneven-stages"),
    pytest.param([0, 0, 1, 1], 2, 33, 70, 130, id="several-tiles"),
    pytest.param([0, 1], 2, 4, 3, 600, id="several-chunks"),
    pytest.param([0, 0], 3, 6, 2, 5, id="one-network"),
    pytest.param([0, 2], 3, 6, 0, 5, id="bank-without-node"),
    pytest.param([0, 0, 0, 0, 0, 1], 2, 64, 0, 63, id="64-keys"),
]


@pytest.mark.parametrize("networks, batch, width, positives, negatives", SHAPES)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_float64_rows_and_both_orders(
    networks: list[int], batch: int, width: int, positives: int, negatives: int, shared: bool
) -> None:
    assert_equal_to_literal(make_case(networks, batch, width, positives, negatives, shared=shared))


@pytest.mark.parametrize("kl_temperature", [1.0, 2.5, 4.0, 0.5])
@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.01, 1e-3])
def test_float64_temperatures(temperature: float, kl_temperature: float) -> None:
    case = make_case(
        [0, 0, 1, 2], 2, 6, 2, 21, temperature=temperature, kl_temperature=kl_temperature
    )
    assert_equal_to_literal(case, 1e-10 / min(1.0, 10 * temperature))


@pytest.mark.parametrize("families", range(1, 16))
@pytest.mark.parametrize("networks", [[0, 0, 1, 1, 2], [0, 0]], ids=["three", "one"])
def test_families(families: int, networks: list[int]) -> None:
    assert_equal_to_literal(make_case(networks, 2, 5, 1, 13, families=families))


def test_embeddings_need_not_be_unit_norm() -> None:
    case = make_case([0, 0, 1], 5, 6, 2, 19)
    case.nodes *= torch.linspace(0.01, 30, 5, dtype=torch.float64)[:, None]
    assert_equal_to_literal(case, 1e-9)


def test_repeated_keys_are_ordinary_keys() -> None:
    case = make_case([0, 1], 4, 6, 3, 17)
    case.neg_idx[:, 5:] = case.neg_idx[:, :1]
    case.pos_idx[:, 2:] = case.pos_idx[:, :1]
    case.neg_idx[:, 1] = case.pos_idx[:, 0]
    assert_equal_to_literal(case)


def test_identical_networks_have_no_soft_rows_and_gradients() -> None:
    case = make_case(
        [0, 1], 3, 8, 2, 40, agreement=1.0, families=SOFT_VCL | SOFT_ICL, dtype=torch.float32
    )
    got = op_results(case)
    for name in ("soft_vcl", "soft_icl", "grad"):
        assert got[name].abs().max() < 1e-5, name


@pytest.mark.parametrize("agreement", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("temperature", [0.1, 0.07, 0.01, 1e-3])
def test_float32_is_as_accurate_as_eager(temperature: float, agreement: float) -> None:
    case = make_case(
        [0, 0, 1], 24, 128, 2, 300, samples=500, temperature=temperature, agreement=agreement
    )
    assert_as_accurate_as_eager(case)


@pytest.mark.parametrize("temperature", [0.1, 0.01, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opposite_embeddings_stay_finite(temperature: float, dtype: torch.dtype) -> None:
    case = make_case([0, 1], 4, 3, 1, 8, temperature=temperature, dtype=dtype)
    case.banks[:, ::2] = case.nodes[:1, :1]
    case.banks[:, 1::2] = -case.nodes[:1, :1]
    case.nodes[1] = -case.nodes[0]
    for name, value in op_results(case).items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bank_types_are_exact(dtype: torch.dtype) -> None:
    """A bank of another type gives what its values in float32 give."""
    case = make_case([0, 0, 1], 3, 37, 2, 70, dtype=torch.float32)
    case.banks[0, 0, :4] = torch.tensor([0.0, -0.0, 6e-8, 1.5])  # with subnormals of half
    case.pos_idx[:, 0] = 0
    narrow = case.banks.to(dtype)
    expected = op_results(replace(case, banks=narrow.float()))
    for name, value in op_results(replace(case, banks=narrow)).items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name]), name


def test_float64_nodes_with_a_float32_bank() -> None:
    case = make_case([0, 0, 1], 3, 9, 2, 30)
    got = op_results(replace(case, banks=case.banks.float()))
    for name, truth in literal_results(case).items():
        assert got[name].dtype == torch.float64
        assert relative_error(got[name], truth, scale=1.0) < 1e-10, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_nodes_are_float32_inside(dtype: torch.dtype) -> None:
    case = make_case([0, 0, 1], 3, 32, 2, 40, dtype=torch.float32)
    case.nodes = case.nodes.to(dtype)
    expected = op_results(replace(case, nodes=case.nodes.float()))
    for name, value in op_results(case).items():
        wanted = dtype if name in ("grad", "h_nodes") else torch.float32
        assert value.dtype == wanted, name
        assert torch.equal(value, expected[name].to(wanted)), name


@pytest.mark.parametrize("batch", [1, 7, 19])
def test_shared_negatives_equal_repeated_ones(batch: int) -> None:
    case = make_case([0, 0, 1, 1], batch, 24, 2, 150, shared=True, dtype=torch.float32)
    assert case.neg_idx.stride(0) == 0 or batch == 1
    repeated = op_results(replace(case, neg_idx=case.neg_idx.clone()))
    for name, value in op_results(case).items():
        assert relative_error(value, repeated[name], scale=1e-3) < 1e-5, name


def test_strided_arguments() -> None:
    case = make_case([0, 1, 1], 6, 10, 2, 20)
    expected = op_results(case)
    wide = torch.full((6, 40), 10**9)
    wide[:, 3:6], wide[:, 7:27] = case.pos_idx, case.neg_idx
    strided = replace(
        case,
        nodes=case.nodes.transpose(0, 1).contiguous().transpose(0, 1),
        v_nodes=case.v_nodes.transpose(1, 2).contiguous().transpose(1, 2),
        pos_idx=wide[:, 3:6],
        neg_idx=wide[:, 7:27],
        cotangents=tuple(g.transpose(0, -1).contiguous().transpose(0, -1) for g in case.cotangents),
    )
    for name, value in op_results(strided).items():
        assert torch.equal(value, expected[name]), name


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_results_do_not_depend_on_threads(threads: Any, shared: bool) -> None:
    case = make_case([0, 0, 1, 1, 2], 11, 24, 2, 200, shared=shared, dtype=torch.float32)
    threads(1)
    expected = op_results(case)
    for count in (1, 2, 4):
        threads(count)
        for name, value in op_results(case).items():
            assert torch.equal(value, expected[name]), f"{name} with {count} threads"


CAPABILITY_SCRIPT = """
import sys, torch
torch.ops.load_library(sys.argv[1])
ops = torch.ops.mclfast_cpu
case = torch.load(sys.argv[2])
*rows, lse, kl_lse = ops.bank_mcl_forward(*case["where"], *case["statics"])
rest = (*case["cotangents"], *case["where"], lse, kl_lse, *case["statics"])
out = [*rows, lse, kl_lse, ops.bank_mcl_backward(*rest)]
out += ops.bank_mcl_double_backward(case["v_nodes"], *rest)
out += ops.bank_nce_fused(*case["nce"], 0.1, 1e-7)
torch.save((ops.capability(), out), sys.argv[3])
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_instruction_sets_agree(tmp_path: Any, dtype: torch.dtype) -> None:
    case = make_case([0, 0, 1], 3, 21, 2, 70, dtype=dtype)
    case.banks = case.banks.half()
    nce = (case.nodes[1:], case.banks, case.pos_idx[:, :1], case.neg_idx, torch.zeros(2, 2))
    saved = {"where": case.where, "statics": case.statics, "cotangents": case.cotangents}
    torch.save({**saved, "v_nodes": case.v_nodes, "nce": nce}, tmp_path / "case.pt")
    expected = [*op_results(case).values(), *ops.bank_nce_fused(*nce, 0.1, 1e-7)]
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    for capability in ("default", "avx2", "avx512"):
        files = [tmp_path / "case.pt", tmp_path / "out.pt"]
        run = subprocess.run(
            [sys.executable, "-c", CAPABILITY_SCRIPT, library_path(), *files],
            env={**os.environ, "MCLFAST_CPU_CAPABILITY": capability},
            capture_output=True,
            text=True,
        )
        if run.returncode and "MCLFAST_CPU_CAPABILITY" in run.stderr and capability != "default":
            continue  # not a processor of that kind
        assert run.returncode == 0, run.stderr
        name, got = torch.load(files[1])
        assert name == capability
        for value, wanted in zip(got, expected, strict=True):
            assert relative_error(value, wanted, scale=1.0) < tolerance


@dataclass
class NceCase:
    nodes: Tensor
    banks: Tensor
    pos_idx: Tensor
    neg_idx: Tensor
    log_normalizer: Tensor
    temperature: float
    eps: float
    v_nodes: Tensor

    @property
    def keys(self) -> tuple[Tensor, ...]:
        return (self.nodes, self.banks, self.pos_idx, self.neg_idx)

    @property
    def statics(self) -> tuple[Any, ...]:
        return (self.log_normalizer, self.temperature, self.eps)


def make_nce_case(
    members: int,
    batch: int,
    width: int,
    negatives: int,
    *,
    samples: int = 60,
    temperature: float = 0.07,
    eps: float = 1e-7,
    shared: bool = False,
    dtype: torch.dtype = torch.float64,
) -> NceCase:
    case = make_case(
        list(range(members)), batch, width, 0, negatives, samples=samples, shared=shared
    ).to(dtype)
    generator = torch.Generator().manual_seed(1)
    log_normalizer = normal(generator, members, members) + 5
    return NceCase(*case.where[:4], log_normalizer.to(dtype), temperature, eps, case.v_nodes)


def literal_nce(case: NceCase) -> dict[str, Tensor]:
    nodes = case.nodes.clone().requires_grad_()
    out = literal_bank.nce_rows(nodes, *case.keys[1:], *case.statics)
    loss = out.rows.sum() / nodes.shape[1] + 0 * nodes.sum()
    (grad,) = torch.autograd.grad(loss, nodes, create_graph=True)
    phi = (case.v_nodes * grad).sum() + 0 * nodes.sum()
    (h_nodes,) = torch.autograd.grad(phi, nodes)
    return {
        "lse": out.lse.detach(),
        "rows": out.rows.detach(),
        "grad": grad.detach(),
        "h_nodes": h_nodes,
    }


def op_nce(case: NceCase) -> dict[str, Tensor]:
    rows, grad = ops.bank_nce_fused(*case.keys, *case.statics)
    return {
        "lse": ops.bank_nce_lse(*case.keys, case.temperature),
        "rows": rows,
        "grad": grad,
        "h_nodes": ops.bank_nce_double_backward(case.v_nodes, *case.keys, *case.statics),
    }


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize(
    "members, batch, width, negatives", [(2, 3, 7, 1), (3, 2, 16, 70), (1, 2, 4, 3), (4, 9, 33, 20)]
)
def test_nce_float64(members: int, batch: int, width: int, negatives: int, shared: bool) -> None:
    case = make_nce_case(members, batch, width, negatives, shared=shared)
    expected = literal_nce(case)
    for name, value in op_nce(case).items():
        assert value.shape == expected[name].shape
        assert relative_error(value, expected[name], scale=1.0) < 1e-10, name


@pytest.mark.parametrize("eps", [0.0, 1e-7, 0.5])
@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.02])
def test_nce_settings(temperature: float, eps: float) -> None:
    case = make_nce_case(3, 2, 8, 30, temperature=temperature, eps=eps)
    expected = literal_nce(case)
    for name, value in op_nce(case).items():
        assert relative_error(value, expected[name], scale=1.0) < 1e-10, name


@pytest.mark.parametrize("samples", [60, 100_000])
def test_nce_float32_is_as_accurate_as_eager(samples: int) -> None:
    case = make_nce_case(3, 2, 64, 2000, samples=samples)
    # Normaliser of the size that makes most negatives certain.
    case.log_normalizer = case.log_normalizer + 4
    single = NceCase(
        *(
            x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in case.__dict__.values()
        )
    )
    truth, eager, ours = literal_nce(case), literal_nce(single), op_nce(single)
    for name, exact in truth.items():
        floor = 1.2e-7 / case.temperature * exact.norm().item() * 0.1
        allowed = 2 * (eager[name].double() - exact).norm().item() + floor
        assert (ours[name].double() - exact).norm().item() <= allowed, name


def test_nce_sharp_temperature_stays_finite() -> None:
    case = make_nce_case(2, 3, 8, 30, temperature=1e-3, dtype=torch.float32)
    for name, value in op_nce(case).items():
        assert torch.isfinite(value).all(), name


def test_nce_does_not_depend_on_threads(threads: Any) -> None:
    case = make_nce_case(3, 7, 16, 100, dtype=torch.float32)
    threads(1)
    expected = op_nce(case)
    threads(2)
    for name, value in op_nce(case).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_bank_update(dtype: torch.dtype, momentum: float) -> None:
    generator = torch.Generator().manual_seed(0)
    banks = unit(normal(generator, 3, 20, 9)).to(dtype)
    embeddings = unit(normal(generator, 3, 6, 9)).to(dtype)
    index = torch.tensor([4, 19, 4, 0, 19, 4])
    expected = literal_bank.update(banks, index, embeddings, momentum)
    version = banks._version
    untouched = [i for i in range(20) if i not in index]
    before = banks[:, untouched].clone()
    assert ops.bank_update_(banks, index, embeddings, momentum) is None
    assert banks._version > version
    assert torch.equal(banks[:, untouched], before)
    # One rounding of values up to 1, after a few in the wide type.
    tolerance = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 4 * torch.finfo(dtype).eps
    assert (banks.double() - expected).abs().max() <= tolerance * (1 + 1e-3)


def test_bank_update_of_a_vanishing_entry() -> None:
    banks = torch.zeros(1, 2, 4)
    ops.bank_update_(banks, torch.tensor([1]), torch.zeros(1, 1, 4), 0.5)
    assert torch.equal(banks, torch.zeros(1, 2, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bank_update_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    """Unit vectors of two features over the whole range of the first, subnormals included."""
    x = torch.cat([torch.logspace(-9, 0, 2000), torch.arange(1, 2000) / 2**25])
    embeddings = torch.stack([x, torch.ones_like(x)], -1)[None]
    embeddings[:, ::2] *= -1
    banks = torch.zeros(1, len(x), 2, dtype=dtype)
    ops.bank_update_(banks, torch.arange(len(x)), embeddings, 0.0)
    wide = torch.zeros(1, len(x), 2)
    ops.bank_update_(wide, torch.arange(len(x)), embeddings, 0.0)
    assert torch.equal(banks, wide.to(dtype))


def test_philox_of_the_literal_form_has_the_published_answers() -> None:
    ones = literal_bank.WORD
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert literal_bank.philox((0, 0, 0, 0), (0, 0)) == (
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    )
    assert literal_bank.philox((ones,) * 4, (ones, ones)) == (
        0x408F276D,
        0x41C83B0E,
        0xA20BC7C6,
        0x6D5451FD,
    )
    assert literal_bank.philox(pi, (0xA4093822, 0x299F31D0)) == (
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    )


def class_tables(labels: list[int]) -> tuple[Tensor, ...]:
    y = torch.tensor(labels, dtype=torch.int32)
    order = torch.sort(y, stable=True).indices
    position = torch.empty_like(order)
    position[order] = torch.arange(len(labels))
    starts = torch.cat([torch.zeros(1), torch.bincount(y).cumsum(0)])
    return order.int(), position.int(), y, starts.int()


@pytest.mark.parametrize("positives, negatives", [(0, 1), (1, 2), (3, 17), (4, 64)])
@pytest.mark.parametrize("seed, step", [(0, 0), (2**63 - 1, 2**32 - 1), (0x299F31D0A4093822, 7)])
def test_sample_contrast(positives: int, negatives: int, seed: int, step: int) -> None:
    # A class of one sample and an empty one.
    labels = [3, 0, 1, 0, 3, 1, 1, 5, 0, 3, 3, 1]
    index = [0, 7, 2, 2, 11, 4]
    pos_idx, neg_idx = ops.sample_contrast(
        torch.tensor(index), *class_tables(labels), positives, negatives, seed, step
    )
    expected = literal_bank.sample(index, labels, positives, negatives, seed, step)
    assert pos_idx.tolist() == expected[0]
    assert neg_idx.tolist() == expected[1]


def test_sample_contrast_is_uniform(threads: Any) -> None:
    labels = [0] * 3 + [1] * 5 + [2] * 4
    tables = class_tables(labels)
    threads(1)
    pos_idx, neg_idx = ops.sample_contrast(torch.tensor([4, 5]), *tables, 40_000, 80_000, 1, 2)
    threads(2)
    again = ops.sample_contrast(torch.tensor([4, 5]), *tables, 40_000, 80_000, 1, 2)
    assert torch.equal(pos_idx, again[0]) and torch.equal(neg_idx, again[1])
    positive = torch.bincount(pos_idx[0, 1:], minlength=12) / 40_000
    negative = torch.bincount(neg_idx[1], minlength=12) / 80_000
    truth = torch.zeros(2, 12)
    truth[0, [3, 5, 6, 7]] = 1 / 4
    truth[1, [0, 1, 2, 8, 9, 10, 11]] = 1 / 7
    # Five standard deviations.
    assert (positive - truth[0]).abs().max() < 5 * (0.25 / 40_000) ** 0.5
    assert (negative - truth[1]).abs().max() < 5 * (0.25 / 80_000) ** 0.5
    assert (positive[truth[0] == 0] == 0).all() and (negative[truth[1] == 0] == 0).all()


KEYS = torch.zeros(4, 3, dtype=torch.int64)
BAD_CALLS: dict[str, dict[str, Any]] = {
    "nodes must be [N, B, D]": {"nodes": torch.randn(4, 5)},
    "nodes must be float16, bfloat16, float32 or float64": {
        "nodes": torch.ones(2, 4, 5, dtype=torch.int64)
    },
    "banks must be [M, n, D]": {"banks": torch.randn(9, 5)},
    "banks must be float16, bfloat16, float32 or float64": {
        "banks": torch.ones(2, 9, 5, dtype=torch.int32)
    },
    "banks must be contiguous, got strides [45, 1, 9]": {
        "banks": torch.randn(2, 5, 9).transpose(1, 2)
    },
    "banks must have the 5 features of nodes, got 6": {"banks": torch.randn(2, 9, 6)},
    "pos_idx must be int64, got Int": {"pos_idx": KEYS.int()},
    "neg_idx must be [B, columns] with B=4 and at least one column, got [3, 3]": {
        "neg_idx": KEYS[:3]
    },
    "neg_idx must be [B, columns] with B=4 and at least one column, got [4, 0]": {
        "neg_idx": KEYS[:, :0]
    },
    "neg_idx must have a contiguous last dimension, got strides [1, 4]": {
        "neg_idx": KEYS.T.contiguous().T
    },
    "pos_idx must be in 0 .. 8, got 9": {"pos_idx": KEYS.index_fill(1, torch.tensor(2), 9)},
    "neg_idx must be in 0 .. 8, got -1": {"neg_idx": KEYS.index_fill(0, torch.tensor(3), -1)},
    "networks must name the network of each of the 2 nodes, got 1": {"networks": [0]},
    "networks must be in 0 .. 1, the banks, got 2": {"networks": [0, 2]},
    "networks must be in ascending order, got [1, 0]": {"networks": [1, 0]},
    "temperature must be finite and positive, got 0": {"temperature": 0.0},
    "kl_temperature must be finite and positive, got -1": {"kl_temperature": -1.0},
    "families must be a bit mask in 1 .. 15, got 16": {"families": 16},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_argument_errors(message: str) -> None:
    arguments = {
        "nodes": torch.randn(2, 4, 5),
        "banks": torch.randn(2, 9, 5),
        "pos_idx": KEYS,
        "neg_idx": KEYS,
        "networks": [0, 1],
        "temperature": 0.1,
        "kl_temperature": 3.0,
        "families": ALL,
    }
    ops.bank_mcl_forward(*arguments.values())
    with pytest.raises(RuntimeError) as error:
        ops.bank_mcl_forward(*{**arguments, **BAD_CALLS[message]}.values())
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("place, name", list(enumerate(NAMES)))
def test_cotangent_errors(place: int, name: str) -> None:
    case = make_case([0, 0, 1], 3, 5, 1, 7)
    wrong = list(case.cotangents)
    wrong[place] = wrong[place][..., :2]
    with pytest.raises(RuntimeError, match=f"^g_{name} must be "):
        ops.bank_mcl_fused(*wrong, *case.where, *case.statics)


def test_other_errors() -> None:
    case = make_case([0, 0, 1], 3, 5, 1, 7)
    lse = torch.zeros(2, 3, 3)
    with pytest.raises(RuntimeError, match="^kl_lse must be "):
        ops.bank_mcl_backward(*case.cotangents, *case.where, lse, lse[0], *case.statics)
    nce = make_nce_case(2, 3, 5, 7)
    with pytest.raises(RuntimeError, match="^nodes must be one for each of the 2 banks, got 1"):
        ops.bank_nce_lse(nce.nodes[:1], *nce.keys[1:], 0.1)
    with pytest.raises(RuntimeError, match="^pos_idx must have one column, got 2"):
        ops.bank_nce_lse(*nce.keys[:2], nce.pos_idx.repeat(1, 2), nce.neg_idx, 0.1)
    with pytest.raises(RuntimeError, match="^log_normalizer must be "):
        ops.bank_nce_fused(*nce.keys, torch.zeros(2), 0.1, 0.0)
    with pytest.raises(RuntimeError, match="^eps must be finite and not negative, got -1"):
        ops.bank_nce_fused(*nce.keys, nce.log_normalizer, 0.1, -1.0)


def test_bank_update_errors() -> None:
    banks, index, x = torch.randn(2, 9, 5), torch.tensor([1, 2]), torch.randn(2, 2, 5)
    with pytest.raises(RuntimeError, match=r"^index must be in 0 \.\. 8, got 9"):
        ops.bank_update_(banks, torch.tensor([1, 9]), x, 0.5)
    with pytest.raises(RuntimeError, match=r"^embeddings must be \[2, 2, 5\]"):
        ops.bank_update_(banks, index, x[:1], 0.5)
    with pytest.raises(RuntimeError, match=r"^momentum must be in 0 \.\. 1, got 1.5"):
        ops.bank_update_(banks, index, x, 1.5)
    with pytest.raises(RuntimeError, match="^banks must be contiguous"):
        ops.bank_update_(banks.transpose(0, 1), index, x, 0.5)


def test_sample_contrast_errors() -> None:
    order, position, labels, starts = class_tables([0, 1, 1, 0])
    index = torch.tensor([0, 3])
    rest = (1, 2, 0, 0)
    with pytest.raises(RuntimeError, match=r"^index must be in 0 \.\. 3, got 4"):
        ops.sample_contrast(index + 1, order, position, labels, starts, *rest)
    with pytest.raises(RuntimeError, match="^order must be int32, got Long"):
        ops.sample_contrast(index, order.long(), position, labels, starts, *rest)
    with pytest.raises(RuntimeError, match=r"^labels must be \[n\]=\[4\], got \[3\]"):
        ops.sample_contrast(index, order, position, labels[:3], starts, *rest)
    with pytest.raises(RuntimeError, match="^num_negatives must be at least 1, got 0"):
        ops.sample_contrast(index, order, position, labels, starts, 1, 0, 0, 0)
    with pytest.raises(RuntimeError, match=r"^step must be in 0 \.\. 4294967295, got -1"):
        ops.sample_contrast(index, order, position, labels, starts, 1, 1, 0, -1)
    with pytest.raises(RuntimeError, match="^labels must name at least two classes"):
        ops.sample_contrast(index, *class_tables([0, 0, 0, 0]), *rest)
