"""The bilevel gradient against autograd through the unrolled steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.unrolled import unrolled
from mclfast import bilevel_gradient


def problem(seed: int = 0):
    """Parameters, hyperparameters and two smooth objectives on them."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    params = {"a": draw(3, 2), "b": draw(2), "unused": draw(2)}
    hyper = [draw(3).requires_grad_(), draw(2).requires_grad_()]
    x, y = draw(5, 3), draw(5, 2)

    def inner(p):
        h = torch.tanh(x * hyper[0] @ p["a"] + p["b"])
        return ((h - y) ** 2 * torch.sigmoid(hyper[1])).sum() + (p["b"] ** 4).sum()

    def outer(p):
        return (torch.sin(x @ p["a"]) * y).mean() + (p["a"] ** 2).sum()

    return params, hyper, inner, outer


@pytest.mark.parametrize("inner_steps", [1, 2, 4])
@pytest.mark.parametrize("outer_steps", [0, 1, 2])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.3)])
def test_equals_autograd_through_unrolled_steps(inner_steps, outer_steps, momentum, weight_decay):
    params, hyper, inner, outer = problem()
    settings = {"lr": 0.05, "momentum": momentum, "weight_decay": weight_decay}
    got = bilevel_gradient(
        inner, outer, params, hyper, inner_steps=inner_steps, outer_steps=outer_steps, **settings
    )
    loss, want = unrolled(params, hyper, inner, outer, inner_steps, outer_steps, **settings)
    torch.testing.assert_close(got.outer_loss, loss.detach(), rtol=1e-12, atol=0)
    for g, w in zip(got.grads, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)
    assert len(got.inner_losses) == inner_steps
    torch.testing.assert_close(got.inner_losses[0], inner(params).detach())
    assert not any(t.requires_grad for t in (*got.grads, *got.inner_losses, got.outer_loss))


def test_matches_finite_differences():
    params, hyper, inner, outer = problem(1)

    def value() -> float:
        return float(
            bilevel_gradient(inner, outer, params, hyper, lr=0.05, weight_decay=0.1).outer_loss
        )

    got = bilevel_gradient(inner, outer, params, hyper, lr=0.05, weight_decay=0.1).grads
    step = 1e-5
    for h, grad in zip(hyper, got, strict=True):
        for i in range(h.numel()):
            with torch.no_grad():
                h[i] += step
                up = value()
                h[i] -= 2 * step
                down = value()
                h[i] += step
            assert abs((up - down) / (2 * step) - float(grad[i])) < 1e-7


def test_changes_nothing_and_recomputes_the_same_random_numbers():
    params, hyper, inner, outer = problem()
    params["a"].requires_grad_()
    params["a"].grad = torch.ones_like(params["a"])
    before = {k: v.detach().clone() for k, v in params.items()}

    def noisy(p):
        noise = torch.randn(2, dtype=torch.float64)
        return inner(p) + (noise * p["b"] * hyper[1]).sum()

    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = bilevel_gradient(noisy, outer, params, hyper, lr=0.05)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in before.items():
        assert torch.equal(params[name], value)
    assert torch.equal(params["a"].grad, torch.ones_like(params["a"]))
    assert all(h.grad is None for h in hyper)

    # The noise of the steps, drawn once and kept, gives the gradient it must equal.
    torch.set_rng_state(state)
    kept = iter([torch.randn(2, dtype=torch.float64) for _ in range(2)])
    plain = {k: v.detach() for k, v in params.items()}

    def replay(p):
        return inner(p) + (next(kept) * p["b"] * hyper[1]).sum()

    _, want = unrolled(plain, hyper, replay, outer, 2, 1, 0.05, 0.9, 0.0)
    for g, w in zip(first.grads, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


def test_works_without_gradient_mode():
    params, hyper, inner, outer = problem()
    want = bilevel_gradient(inner, outer, params, hyper, lr=0.05).grads
    with torch.no_grad():
        got = bilevel_gradient(inner, outer, params, hyper, lr=0.05).grads
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_an_inner_loss_without_hyperparameters_gives_zero():
    params, hyper, _, outer = problem()
    got = bilevel_gradient(outer, outer, params, hyper, lr=0.05)
    assert not any(g.any() for g in got.grads)


def test_errors():
    params, hyper, inner, outer = problem()
    nan, inf = float("nan"), float("inf")
    for change, message in (
        ({"inner_steps": 0}, "inner_steps: expected an integer >= 1, got 0"),
        ({"inner_steps": 1.5}, "inner_steps: expected an integer >= 1, got 1.5"),
        ({"inner_steps": True}, "inner_steps: expected an integer >= 1, got True"),
        ({"outer_steps": -1}, "outer_steps: expected an integer >= 0, got -1"),
        ({"outer_steps": "1"}, "outer_steps: expected an integer >= 0, got '1'"),
        *(({"lr": v}, f"lr: expected a finite number > 0, got {v}") for v in (0, -0.1, nan, inf)),
        *(
            ({name: v}, f"{name}: expected a finite number >= 0, got {v}")
            for name in ("momentum", "weight_decay")
            for v in (-0.1, nan, inf)
        ),
        ({"params": {}}, "params: expected at least one tensor, got none"),
        (
            {"hyperparams": [torch.ones(1)]},
            r"hyperparams\[0\]: expected a tensor with requires_grad",
        ),
    ):
        call = {"params": params, "hyperparams": hyper, "lr": 0.1} | change
        with pytest.raises(ValueError, match=f"^{message}"):
            bilevel_gradient(inner, outer, **call)
    for change, message in (
        ({"lr": "fast"}, "lr: expected a number > 0, got 'fast'"),
        ({"momentum": None}, "momentum: expected a number >= 0, got None"),
        ({"params": [torch.ones(1)]}, "params: expected a mapping of tensors, got list"),
        ({"params": {"a": torch.ones(1).long()}}, r"params\['a'\]: expected a floating-point"),
        ({"hyperparams": 3}, "hyperparams: expected a list of tensors, got 3"),
        ({"hyperparams": [3]}, r"hyperparams\[0\]: expected a tensor, got 3"),
        # Its rows ask for a gradient too, which would be zero for each.
        ({"hyperparams": hyper[0]}, "hyperparams: expected a list of tensors, got float64 tensor"),
    ):
        call = {"params": params, "hyperparams": hyper, "lr": 0.1} | change
        with pytest.raises(TypeError, match=f"^{message}"):
            bilevel_gradient(inner, outer, **call)


@pytest.mark.parametrize("argument", ["inner", "outer"])
def test_losses_that_cannot_be_differentiated(argument):
    params, hyper, inner, outer = problem()
    leaf = params["a"].clone().requires_grad_()
    for wrong, message in (
        (lambda p: inner(p).item(), "expected a 0-dim loss, got [0-9.]+"),
        (lambda p: p["b"] * hyper[1], r"expected a 0-dim loss, got float64 tensor of shape \[2\]"),
        (lambda p: inner(p).detach(), "expected a loss that depends on the params"),
        (lambda p: inner(params) * 1.0, "expected a loss that depends on the params"),
        (lambda p: (leaf**2).sum() * hyper[0].sum(), "expected a loss that depends on the params"),
    ):
        losses = {"inner": inner, "outer": outer} | {argument: wrong}
        with pytest.raises(ValueError, match=f"^{argument}: {message}"):
            bilevel_gradient(**losses, params=params, hyperparams=hyper, lr=0.1)


def test_hyperparameters_from_a_generator():
    params, hyper, inner, outer = problem()
    want = bilevel_gradient(inner, outer, params, hyper, lr=0.05).grads
    got = bilevel_gradient(inner, outer, params, (h for h in hyper), lr=0.05).grads
    assert len(got) == 2 and all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


STEPS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.3}


def call(kind, inner, outer, params, hyper, **steps):
    """The bilevel gradient without networks, or with ones that give the parameters back."""
    if kind == "losses":
        return bilevel_gradient(inner, outer, params, hyper, **STEPS, **steps)

    def network(p):
        return {k: v * 1 for k, v in p.items()}

    if kind == "whole":
        return bilevel_gradient(inner, outer, params, hyper, network=network, **STEPS, **steps)
    parts = [lambda p: network(p)["a"], lambda p: [p["b"] * 1, p["unused"] * 1]]

    def named(outputs):
        return {"a": outputs[0], "b": outputs[1][0], "unused": outputs[1][1]}

    losses = (lambda o: inner(named(o))), (lambda o: outer(named(o)))
    return bilevel_gradient(*losses, params, hyper, network=parts, **STEPS, **steps)


def close(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


KINDS = pytest.mark.parametrize("kind", ["losses", "whole", "parts"])


@KINDS
@pytest.mark.parametrize("steps", [(1, 0), (2, 1)], ids=str)
def test_the_outer_loss_reads_hyperparameters(kind, steps):
    params, hyper, inner, outer = problem()
    counts = dict(zip(("inner_steps", "outer_steps"), steps, strict=True))

    def direct(p):
        return outer(p) + (hyper[0] ** 3).sum() + (hyper[1] * p["b"]).sum()

    got = call(kind, inner, direct, params, hyper, **counts).grads
    close(got, unrolled(params, hyper, inner, direct, *steps, *STEPS.values())[1])
    # A hyperparameter that only the outer loss reads.
    only = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    found = call(kind, inner, lambda p: outer(p) + only.square(), params, [only], **counts)
    assert found.grads[0] == 1.0


@KINDS
@pytest.mark.parametrize("steps", [(1, 0), (2, 1)], ids=str)
def test_learned_initial_values(kind, steps):
    """Hyperparameters among the parameters, and ones that parameters are computed from."""
    params, hyper, inner, outer = problem()
    counts = dict(zip(("inner_steps", "outer_steps"), steps, strict=True))
    a = params["a"].requires_grad_()
    factor = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    params["b"] = params["b"] * factor

    def near_the_start(p):
        return inner(p) + (p["a"] - a).square().sum()

    hyper = [a, *hyper, factor]
    got = call(kind, near_the_start, outer, params, hyper, **counts).grads
    # The graph of the parameters is still there.
    with torch.no_grad():
        again = call(kind, near_the_start, outer, params, hyper, **counts).grads
    want = unrolled(params, hyper, near_the_start, outer, *steps, *STEPS.values())[1]
    assert all(w.abs().max() > 1e-4 for w in want)
    close(got, want)
    close(again, want)


@KINDS
def test_parameters_that_do_not_train(kind):
    params, hyper, inner, outer = problem()
    params["b"] = torch.nn.Parameter(params["b"], requires_grad=False)
    params["unused"] = torch.nn.Parameter(params["unused"])
    fixed = params["b"].detach().clone()
    trained = {k: v.detach() for k, v in params.items() if k != "b"}
    losses = [lambda p, loss=loss: loss({**p, "b": fixed}) for loss in (inner, outer)]
    _, want = unrolled(trained, hyper, *losses, 2, 1, *STEPS.values())
    seen = []

    def looked(p):
        seen.append(p["b"].detach().clone())
        return outer(p)

    close(call(kind, inner, looked, params, hyper).grads, want)
    assert torch.equal(params["b"], fixed) and all(torch.equal(b, fixed) for b in seen)
    frozen = {k: torch.nn.Parameter(v, requires_grad=False) for k, v in params.items()}
    with pytest.raises(ValueError, match="^params: expected .* with requires_grad, got none"):
        call(kind, inner, outer, frozen, hyper)


@KINDS
def test_operations_that_cannot_be_differentiated_twice(kind):
    params, hyper, inner, outer = problem()
    hard = torch.nn.functional.hardsigmoid

    def wrong(p):
        return inner(p) + hard(p["a"] * p["b"]).square().sum()

    with pytest.raises(NotImplementedError, match="differentiated twice, got hardsigmoid$"):
        call(kind, wrong, outer, params, hyper)
