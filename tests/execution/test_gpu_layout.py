"""Whole training steps on a GPU; skipped where there is none (see scripts/gpu_check.sh)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from helpers.every_method import METHODS, first_batch, trainer_of
from mclfast.execution.cuda_graphs import GraphedStep
from mclfast.train.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

#: Methods whose loss the settings allow to be recorded.
REPEATABLE = ("baseline", "dml", "cl-ilr", "mcl", "lmcl", "kdcl minlogit", "kdcl general")


def on_gpu(name: str, **values: Any) -> Trainer:
    return trainer_of(name, device="cuda", **values)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def steps(trainer: Trainer, count: int) -> list[float]:
    """Losses of some training steps."""
    found = []
    for step in range(count):
        images, batch = first_batch(trainer, step)
        found.append(trainer.train_step(images, batch)["loss"])
    return torch.stack(found).tolist()


def check_same(plain: Trainer, fast: Trainer, count: int = 5) -> None:
    """Losses of the first steps, before rounding errors have grown."""
    assert steps(fast, count) == pytest.approx(steps(plain, count), rel=2e-2)
    for (name, x), y in zip(plain.cohort.named_buffers(), fast.cohort.buffers(), strict=True):
        torch.testing.assert_close(y, x, rtol=5e-2, atol=5e-2, msg=name)


@pytest.mark.parametrize("name", METHODS)
def test_no_step_waits_for_the_device(name: str):
    trainer = on_gpu(name, clip_grad_norm=1.0)
    # The first step compiles kernels and fills tables.
    steps(trainer, 1)
    images, batch = first_batch(trainer, 1)
    with waiting_is_an_error():
        parts = trainer.train_step(images, batch)
    assert torch.isfinite(parts["loss"])


def test_the_watch_sees_what_waits():
    x = torch.ones(3, device="cuda")
    with waiting_is_an_error(), pytest.raises(RuntimeError):
        x.sum().item()


def test_a_whole_epoch_waits_at_its_end_alone():
    trainer = on_gpu("lmcl", epochs=1, bilevel_every=0)
    steps(trainer, 1)
    rows = trainer.sampler.epoch(0).cuda()
    total = torch.zeros((), device="cuda")
    with waiting_is_an_error():
        for row in rows:
            images = trainer.data.train.images[row]
            trainer.feed._augment(images, seed=0, step=1)
            total += images.sum()
    assert float(total) > 0


@pytest.mark.parametrize("name", REPEATABLE)
def test_graphs_equal_plain_steps(name: str):
    plain, fast = (on_gpu(name, cuda_graphs=on) for on in (False, True))
    assert isinstance(fast.train_step.compute, GraphedStep)
    check_same(plain, fast)


def test_a_graph_is_recorded_beside_a_thread_that_pins_memory():
    """As the loader of streamed images does."""
    ended = threading.Event()

    def pin() -> None:
        while not ended.is_set():
            torch.empty(2**20).pin_memory()

    plain, fast = (on_gpu("mcl", cuda_graphs=on) for on in (False, True))
    thread = threading.Thread(target=pin)
    thread.start()
    try:
        check_same(plain, fast)
    finally:
        ended.set()
        thread.join()


def test_graphs_with_bilevel_steps_and_a_falling_learning_rate():
    settings = {"epochs": 3, "bilevel_every": 2, "matcher_dim": 8}
    plain, fast = (on_gpu("lmcl", cuda_graphs=on, **settings) for on in (False, True))
    for trainer in (plain, fast):
        trainer.fit(progress=False)
    losses = [[row["train_loss"] for row in t.history] for t in (plain, fast)]
    assert losses[1] == pytest.approx(losses[0], rel=5e-2)


@pytest.mark.parametrize("way", ["stack", "streams", "auto"])
@pytest.mark.parametrize("graphs", [False, True])
def test_peers_in_parallel_equal_separate_ones(way: str, graphs: bool):
    check_same(on_gpu("lmcl"), on_gpu("lmcl", peers_parallel=way, cuda_graphs=graphs))


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_channels_last_equals_contiguous(amp: str):
    plain, fast = (on_gpu("lmcl", amp=amp, channels_last=on) for on in ("off", "on"))
    check_same(plain, fast, count=2 if amp == "bf16" else 5)


def test_compiled_peers_equal_plain_ones():
    check_same(on_gpu("lmcl"), on_gpu("lmcl", compile_peers=True))


def times(call: Callable[[], object]) -> float:
    """Milliseconds of ten calls."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    begin.record()
    for _ in range(10):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def test_a_graph_is_faster_for_networks_as_small_as_these():
    plain, fast = (on_gpu("lmcl", cuda_graphs=on) for on in (False, True))
    images, batch = first_batch(plain)
    assert times(lambda: fast.train_step(images, batch)) < times(
        lambda: plain.train_step(images, batch)
    )
