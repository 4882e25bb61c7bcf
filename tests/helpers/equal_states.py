"""The state that training steps leave behind, and whether two of them left the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from helpers.small_cohort import batches
from mclfast.train.state import FREE_SETTINGS
from mclfast.train.trainer import Trainer


def steps_of(trainer: Trainer, count: int) -> dict[str, Any]:
    """All that the first steps leave behind, from the same random numbers each time."""
    torch.manual_seed(5)
    trainer.cohort.train()
    trainer.method.train()
    losses = [trainer.train_step(*b)["loss"].detach() for b in batches(trainer, count)]
    grads = {
        f"{kind}.{name}": p.grad
        for kind, module in (("cohort", trainer.cohort), ("method", trainer.method))
        for name, p in module.named_parameters()
    }
    return {"losses": losses, "grads": grads, "state": trainer.state()}


def meta_gradients(trainer: Trainer, count: int) -> list[Tensor]:
    """Gradients of some bilevel steps, each after an ordinary step."""
    found: list[Tensor] = []
    assert trainer.train_step.meta_optimizer is not None
    trainer.train_step.meta_optimizer.register_step_pre_hook(
        lambda optimizer, *_: found.extend(
            p.grad.clone() for group in optimizer.param_groups for p in group["params"]
        )
    )
    torch.manual_seed(5)
    for images, batch in batches(trainer, count):
        trainer.train_step(images, batch)
        trainer.train_step.bilevel(images, batch, 0.05)
    return found


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a nested value with its path."""
    if isinstance(value, dict):
        for k, v in value.items():
            yield from tensors(v, f"{path}/{k}")
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            yield from tensors(v, f"{path}/{i}")
    else:
        yield path, value


def assert_same(found: Any, wanted: Any, tolerance: float) -> None:
    """Floating-point values to a share of the largest in their tensor, all else exactly.

    Values below 1e-3 count as 1e-3: the gradient of a bias before batch norm is rounding alone.
    """
    mine, theirs = dict(tensors(found)), dict(tensors(wanted))
    assert mine.keys() == theirs.keys()
    for path, want in theirs.items():
        got = mine[path]
        if not isinstance(want, Tensor) or not want.is_floating_point():
            same = torch.equal(got, want) if isinstance(want, Tensor) else got == want
            assert same or any(f"/settings/{free}" in path for free in FREE_SETTINGS), path
        elif want.numel():
            error = (got.double() - want.double()).abs().max()
            assert error <= tolerance * max(1e-3, float(want.double().abs().max())), path
