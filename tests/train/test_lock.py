"""One run in a folder at a time, as long as its process lives."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from helpers.command import call, error_of
from mclfast.execution.step import TrainStep
from mclfast.train.lock import LOCK, check_held, hold

HOLDER = """
import sys, time
from pathlib import Path
from mclfast.train.lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
TINY = (
    "--data digits-full --train-per-class 2 --batch-size 20 --images-per-class 2 --device cpu "
    "--no-progress --method baseline --cohort resnet8 --epochs 1"
).split()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_second_run_is_refused_until_the_first_is_killed(capsys):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, "a"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        for command in (["train", *TINY], ["train", "--overwrite", *TINY]):
            assert error_of(capsys, *command, "--run-dir", "a") == (
                "run_dir: expected a folder that no other run writes into, got a, which process "
                f"{holder.pid} is writing into"
            )
        Path("a/config.yaml").write_text("data: digits\n")
        message = error_of(capsys, "train", "--resume", "a")
        assert message.startswith("resume: expected a folder that no other run writes into, got a")
        message = error_of(capsys, "compare", "--methods", "baseline", "--out", "a")
        assert message.startswith("out: expected a folder that no other run writes into, got a")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        # What the killed process has left is no obstacle.
        assert Path("a", LOCK).exists()
        with hold(Path("a")):
            assert Path("a", LOCK).read_text() == f"{os.getpid()}\n"
        assert not Path("a", LOCK).exists()
    finally:
        holder.kill()
        holder.wait()


def test_a_thread_may_hold_a_folder_twice_but_two_threads_may_not():
    refused: list[str] = []

    def other() -> None:
        try:
            with hold(Path("a")):
                pass
        except ValueError as error:
            refused.append(str(error))

    with hold(Path("a")):
        with hold(Path("a")):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(refused) == 1
    other()
    assert len(refused) == 1


def test_many_threads_one_after_another_find_it_free():
    inside, most = 0, 0
    done: list[int] = []

    def work() -> None:
        nonlocal inside, most
        while len(done) < 200:
            try:
                with hold(Path("a")):
                    inside += 1
                    most = max(most, inside)
                    done.append(1)
                    inside -= 1
            except ValueError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The file is removed and made anew all the time; nobody locks a removed one.
    assert most == 1


@pytest.mark.parametrize("change", ["moved", "removed", "replaced"])
def test_a_folder_that_is_gone_is_found(change: str):
    folder = Path("a")
    with hold(folder):
        check_held(folder)
        folder.rename("b") if change != "removed" else (folder / LOCK).unlink()
        if change == "replaced":
            folder.mkdir()
            (folder / LOCK).write_text("")
        with pytest.raises(FileNotFoundError, match="^run_dir: .* found it moved or deleted"):
            check_held(folder)
    if change == "replaced":
        # The lock of another folder is not removed.
        assert (folder / LOCK).exists()


def test_a_mistake_leaves_no_folder(capsys):
    error_of(capsys, "train", *TINY, "--device", "tpu", "--run-dir", "new/a")
    assert not Path("new").exists()


def test_a_folder_deleted_in_training_is_one_line(capsys, monkeypatch):
    step = TrainStep.__call__

    def deleting(self: TrainStep, *batch: object) -> object:
        shutil.rmtree("a")
        return step(self, *batch)

    monkeypatch.setattr(TrainStep, "__call__", deleting)
    message = error_of(capsys, "train", *TINY, "--run-dir", "a")
    assert message.startswith("run_dir: expected the folder a as at the start, found it moved")
    assert not Path("a").exists()


def test_runs_with_other_settings_get_other_folders(capsys):
    assert call("train", *TINY) == 0
    assert call("train", *TINY, "--lr", "0.2", "--device", "cpu") == 0
    usual = "digits-full-baseline-resnet8-seed0-train-per-class=2-epochs=1-batch-size=20"
    found = sorted(path.name for path in Path("runs").iterdir())
    assert found == [f"{usual}-images-per-class=2", f"{usual}-images-per-class=2-lr=0.2"]
    assert error_of(capsys, "train", *TINY).startswith("run_dir: expected a new folder")
