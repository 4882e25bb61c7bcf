"""No training step waits for the device: what would is an error here, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.every_method import METHODS, first_batch, trainer_of
from mclfast import methods
from mclfast.banks import memory_bank, sampler
from mclfast.execution.non_finite import Watch
from mclfast.losses import banks
from mclfast.methods import _simplex

pytestmark = pytest.mark.usefixtures("one_thread")

# Their results have a size, or are a number, that only the device knows.
_WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "equal",
    "unique_consecutive",
    "is_nonzero",
    "_is_all_true",
    "_is_any_true",
}
# These copy numbers of the host.
_COPIES = {torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.tolist}


class HostSync(RuntimeError):
    """A step waited for the device."""

    allowed = False


@pytest.fixture(autouse=True)
def optimizers_count_on_the_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Adam's number of steps is a tensor of the host, on which this test cannot tell it apart."""
    monkeypatch.setattr(HostSync, "allowed", False)
    hooks = [
        register_optimizer_step_pre_hook(lambda *_: setattr(HostSync, "allowed", True)),
        register_optimizer_step_post_hook(lambda *_: setattr(HostSync, "allowed", False)),
    ]
    yield
    for hook in hooks:
        hook.remove()


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        counts = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        waits = name in _WAITS or masks or (counts and "Tensor" in func._overloadname)
        if waits and not HostSync.allowed:
            raise HostSync(name)
        return func(*args, **(kwargs or {}))


class NoCopies(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _COPIES and not HostSync.allowed:
            raise HostSync(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def watched() -> ExitStack:
    stack = ExitStack()
    stack.enter_context(NoCopies())
    stack.enter_context(NoWaiting())
    return stack


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.tolist(),
        lambda x: torch.tensor([1.0, 2.0]),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave((x > 0).long()),
    ],
)
def test_the_watch_sees_what_waits(wait: Any):
    with watched(), pytest.raises(HostSync):
        wait(torch.ones(3))


def test_every_method_is_watched():
    assert {values["method"] for values in METHODS.values()} == set(methods.available())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_waits_for_nothing(name: str, backend: str, monkeypatch: pytest.MonkeyPatch):
    trainer = trainer_of(name, clip_grad_norm=1.0)
    # As on a GPU.
    trainer.train_step.watch = Watch(at_once=False)
    if hasattr(trainer.method.options, "backend"):
        trainer.method.options.backend = backend
    elif backend == "reference":
        pytest.skip("a method without losses of a backend")
    # These look at numbers on a CPU only.
    for module in (banks, sampler, memory_bank):
        monkeypatch.setattr(module, "check_range", lambda *_: None)
    monkeypatch.setattr(_simplex, "known_to_be_over", lambda _: False)
    for step in range(3):
        images, batch = first_batch(trainer, step)
        with watched():
            parts = trainer.train_step(images, batch)
        assert torch.isfinite(parts["loss"])
