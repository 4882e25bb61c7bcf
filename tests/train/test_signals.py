"""A run that is asked to end saves within a step, says how to go on, and goes on bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.command import call, contents, error_of
from mclfast.execution.step import TrainStep
from mclfast.train import checkpoint, evaluation
from mclfast.train.folder import CHECKPOINT
from mclfast.train.signals import Interrupted, heeded

pytestmark = pytest.mark.usefixtures("one_thread")

# Four steps an epoch, a bilevel step in every second.
RUN = (
    "train --data digits-full --train-per-class 8 --batch-size 20 --images-per-class 2 "
    "--device cpu --cohort resnet8 --epochs 2 --projection-dim 4 --matcher-dim 4 "
    "--bilevel-every 2"
).split()
STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGUSR1": 138}
WORDS = {name: f"ended by {name}" for name in STATUS} | {"SIGINT": "interrupted"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights of the run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with torch.random.fork_rng():
        assert call(*RUN, "--no-progress", "--run-dir", folder) == 0
    return weights(folder)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def not_ignored() -> Iterator[None]:
    """A shell that starts the tests in its background has them ignore some signals."""
    numbers = [getattr(signal, name) for name in STATUS]
    before = {number: signal.signal(number, nothing) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def nothing(*_: object) -> None:
    """A handler."""


def weights(folder: Path) -> dict[str, bytes]:
    return {k: v for k, v in contents(folder).items() if k.endswith(".safetensors")}


def at_step(number: int, act: Callable[[], Any]) -> Callable[..., Any]:
    """A training step that does something before the step of that number."""
    original = TrainStep.__call__

    def step(self: TrainStep, images: Any, batch: Any) -> Any:
        if batch.step == number:
            act()
        return original(self, images, batch)

    return step


@pytest.mark.parametrize(("name", "step"), [*zip(STATUS, [1, 3, 5, 0], strict=True)])
def test_a_signal_saves_within_the_step(name, step, whole, monkeypatch, capsys):
    number = getattr(signal, name)
    with monkeypatch.context() as patch:
        send = at_step(step, lambda: os.kill(os.getpid(), number))
        patch.setattr(TrainStep, "__call__", send)
        assert call(*RUN, "--no-progress", "--run-dir", "a b") == STATUS[name]
    assert signal.getsignal(number) is nothing
    assert capsys.readouterr().err == (
        f"\n{WORDS[name]}; go on with: mclfast train --resume 'a b'\n"
    )
    assert checkpoint.load(Path("a b", CHECKPOINT))["step"] == step + 1
    assert call("train", "--no-progress", "--resume", "a b") == 0
    place = f"resume after step {step + 1} of 8, in epoch {1 + (step + 1) // 5} of 2"
    assert place in capsys.readouterr().out
    assert weights(Path("a b")) == whole


def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(whole, monkeypatch, capsys):
    batches, seen = evaluation.batches_for, []

    def slow(*arguments: Any) -> Any:
        for batch in batches(*arguments):
            seen.append(1)
            # The first batch is that of the trial before the training.
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "batches_for", slow)
        assert call(*RUN, "--no-progress", "--run-dir", "a") == 143
    state = checkpoint.load(Path("a", CHECKPOINT))
    assert (len(seen), state["step"], len(state["history"])) == (2, 4, 0)
    assert call("train", "--no-progress", "--resume", "a") == 0
    assert weights(Path("a")) == whole


def test_a_second_signal_leaves_at_once(monkeypatch, capsys):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal was not heeded")

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", at_step(2, twice))
        # The first signal is the reason.
        assert call(*RUN, "--no-progress", "--run-dir", "a") == 143
    assert not Path("a", CHECKPOINT).exists()


def test_ignored_signals_stay_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with heeded(lambda: pytest.fail("heeded")):
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_the_reason_of_an_interruption_is_known():
    with pytest.raises(Interrupted) as error:
        with heeded(lambda: None):
            raise KeyboardInterrupt
    assert error.value.status == 130


def test_resume_without_a_checkpoint(monkeypatch, capsys, whole):
    def killed() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", at_step(0, killed))
        assert call(*RUN, "--no-progress", "--run-dir", "a") == 130
    capsys.readouterr()
    assert call("train", "--no-progress", "--resume", "a") == 0
    assert "resume from the first step, as a has no checkpoint.pt yet" in capsys.readouterr().out
    assert weights(Path("a")) == whole
    Path("a", CHECKPOINT).unlink()
    before = contents(Path("a"))
    assert error_of(capsys, "train", "--no-progress", "--resume", "a") == (
        "resume: expected checkpoint.pt in a, where 2 epochs were trained, found none; train anew "
        "with --run-dir and --overwrite"
    )
    assert contents(Path("a")) == before
