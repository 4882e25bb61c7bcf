"""Tests of the Triton kernels against the reference; ``test_triton_kernels.py`` runs this file.

In a process of its own: Triton decides when it is imported whether it interprets. With a GPU the
kernels are compiled, else TRITON_INTERPRET=1 must be set.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mclfast.kernels.families import ALL, EACH, ICL, SOFT_ICL, SOFT_VCL, VCL
from mclfast.kernels.info_nce import info_nce_backward, info_nce_double_backward, info_nce_forward
from mclfast.kernels.mcl_backward import mcl_rows_backward
from mclfast.kernels.mcl_double_backward import mcl_rows_double_backward
from mclfast.kernels.mcl_forward import mcl_rows_forward
from mclfast.kernels.mcl_fused import mcl_rows_fused
from mclfast.losses.reference import mcl_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXED = (0, 0, 1, 2, 2, 2)
EPS = torch.finfo(torch.float32).eps


class Case(NamedTuple):
    networks: tuple[int, ...]
    batch: int
    d: int
    temperature: float
    kl_temperature: float
    families: int = ALL
    rows: tuple[int, int] | None = None  # row_start, row_count
    labels: str = "random"
    nodes: str = "random"

    def __str__(self) -> str:
        return "-".join(str(field) for field in self).replace(" ", "")


CASES = [
    Case(MIXED, 5, 7, 0.1, 3.0),
    Case((0, 1), 33, 7, 0.1, 3.0),
    Case((0, 1), 5, 16, 0.07, 4.0),
    Case((0, 1), 70, 40, 0.1, 2.5, rows=(3, 40)),
    Case((0, 1), 33, 3, 0.02, 3.0),
    Case((0, 0, 1), 33, 16, 0.003, 2.5),
    Case((0, 1), 33, 16, 0.003, 3.0, labels="singletons"),
    Case((0, 1, 2), 1, 3, 0.1, 3.0),
    Case((0, 1, 2), 2, 3, 0.02, 3.0),
    Case((0,), 33, 7, 0.07, 3.0, families=VCL),
    Case((0, 1), 33, 7, 0.07, 3.0, families=SOFT_VCL),
    Case((0, 1), 33, 7, 0.07, 1.0, families=ICL),
    Case((0, 1), 33, 7, 0.07, 2.0, families=SOFT_ICL, rows=(30, 3)),
    Case((0, 1), 5, 150, 0.1, 3.0),
    Case((0, 1), 33, 16, 0.1, 3.0, nodes="equal"),
    Case((0, 1), 33, 16, 0.1, 3.0, nodes="unnormalised"),
    Case((0, 0), 5, 7, 0.1, 3.0),
]


def make_inputs(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, int, int]:
    """(nodes, labels, row_start, row_count)."""
    generator = torch.Generator().manual_seed(case.batch * 1000 + case.d)
    n = len(case.networks)
    nodes = torch.randn(n, case.batch, case.d, generator=generator)
    if case.nodes != "unnormalised":
        nodes = torch.nn.functional.normalize(nodes, dim=-1)
    if case.nodes == "equal":
        nodes = nodes[:1].repeat(n, 1, 1)
    # Beyond int32, to catch labels that are narrowed.
    labels = torch.randint(0, max(2, case.batch // 3), (case.batch,), generator=generator) << 40
    if case.labels == "singletons":
        labels = torch.arange(case.batch)
    row_start, row_count = case.rows or (0, case.batch)
    return nodes.to(DEVICE, dtype), labels.to(DEVICE), row_start, row_count


def make_cotangents(case: Case, row_count: int) -> list[Tensor]:
    """Random cotangents of the four row families, NaN where they must not be read."""
    generator = torch.Generator().manual_seed(7)
    n = len(case.networks)
    shapes = [(n, row_count)] + [(row_count, n, n)] * 3
    cotangents = []
    for bit, shape in enumerate(shapes):
        g = torch.randn(shape, generator=generator).to(DEVICE)
        # Not contiguous, as cotangents of transposed or expanded rows are.
        g = g if bit == 0 else g.permute(1, 2, 0)
        cotangents.append(g if case.families & EACH[bit] else torch.full_like(g, float("nan")))
    return cotangents


def reference(
    case: Case, nodes: Tensor, labels: Tensor, cotangents: list[Tensor], v_nodes: Tensor | None
) -> dict[str, Tensor]:
    """Rows, gradient and, for v_nodes, second-order gradients, in the dtype of ``nodes``."""
    names = ("vcl", "soft_vcl", "icl", "soft_icl")
    wanted = [bit for bit in range(4) if case.families & EACH[bit]]
    x = nodes.clone().requires_grad_()
    g = [cotangents[bit].to(x.dtype).clone().requires_grad_() for bit in wanted]
    row_start, row_count = case.rows or (0, case.batch)
    rows = mcl_rows(
        x,
        case.networks,
        labels,
        temperature=case.temperature,
        kl_temperature=case.kl_temperature,
        row_start=row_start,
        row_count=row_count,
    )
    out = {names[bit]: rows[bit].detach() for bit in wanted}
    total = sum((g_k * rows[bit]).sum() for g_k, bit in zip(g, wanted, strict=True))
    if not total.requires_grad:  # no pair of different networks
        return out | {"grad": torch.zeros_like(x)}
    (grad,) = torch.autograd.grad(total, x, create_graph=True)
    out["grad"] = grad.detach()
    if v_nodes is not None:
        moved = (grad * v_nodes.to(x.dtype)).sum()
        second = torch.autograd.grad(moved, [x, *g], materialize_grads=True)
        out["h_nodes"] = second[0]
        out |= {f"h_{names[bit]}": h for bit, h in zip(wanted, second[1:], strict=True)}
    return out


def run_kernels(
    case: Case,
    nodes: Tensor,
    labels: Tensor,
    cotangents: list[Tensor],
    v_nodes: Tensor | None,
    precision: str = "ieee",
) -> dict[str, Tensor]:
    """The same quantities from the kernels, all families."""
    row_start, row_count = case.rows or (0, case.batch)
    constants = (case.temperature, case.kl_temperature, case.families, row_start, row_count)
    rows = mcl_rows_forward(nodes, labels, case.networks, *constants, precision=precision)
    names = ("vcl", "soft_vcl", "icl", "soft_icl")
    out = dict(zip((*names, "lse", "kl_lse"), rows, strict=True))
    state = (*cotangents, nodes, labels, case.networks, rows[4], rows[5], *constants)
    out["grad"] = mcl_rows_backward(*state, precision=precision)
    if v_nodes is not None:
        second = mcl_rows_double_backward(v_nodes, *state, precision=precision)
        out |= zip(("h_nodes", *(f"h_{name}" for name in names)), second, strict=True)
    return out


def assert_within_budget(
    name: str, ours: Tensor, eager: Tensor, truth: Tensor, amplitude: float, logit: float
) -> None:
    """RMS error at most 1.5 times that of eager float32, plus the rounding of the largest logit."""
    error = (ours.double() - truth).square().mean().sqrt().item()
    eager_error = (eager.double() - truth).square().mean().sqrt().item()
    floor = EPS * (1 + logit) * amplitude
    assert torch.isfinite(ours).all(), name
    assert error <= 1.5 * eager_error + floor, (name, error, eager_error, floor)


def amplitudes(case: Case) -> dict[str, float]:
    """Natural size of the quantities: cotangents and directions are of order 1."""
    t = max(1.0, case.kl_temperature)
    sizes = {"grad": t / case.temperature, "h_nodes": t / case.temperature**2}
    for name in ("vcl", "soft_vcl", "icl", "soft_icl"):
        sizes[name] = t * t if name.startswith("soft") else 1.0
        sizes[f"h_{name}"] = t / case.temperature
    return sizes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_and_gradients(case):
    nodes, labels, _, row_count = make_inputs(case)
    cotangents = make_cotangents(case, row_count)
    v_nodes = torch.randn(nodes.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    ours = run_kernels(case, nodes, labels, cotangents, v_nodes)
    truth = reference(case, nodes.double(), labels, cotangents, v_nodes)
    eager = reference(case, nodes, labels, cotangents, v_nodes)
    sizes = amplitudes(case)
    logit = nodes.square().sum(-1).max().item() / case.temperature
    for name, expected in truth.items():
        assert_within_budget(name, ours[name], eager[name], expected, sizes[name], logit)
    for bit, name in enumerate(("vcl", "soft_vcl", "icl", "soft_icl")):
        if not case.families & EACH[bit]:
            assert not ours[name].any(), name
            assert not ours[f"h_{name}"].any(), name


def test_log_partitions():
    case = Case(MIXED, 33, 7, 0.1, 3.0)
    nodes, labels, _, _ = make_inputs(case)
    lse, kl_lse = mcl_rows_forward(
        nodes, labels, case.networks, 0.1, 3.0, 15, 4, 20, precision="ieee"
    )[4:]
    s = torch.einsum("ard,bcd->abrc", nodes.double(), nodes.double()) / 0.1
    is_self = torch.eye(case.batch, dtype=torch.bool, device=DEVICE)
    expected = s.masked_fill(is_self, float("-inf")).logsumexp(-1)[..., 4:24]
    expected_kl = (s / 3.0).logsumexp(-1)[..., 4:24]
    for a, b in itertools.product(range(6), repeat=2):
        if a == b or MIXED[a] != MIXED[b]:
            torch.testing.assert_close(lse[a, b].double(), expected[a, b], rtol=0, atol=5e-6)
            torch.testing.assert_close(kl_lse[a, b].double(), expected_kl[a, b], rtol=0, atol=5e-6)
        else:
            assert not lse[a, b].any() and not kl_lse[a, b].any()


def test_fused_is_forward_and_backward():
    case = Case((0, 1), 33, 7, 0.1, 3.0)
    nodes, labels, _, row_count = make_inputs(case)
    cotangents = make_cotangents(case, row_count)
    ours = run_kernels(case, nodes, labels, cotangents, None)
    fused = mcl_rows_fused(
        *cotangents, nodes, labels, case.networks, 0.1, 3.0, 15, precision="ieee"
    )
    for name, value in zip(
        ("vcl", "soft_vcl", "icl", "soft_icl", "lse", "kl_lse", "grad"), fused, strict=True
    ):
        assert torch.equal(value, ours[name]), name


def test_results_are_reproducible():
    case = Case((0, 1), 33, 7, 0.1, 3.0)
    nodes, labels, _, row_count = make_inputs(case)
    cotangents = make_cotangents(case, row_count)
    first, second = (run_kernels(case, nodes, labels, cotangents, None) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# Relative L2 error that rounding the gradient, and for bfloat16 the logit gradients, accounts for.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1.2e-2), (torch.float16, 5e-4)], ids=str
)
# float16 could not hold cotangents of this size, nor of its inverse
@pytest.mark.parametrize("scale", [1.0, 2.0**-24, 2.0**15])
def test_half_precision(dtype, tolerance, scale):
    case = Case((0, 1), 33, 40, 0.1, 3.0)
    nodes, labels, _, row_count = make_inputs(case, dtype)
    cotangents = [g * scale for g in make_cotangents(case, row_count)]
    ours = run_kernels(case, nodes, labels, cotangents, None, "tf32")
    # Rows and gradient of the same, already rounded, nodes.
    truth = reference(case, nodes.double(), labels, cotangents, None)
    eager = reference(case, nodes.float(), labels, cotangents, None)
    sizes = amplitudes(case)
    for name in ("vcl", "soft_vcl", "icl", "soft_icl"):
        assert ours[name].dtype == torch.float32
        assert_within_budget(name, ours[name], eager[name], truth[name], sizes[name], 10.0)
    assert ours["grad"].dtype == dtype
    if dtype == torch.bfloat16 or scale == 1.0:  # else the result itself is out of range
        error = (ours["grad"].double() - truth["grad"]).norm() / truth["grad"].norm()
        assert error <= tolerance


def test_unsupported_inputs_are_refused():
    nodes, labels, _, _ = make_inputs(CASES[1])
    with pytest.raises(ValueError, match="float64"):
        mcl_rows_forward(nodes.double(), labels, (0, 1), 0.1, 3.0, 15, 0, 5)
    with pytest.raises(ValueError, match="'fp8'"):
        mcl_rows_forward(nodes, labels, (0, 1), 0.1, 3.0, 15, 0, 5, precision="fp8")


def info_nce_reference(a, b, temperature, cotangents, directions):
    """Outputs, gradients and second-order gradients in the dtype of ``a``."""
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    g = [x.to(a.dtype).clone().requires_grad_() for x in cotangents]
    s = a @ b.T / temperature
    outputs = (s.logsumexp(1), s.logsumexp(0), s.diagonal())
    total = sum((x * y).sum() for x, y in zip(g, outputs, strict=True))
    grads = torch.autograd.grad(total, (a, b), create_graph=True)
    moved = sum((x * v.to(x.dtype)).sum() for x, v in zip(grads, directions, strict=True))
    return (*outputs, *grads, *torch.autograd.grad(moved, (a, b, *g)))


@pytest.mark.parametrize(
    ("batch", "d", "temperature"),
    [(33, 7, 0.1), (1, 3, 0.1), (2, 16, 0.02), (70, 40, 0.07), (5, 16, 0.003), (5, 150, 0.1)],
)
def test_info_nce(batch, d, temperature):
    generator = torch.Generator().manual_seed(batch)
    a, b, v_a, v_b = torch.randn(4, batch, d, generator=generator).to(DEVICE)
    a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (a, b))
    # An expanded cotangent, what the mean of the rows gives.
    g = [torch.full((1,), 0.7, device=DEVICE).expand(batch)]
    g += list(torch.randn(2, batch, generator=generator).to(DEVICE))
    exact = {"precision": "ieee"}
    outputs = info_nce_forward(a, b, temperature, **exact)
    state = (*g, a, b, *outputs[:2], temperature)
    ours = (
        *outputs,
        *info_nce_backward(*state, **exact),
        *info_nce_double_backward(v_a, v_b, *state, **exact),
    )
    truth = info_nce_reference(a.double(), b.double(), temperature, g, (v_a, v_b))
    eager = info_nce_reference(a, b, temperature, g, (v_a, v_b))
    inv_tau = 1 / temperature
    sizes = [1.0] * 3 + [inv_tau] * 2 + [inv_tau**2] * 2 + [inv_tau] * 3
    names = "row_lse col_lse diagonal grad_a grad_b h_a h_b h_row h_col h_diag".split()
    for name, x, y, z, size in zip(names, ours, eager, truth, sizes, strict=True):
        assert_within_budget(name, x, y, z, size, inv_tau)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_info_nce_half_precision(dtype):
    a, b = torch.nn.functional.normalize(torch.randn(2, 33, 40), dim=-1).to(DEVICE, dtype)
    g = torch.randn(3, 33, device=DEVICE).unbind(0)
    row_lse, col_lse, _ = info_nce_forward(a, b, 0.1)
    ours = info_nce_backward(*g, a, b, row_lse, col_lse, 0.1)
    truth = info_nce_reference(a.double(), b.double(), 0.1, g, (a, b))[3:5]
    for x, y in zip(ours, truth, strict=True):
        assert x.dtype == dtype
        assert (x.double() - y).norm() <= 1.2e-2 * y.norm()
