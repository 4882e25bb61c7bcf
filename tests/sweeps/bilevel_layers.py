"""Bilevel gradients through the layers of torch.nn, against autograd through unrolled steps."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from helpers.layer_cases import LAYERS, LayerNet, functions_of
from helpers.unrolled import unrolled
from mclfast import bilevel_gradient
from mclfast._base.random import rng_restored

STEPS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.02}
#: Largest error that counts as right, relative to the largest gradient.
TOLERANCE = 1e-9
#: Ways to pass the network: one function, one of two functions, or inside of the losses.
KINDS = ("whole", "parts", "losses")


class Found(NamedTuple):
    """Outcome of a case; the error is infinite where the gradients could not be compared."""

    outcome: str
    error: float = 0.0
    text: str = ""


def compared(
    name: str, kind: str, *, channels_last: bool, training: bool, seed: int, steps: tuple[int, int]
) -> Found:
    """Compares the gradient through a layer with the unrolled one.

    Args:
        name: name of the layer.
        kind: one of :data:`KINDS`.
        channels_last: memory format.
        training: mode of the network.
        seed: of parameters and data.
        steps: numbers of inner and of outer steps.

    Returns:
        "right" or "wrong"; "refused" where the unrolled steps cannot be differentiated and an error
        says so, "lost" where only one of the two can.
    """
    with rng_restored():
        torch.manual_seed(seed)
        net = LayerNet(name, channels_last=channels_last, training=training)
        images = [torch.randn(4, 2, 6, 6, dtype=torch.float64) for _ in range(2)]
        hyper = [torch.randn(4, dtype=torch.float64, requires_grad=True)]
        functions = [functions_of(net, view) for view in images]
        params = {k: v.detach() for k, v in net.named_parameters()}

        def inner(outputs: list[dict[str, Tensor]]) -> Tensor:
            a, b = (out["flat"] for out in outputs)
            each = (a.cos() * b).mean(1) + a.square().mean(1)
            return (hyper[0].sigmoid() * each).mean()

        def outer(outputs: list[dict[str, Tensor]]) -> Tensor:
            a, b = (out["flat"] for out in outputs)
            return (a.sin() * b).mean() + b.square().mean() + hyper[0].square().sum() / 100

        def both(theta: dict[str, Tensor]) -> list[dict[str, Tensor]]:
            return [function(theta) for function in functions]

        def whole(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda theta: loss(both(theta))

        losses: tuple[Callable[..., Tensor], ...] = whole(inner), whole(outer)
        want: list[Tensor] | str
        torch.manual_seed(seed)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                want = list(unrolled(params, hyper, *losses, *steps, *STEPS.values())[1])
        except RuntimeError as error:
            want = str(error).splitlines()[0]
        if kind != "losses":
            losses = inner, outer
        network = {"whole": both, "parts": functions, "losses": None}[kind]
        torch.manual_seed(seed)
        try:
            got = bilevel_gradient(
                *losses,
                params,
                hyper,
                network=network,
                inner_steps=steps[0],
                outer_steps=steps[1],
                **STEPS,
            ).grads
        except NotImplementedError as error:
            return Found("refused" if isinstance(want, str) else "lost", text=str(error))
        if isinstance(want, str):
            return Found("lost", float("inf"), want)
    error = max(float((g - w).abs().max() / w.abs().max()) for g, w in zip(got, want, strict=True))
    return Found("right" if error <= TOLERANCE else "wrong", error)


def sweep(count: int, seed: int) -> dict[str, int]:
    """Tries layers in random modes, formats and numbers of steps.

    Args:
        count: number of cases.
        seed: of the choice of cases, and of the first case.
    """
    chosen = random.Random(seed)
    counts = dict.fromkeys(("tried", "survived", "refused", "lost"), 0)
    cases = list(itertools.product(LAYERS, KINDS, (False, True), (False, True)))
    for number in range(count):
        name, kind, channels_last, training = chosen.choice(cases)
        steps = chosen.randint(1, 3), chosen.randint(0, 2)
        modes = {"channels_last": channels_last, "training": training, "steps": steps}
        found = compared(name, kind, seed=seed + number, **modes)
        outcome = {"right": "survived", "refused": "refused"}.get(found.outcome, "lost")
        counts["tried"] += 1
        counts[outcome] += 1
        if outcome == "lost":
            print(f"seed {seed + number}: {name}, {kind}, {modes}: {found}")
    return counts
