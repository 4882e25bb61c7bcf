"""The operators: registration, second order, the one-sweep form, memory and determinism."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from mclfast import layerwise_mcl_objective, layerwise_mcl_terms, mcl_objective, mcl_terms
from mclfast._base.tensors import unit_norm
from mclfast.kernels.families import ALL
from mclfast.losses import reference
from mclfast.losses.in_batch import (
    has_positive,
    info_nce_loss,
    layerwise_mcl_loss,
    mcl_loss,
    mcl_rows,
    supcon_loss,
)
from mclfast.ops import backends
from mclfast.ops import in_batch as ops

STAGES = [2, 1, 1]
COEFFICIENTS = (0.1, 1.0, 0.3, 0.7)

needs_cpu = pytest.mark.skipif(
    not backends.backend_report()["cpu"].available,
    reason=f"backend cpu: {backends.backend_report()['cpu'].reason}",
)


def sample(dtype: torch.dtype = torch.float64, batch: int = 7, width: int = 5) -> tuple:
    g = torch.Generator().manual_seed(0)
    nodes = unit_norm(torch.randn(4, batch, width, generator=g, dtype=torch.float64)).to(dtype)
    return nodes.requires_grad_(), torch.randint(3, (batch,), generator=g)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    nodes, labels = sample(dtype)
    a, b = nodes.detach()[0].requires_grad_(), nodes.detach()[1].requires_grad_()
    settings = (STAGES, 0.5, 3.0, ALL)
    opcheck(ops.mcl_rows, (nodes, labels, *settings, 2, 4, "cpu"))
    for start, count in ((0, 7), (2, 4)):
        *rows, lse, kl_lse = ops.mcl_rows(nodes, labels, *settings, start, count, "cpu")
        cotangents = [torch.randn_like(r).requires_grad_() for r in rows]
        statistics = lse.detach(), kl_lse.detach()
        opcheck(
            ops.mcl_rows_backward,
            (*cotangents, nodes, labels, *statistics, *settings, start, count, "cpu"),
        )
        detached = [c.detach() for c in cotangents]
        opcheck(
            ops.mcl_rows_double_backward,
            (
                nodes.detach(),
                *detached,
                nodes.detach(),
                labels,
                *statistics,
                *settings,
                start,
                count,
                "cpu",
            ),
        )
    *rows, _, _ = ops.mcl_rows(nodes, labels, *settings, 0, 7, "cpu")
    weights = [torch.randn_like(r) for r in rows]
    opcheck(ops.mcl_objective, (*weights, nodes, labels, *settings, "cpu"))
    opcheck(ops.info_nce, (a, b, 0.5, "cpu"))
    row, col, _ = (t.detach() for t in ops.info_nce(a, b, 0.5, "cpu"))
    cotangents = [torch.randn(7, dtype=dtype).requires_grad_() for _ in range(3)]
    opcheck(ops.info_nce_backward, (*cotangents, a, b, row, col, 0.5, "cpu"))


def objective_and_terms(backend: str, e: Tensor, labels: Tensor, weights: Tensor, kind: str):
    """The same loss by the one-sweep form ("fused") and by the general one ("rows")."""
    plain = weights is None
    arguments = (e, labels) if plain else (e, labels, weights)
    if kind == "fused":
        call = mcl_objective if plain else layerwise_mcl_objective
        return call(*arguments, backend=backend, weights=COEFFICIENTS)
    terms = (mcl_terms if plain else layerwise_mcl_terms)(*arguments, backend=backend)
    return terms.weighted_sum(*COEFFICIENTS), terms


@pytest.mark.parametrize("layerwise", [True, False])
def test_one_sweep_equals_the_general_form_to_second_order(backend, layerwise):
    g = torch.Generator().manual_seed(1)
    shape = (2, 3, 9, 5) if layerwise else (3, 9, 5)
    e = unit_norm(torch.randn(shape, generator=g, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(4, (9,), generator=g)
    weights = torch.rand(6, 6, 9, generator=g, dtype=torch.float64) if layerwise else None
    direction = torch.randn(shape, generator=g, dtype=torch.float64)

    def derivatives(name: str, kind: str):
        loss, terms = objective_and_terms(name, e, labels, weights, kind)
        (first,) = torch.autograd.grad(loss, e, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum() + 0.1 * (first**3).sum(), e)
        return [loss.detach(), *(t.detach() for t in terms), first.detach(), second]

    want = derivatives("reference", "rows")
    for got, w in zip(derivatives(backend, "fused"), want, strict=True):
        torch.testing.assert_close(got, w, rtol=1e-11, atol=1e-12)
    _, terms = objective_and_terms(backend, e, labels, weights, "fused")
    assert not any(t.requires_grad for t in terms)


def test_scaling_the_loss_scales_the_gradient(backend):
    nodes, labels = sample()
    for call in (
        lambda x: supcon_loss(x[0], labels),
        lambda x: info_nce_loss(x[0], x[1]),
        lambda x: mcl_loss(x, labels, weights=COEFFICIENTS),
    ):
        (once,) = torch.autograd.grad(call(nodes), nodes)
        (twice,) = torch.autograd.grad(2.5 * call(nodes), nodes)
        torch.testing.assert_close(twice, 2.5 * once)


@needs_cpu
def test_a_third_derivative_is_refused():
    nodes, labels = sample()
    loss = mcl_terms(nodes, labels, backend="cpu").vcl
    (first,) = torch.autograd.grad(loss, nodes, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), nodes, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad((second**2).sum(), nodes)


def test_has_positive():
    labels = torch.tensor([5, 1, -3, 1, 9, 5, 2])
    assert has_positive(labels).tolist() == [True, True, False, True, False, True, False]
    assert has_positive(torch.tensor([4])).tolist() == [False]


def saved_bytes(call) -> int:
    """Bytes that autograd keeps for backward, each storage once."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return sum(storages.values())


@needs_cpu
def test_nothing_of_size_batch_squared_is_kept():
    """Twice the batch keeps at most about twice the bytes: inputs and row statistics."""

    def kept(batch: int, call) -> int:
        e = torch.randn(2, 2, batch, 8).requires_grad_()
        labels = torch.arange(batch) // 2
        return saved_bytes(lambda: call(e, labels, backend="cpu"))

    for call in (layerwise_mcl_terms, layerwise_mcl_loss):
        small, large = kept(512, call), kept(1024, call)
        assert large < 2.1 * small
        assert large < 1024 * 1024 * 4  # one float32 [B, B]


@needs_cpu
def test_equal_bits_from_run_to_run():
    nodes, labels = sample(torch.float32, batch=130, width=33)

    def run() -> list[Tensor]:
        x = nodes.detach().requires_grad_()
        rows = mcl_rows([[x[0], x[1]], [x[2]], [x[3]]], labels, backend="cpu")
        loss = sum((row * row).sum() for row in rows[:4])
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), x)
        return [*rows, first, second]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


@needs_cpu
@pytest.mark.parametrize("fused", [False, True])
def test_compiles_as_one_graph_with_its_backward(fused):
    nodes, labels = sample(torch.float32)

    def loss(x: Tensor) -> Tensor:
        if fused:
            return mcl_loss(x, labels, backend="cpu", weights=COEFFICIENTS)
        return mcl_terms(x, labels, backend="cpu").weighted_sum(*COEFFICIENTS)

    (want,) = torch.autograd.grad(loss(nodes), nodes)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(nodes), nodes)
    torch.testing.assert_close(got, want)


def test_auto_does_not_send_float64_to_triton(monkeypatch):
    nodes, labels = sample(torch.float64)
    want = supcon_loss(nodes[0], labels, backend="reference")
    monkeypatch.setattr(backends, "resolve", lambda backend, device, banks: "triton")
    assert torch.equal(supcon_loss(nodes[0], labels), want)
    a, b = nodes[0], nodes[1]
    assert torch.equal(info_nce_loss(a, b), reference.info_nce_loss(a, b, temperature=0.1))
