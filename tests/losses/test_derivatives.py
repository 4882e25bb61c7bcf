"""Derivatives beyond ``.backward()``: torch.func, forward mode, trained temperatures.

What is expected comes from the plain form under ordinary autograd (``torch.autograd.functional``
with its own loops over rows), so that no rule of forward mode or of vmap vouches for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import mclfast
from helpers.every_loss import LABELS, LossCase, every_loss
from mclfast.ops import backends

CASES = {case.name: case for case in every_loss()}
needs_cpu = pytest.mark.skipif(
    not backends.backend_report()["cpu"].available,
    reason=f"backend cpu: {backends.backend_report()['cpu'].reason}",
)
pytestmark = needs_cpu


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> LossCase:
    return CASES[request.param]


def fused(case: LossCase, **settings: Any) -> Callable[[Tensor], Tensor]:
    return lambda e: case.call(e, **settings)


def plain(case: LossCase, **settings: Any) -> Callable[[Tensor], Tensor]:
    return lambda e: case.call(e, backend="reference", **settings)


def gradient(call: Callable[[Tensor], Tensor], e: Tensor) -> Tensor:
    x = e.clone().requires_grad_()
    return torch.autograd.grad(call(x), x)[0]


def hessian_times(call: Callable[[Tensor], Tensor], e: Tensor, direction: Tensor) -> Tensor:
    x = e.clone().requires_grad_()
    (first,) = torch.autograd.grad(call(x), x, create_graph=True)
    return torch.autograd.grad((first * direction).sum(), x)[0]


def direction_like(e: Tensor) -> Tensor:
    return torch.randn(e.shape, generator=torch.Generator().manual_seed(5), dtype=e.dtype)


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_reverse_mode_transforms(case):
    e, call = case.embeddings, fused(case)
    want = gradient(plain(case), e)
    close(torch.func.grad(call)(e), want)
    value, pull = torch.func.vjp(call, e)
    close(value, plain(case)(e))
    close(pull(torch.tensor(2.0, dtype=e.dtype))[0], 2 * want)
    close(torch.func.jacrev(call)(e), want)
    close(torch.func.vmap(call)(torch.stack([e, -e])), torch.stack([call(e), call(-e)]))
    batched = torch.func.vmap(torch.func.grad(call))(torch.stack([e, -e]))
    close(batched, torch.stack([want, gradient(plain(case), -e)]))


def test_saved_tensors_are_read_once(case):
    x = case.embeddings.clone().requires_grad_()
    want = gradient(plain(case), case.embeddings)
    recomputed = checkpoint(fused(case), x, use_reentrant=False)
    close(torch.autograd.grad(recomputed, x)[0], want)
    packed = unpacked = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal packed
        packed += 1
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        nonlocal unpacked
        unpacked += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = fused(case)(x)
    close(torch.autograd.grad(loss, x)[0], want)
    assert unpacked == packed > 0


def test_forward_mode(case):
    e, call = case.embeddings, fused(case)
    v = direction_like(e)
    want = (gradient(plain(case), e) * v).sum()
    value, along = torch.func.jvp(call, (e,), (v,))
    close((value, along), (plain(case)(e), want))
    with forward_ad.dual_level():
        close(forward_ad.unpack_dual(call(forward_ad.make_dual(e, v))).tangent, want)
    assert want.abs() > 1e-3


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_recorded_derivative(case, backend):
    """``linearize`` records a graph and folds its constants; a write into one is lost there."""
    e, temperature = case.embeddings, torch.tensor(0.2, dtype=torch.float64)
    v = direction_like(e)
    _, along = torch.func.linearize(lambda x: case.call(x, backend=backend), e)
    close(along(v), (gradient(plain(case), e) * v).sum())
    _, along = torch.func.linearize(
        lambda t: case.call(e, temperature=t, backend=backend), temperature
    )
    want = gradient(lambda t: plain(case, temperature=t)(e), temperature)
    close(along(torch.ones_like(temperature)), want)


def test_second_order(case):
    e, call = case.embeddings, fused(case)
    v = direction_like(e)
    want = hessian_times(plain(case), e, v)
    assert want.norm() > 1e-3
    close(torch.autograd.functional.hvp(call, e, v)[1], want)
    close(torch.autograd.functional.vhp(call, e, v)[1], want)
    close(torch.func.jvp(torch.func.grad(call), (e,), (v,))[1], want)
    close(torch.func.grad(lambda x: (torch.func.grad(call)(x) * v).sum())(e), want)
    close(torch.func.grad(lambda x: torch.func.jvp(call, (x,), (v,))[1])(e), want)
    x = e.clone().requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, v)
        (first,) = torch.autograd.grad(call(dual), dual, create_graph=True)
        close(forward_ad.unpack_dual(first).tangent, want)
        along = forward_ad.unpack_dual(call(forward_ad.make_dual(x, v))).tangent
    close(torch.autograd.grad(along, x)[0], want)


def test_whole_matrices(case):
    e, call = case.embeddings, fused(case)
    size = e.numel()
    want = torch.stack(
        [hessian_times(plain(case), e, unit.view_as(e)) for unit in torch.eye(size, dtype=e.dtype)]
    )
    close(torch.func.hessian(call)(e).reshape(size, size), want.reshape(size, size))
    close(torch.func.jacfwd(call)(e), gradient(plain(case), e))


def test_forward_over_forward_takes_the_plain_form(case):
    e, call = case.embeddings, fused(case)
    v = direction_like(e)

    def along(x: Tensor) -> Tensor:
        return torch.func.jvp(call, (x,), (v,))[1]

    want = (hessian_times(plain(case), e, v) * v).sum()
    close(torch.func.jvp(along, (e,), (v,))[1], want)


def test_a_third_derivative_is_plain_or_refused(case):
    e, call = case.embeddings, fused(case)
    v = direction_like(e)

    def second(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(f(x), x, create_graph=True)
        return torch.autograd.grad((first * v).sum(), x, create_graph=True)[0]

    x = e.clone().requires_grad_()
    want = torch.autograd.grad((second(plain(case), x) * v).sum(), x)[0]

    def by_func(x: Tensor) -> Tensor:
        first = torch.func.grad(call)
        return (torch.func.grad(lambda y: (first(y) * v).sum())(x) * v).sum()

    close(torch.func.grad(by_func)(e), want)
    with pytest.raises(NotImplementedError, match='backend="reference"'):
        torch.autograd.grad((second(call, x) * v).sum(), x)


@pytest.mark.parametrize("name", ["temperature", "kl_temperature"])
def test_a_trained_temperature(case, name):
    if name == "kl_temperature" and case.name in ("supcon_loss", "info_nce_loss", "bank_nce_loss"):
        pytest.skip("the loss has no kl_temperature")
    value = {"temperature": 0.2, "kl_temperature": 2.0}[name]
    e = case.embeddings

    def derivatives(form: Callable[..., Callable[[Tensor], Tensor]], **more: Any) -> list[Tensor]:
        x = e.clone().requires_grad_()
        t = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        loss = form(case, **{name: t}, **more)(x)
        first = torch.autograd.grad(loss, (x, t), create_graph=True)
        product = (first[0] * direction_like(x)).sum() + 0.7 * first[1]
        return [loss, *first, *torch.autograd.grad(product, (x, t))]

    want = derivatives(plain)
    close(derivatives(fused), want)
    assert want[2].abs() > 1e-3
    # The plain form against numbers. The similarities of a teacher are constants, for the
    # temperature too; losses without a teacher have the whole derivative.
    if name == "kl_temperature" or "nce" in case.name or case.name == "supcon_loss":
        step = 1e-5
        low, high = (plain(case, **{name: value + s})(e) for s in (-step, step))
        torch.testing.assert_close(want[2], (high - low) / (2 * step), rtol=1e-6, atol=1e-8)
    # Numbers of other types, and tensors without a gradient.
    for given in (np.float32(value), np.float64(value), torch.tensor(value)):
        torch.testing.assert_close(
            fused(case, **{name: given})(e), plain(case, **{name: float(given)})(e)
        )
    assert (
        torch.func.grad(lambda t: fused(case, **{name: t})(e))(
            torch.tensor(value, dtype=torch.float64)
        )
        .sub(want[2])
        .abs()
        < 1e-8
    )


def test_a_batch_of_weights_and_temperatures():
    case = CASES["mcl_loss"]
    weights = torch.tensor([[0.1, 1.0, 0.2, 0.7], [0.5, 0.1, 0.3, 0.2]], dtype=torch.float64)

    def loss(w: Tensor, t: Tensor) -> Tensor:
        return mclfast.mcl_loss(case.embeddings, LABELS, weights=w, temperature=t)

    temperatures = torch.tensor([0.1, 0.3], dtype=torch.float64)
    got = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(weights, temperatures)
    for i in range(2):
        w, t = weights[i].clone().requires_grad_(), temperatures[i].clone().requires_grad_()
        value = mclfast.mcl_loss(
            case.embeddings, LABELS, weights=w, temperature=t, backend="reference"
        )
        close((got[0][i], got[1][i]), torch.autograd.grad(value, (w, t)))
    # The derivative for weights that are a batch inside and differentiated outside.
    outer = torch.func.grad(lambda w: torch.func.vmap(lambda x: loss(x, temperatures[0]))(w).sum())
    close(outer(weights)[1], torch.func.grad(loss)(weights[1], temperatures[0]))
    along = torch.func.jvp(lambda w: loss(w, temperatures[0]), (weights[0],), (weights[1],))[1]
    close(along, (torch.func.grad(loss)(weights[0], temperatures[0]) * weights[1]).sum())


def test_a_module_trains_its_temperature():
    case = CASES["info_nce_loss"]
    temperature = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
    module = mclfast.InfoNCELoss(temperature=temperature)
    assert [name for name, _ in module.named_parameters()] == ["temperature"]
    module(*case.embeddings).backward()
    value = mclfast.info_nce_loss(*case.embeddings, temperature=temperature, backend="reference")
    close(temperature.grad, torch.autograd.grad(value, temperature)[0])


def test_a_temperature_outside_the_range_is_refused():
    case = CASES["mcl_loss"]
    for value in (0.0, -1.0, float("nan"), float("inf"), 1e7):
        with pytest.raises(ValueError, match=r"^temperature: expected a number in \[1e-6, 1e6\]"):
            case.call(case.embeddings, temperature=torch.tensor(value))
    with pytest.raises(ValueError, match="^kl_temperature: expected a number or a 0-dim"):
        case.call(case.embeddings, kl_temperature=torch.ones(2))
    with pytest.raises(ValueError, match="^kl_temperature: expected a number for backend 'cpu'"):
        case.call(case.embeddings, kl_temperature=torch.tensor(2.0).requires_grad_(), backend="cpu")
