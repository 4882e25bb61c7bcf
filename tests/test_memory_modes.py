"""Memory modes of a step: all equal the ordinary one, in gradients, buffers and random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_cohort import CASES, batches, in_float64, small_trainer
from torch import Tensor

from mclfast import methods
from mclfast.train import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = ["checkpoint", "sequential"]


def step_of(trainer: Trainer, count: int = 1) -> dict[str, Any]:
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
    """Floating-point values to a tolerance, relative to the largest of their tensor; all else
    exactly."""
    mine, theirs = dict(tensors(found)), dict(tensors(wanted))
    assert mine.keys() == theirs.keys()
    for path, want in theirs.items():
        got = mine[path]
        if not isinstance(want, Tensor) or not want.is_floating_point():
            same = torch.equal(got, want) if isinstance(want, Tensor) else got == want
            assert same or path.startswith("/state/settings/memory"), path
        elif want.numel():
            error = (got.double() - want.double()).abs().max()
            assert error <= tolerance * max(1.0, float(want.double().abs().max())), path


def test_every_method_has_a_case():
    named = {values.get("method", name) for name, values in CASES.items()}
    assert named == set(methods.available())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_a_step_equals_the_ordinary_one(case: str, mode: str):
    ordinary = in_float64(small_trainer(case))
    other = in_float64(small_trainer(case, memory=mode))
    want, got = step_of(ordinary), step_of(other)
    assert_same(got, want, 1e-12)
    # Statistics are updated once, from the same values in the same order.
    for (name, a), (_, b) in zip(
        ordinary.cohort.named_buffers(), other.cohort.named_buffers(), strict=True
    ):
        assert torch.equal(a, b), name
        if name.endswith("num_batches_tracked"):
            assert int(a) > 0
    assert any(g is not None and g.any() for g in want["grads"].values())
    assert torch.equal(want["state"]["rng"]["cpu"], got["state"]["rng"]["cpu"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_steps_equal_the_ordinary_ones(case: str, mode: str):
    want = step_of(in_float64(small_trainer(case, clip_grad_norm=0.5)), 4)
    got = step_of(in_float64(small_trainer(case, clip_grad_norm=0.5, memory=mode)), 4)
    assert_same(got, want, 1e-9)
