"""The exact gradient of a bilevel objective through a few SGD steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from mclfast._checks import (
    FLOAT_DTYPES,
    check_integer,
    check_not_negative,
    check_positive,
    describe,
)

Params = dict[str, Tensor]
Objective = Callable[[Params], Tensor]


class BilevelResult(NamedTuple):
    """What :func:`bilevel_gradient` returns.

    Attributes:
        grads: gradient of the final outer loss for each hyperparameter, in the order given.
        inner_losses: value of ``inner`` before each inner step, 0-dim each.
        outer_loss: value of ``outer`` after all steps, 0-dim.
    """

    grads: tuple[Tensor, ...]
    inner_losses: tuple[Tensor, ...]
    outer_loss: Tensor


def bilevel_gradient(
    inner: Objective,
    outer: Objective,
    params: Mapping[str, Tensor],
    hyperparams: Iterable[Tensor],
    *,
    inner_steps: int = 2,
    outer_steps: int = 1,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
) -> BilevelResult:
    """Gradient of the outer loss after a few SGD steps with respect to ``hyperparams``.

    Starting from ``params`` with zero momentum, takes ``inner_steps`` SGD steps (PyTorch's update,
    no Nesterov) on ``inner``, then ``outer_steps`` on ``outer`` with the same momentum buffers, and
    differentiates ``outer`` at the end through all of them. Equals autograd through the unrolled
    steps, at the memory of one step's graph: each step is recomputed from its stored parameters
    in the reverse sweep

        u = V - lr A;   X = <g(theta, phi), u>;   A <- A + wd u + dX/dtheta;   V <- momentum u

    where A and V are the adjoints of the parameters and of the momentum. (The published code
    leaves the factor wd off the momentum adjoint.)

    Args:
        inner: maps parameters (the keys of ``params``) to a 0-dim loss that depends on
            ``hyperparams``; it must use the values it is passed, e.g. by
            ``torch.func.functional_call``, and must be differentiable twice.
        outer: likewise; the objective that ``hyperparams`` should lower.
        params: the starting point; parameters that a loss does not use count as gradient zero.
        hyperparams: tensors with ``requires_grad`` that ``inner`` reads.
        inner_steps: >= 1.
        outer_steps: >= 0.
        lr: of the SGD steps differentiated through, > 0.
        momentum, weight_decay: likewise, >= 0.

    Returns:
        BilevelResult(grads, inner_losses, outer_loss). Parameters, ``.grad`` fields and the state
        of the random number generators are left as they were; the objectives draw the same random
        numbers when recomputed. Objectives that change buffers should work on copies of them
        (:class:`mclfast.train.Trainer` does).

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Source: layer-wise MCL, arXiv 2207.11518, section 3.4.
    """
    check_integer("inner_steps", inner_steps, 1)
    check_integer("outer_steps", outer_steps, 0)
    check_positive("lr", lr)
    check_not_negative("momentum", momentum)
    check_not_negative("weight_decay", weight_decay)
    _check_params(params)
    hyperparams = _checked_hyperparams(hyperparams)
    objectives = [("inner", inner)] * inner_steps + [("outer", outer)] * outer_steps
    devices = {p.device for p in params.values()}

    with _rng_restored(devices), torch.enable_grad():
        names = list(params)
        theta = [params[name].detach() for name in names]
        velocity = [torch.zeros_like(t) for t in theta]
        visited: list[list[Tensor]] = []
        rng_states: list[_RngState] = []
        losses: list[Tensor] = []
        for name, objective in objectives:
            visited.append(theta)
            rng_states.append(_rng_state(devices))
            loss, grads = _gradient(name, objective, names, theta)
            losses.append(loss)
            velocity = [
                momentum * v + g + weight_decay * t
                for v, g, t in zip(velocity, grads, theta, strict=True)
            ]
            theta = [t - lr * v for t, v in zip(theta, velocity, strict=True)]
        outer_loss, adjoint = _gradient("outer", outer, names, theta)

        hyper_grads = [torch.zeros_like(h) for h in hyperparams]
        momentum_adjoint = [torch.zeros_like(t) for t in theta]
        for step in reversed(range(len(objectives))):
            u = [v - lr * a for v, a in zip(momentum_adjoint, adjoint, strict=True)]
            _set_rng_state(rng_states[step])
            # The parameters before the first step are given: nothing asks for their adjoint.
            along, for_hyper = _gradient_along(
                objectives[step][1], names, visited[step], u, hyperparams, with_params=step > 0
            )
            hyper_grads = [a + b for a, b in zip(hyper_grads, for_hyper, strict=True)]
            if step > 0:
                adjoint = [
                    a + weight_decay * du + h
                    for a, du, h in zip(adjoint, u, along, strict=True)
                ]
                momentum_adjoint = [momentum * du for du in u]

    return BilevelResult(tuple(hyper_grads), tuple(losses[:inner_steps]), outer_loss)


def _check_params(params: Mapping[str, Tensor]) -> None:
    if not isinstance(params, Mapping):
        raise TypeError(f"params: expected a mapping of tensors, got {describe(params)}")
    if not params:
        raise ValueError("params: expected at least one tensor, got none")
    for name, value in params.items():
        if not isinstance(value, Tensor) or value.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"params[{name!r}]: expected a floating-point tensor, got {describe(value)}"
            )


def _checked_hyperparams(hyperparams: Iterable[Tensor]) -> list[Tensor]:
    # The rows of a lone tensor would pass for hyperparameters that no loss uses.
    if isinstance(hyperparams, Tensor) or not isinstance(hyperparams, Iterable):
        raise TypeError(f"hyperparams: expected a list of tensors, got {describe(hyperparams)}")
    found = list(hyperparams)
    for i, hyperparam in enumerate(found):
        if not isinstance(hyperparam, Tensor):
            raise TypeError(f"hyperparams[{i}]: expected a tensor, got {describe(hyperparam)}")
        if not hyperparam.requires_grad:
            raise ValueError(
                f"hyperparams[{i}]: expected requires_grad=True, got a tensor without"
            )
    return found


def _leaves(names: Sequence[str], values: Sequence[Tensor]) -> Params:
    return {n: v.detach().requires_grad_() for n, v in zip(names, values, strict=True)}


def _gradient(
    argument: str, objective: Objective, names: Sequence[str], values: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Value and gradient of an objective; a parameter it does not use has gradient zero."""
    leaves = _leaves(names, values)
    loss = objective(leaves)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise ValueError(f"{argument}: expected a 0-dim loss, got {describe(loss)}")
    grads: Sequence[Tensor | None] = [None]
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    # An objective that reads its module's own parameters would give zeros without a word.
    if all(g is None for g in grads):
        raise ValueError(
            f"{argument}: expected a loss that depends on the params it is passed, "
            "got one that does not"
        )
    return loss.detach(), [
        torch.zeros_like(v) if g is None else g for g, v in zip(grads, values, strict=True)
    ]


def _gradient_along(
    objective: Objective,
    names: Sequence[str],
    values: Sequence[Tensor],
    direction: Sequence[Tensor],
    hyperparams: Sequence[Tensor],
    *,
    with_params: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradient of <g, direction> for parameters and hyperparameters; g: objective's gradient."""
    leaves = _leaves(names, values)
    grads = torch.autograd.grad(
        objective(leaves), list(leaves.values()), create_graph=True, allow_unused=True
    )
    product = sum(
        (g * d).sum() for g, d in zip(grads, direction, strict=True) if g is not None
    )
    wanted = [*(leaves.values() if with_params else ()), *hyperparams]
    if not isinstance(product, Tensor) or not product.requires_grad:
        found: Sequence[Tensor | None] = [None] * len(wanted)
    else:
        found = torch.autograd.grad(product, wanted, allow_unused=True)
    filled = [
        torch.zeros_like(w) if f is None else f for f, w in zip(found, wanted, strict=True)
    ]
    split = len(wanted) - len(hyperparams)
    return filled[:split], filled[split:]


_RngState = tuple[Tensor, dict[torch.device, Tensor]]


def _rng_state(devices: set[torch.device]) -> _RngState:
    cuda = {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}
    return torch.get_rng_state(), cuda


def _set_rng_state(state: _RngState) -> None:
    torch.set_rng_state(state[0])
    for device, value in state[1].items():
        torch.cuda.set_rng_state(value, device)


@contextmanager
def _rng_restored(devices: set[torch.device]) -> Iterator[None]:
    state = _rng_state(devices)
    try:
        yield
    finally:
        _set_rng_state(state)
