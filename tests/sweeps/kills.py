"""Runs that are killed again and again, and must end with the weights of one that was not."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

_COMMON = (
    "train --data digits-full --train-per-class 8 --batch-size 20 --images-per-class 2 "
    "--device cpu --epochs 3 --projection-dim 4 --no-progress"
).split()
#: Settings that write different things into a checkpoint.
RUNS = {
    "baseline": "--method baseline --cohort resnet8 --checkpoint-every 1",
    "lmcl": "--method lmcl --cohort resnet8 --matcher-dim 4 --bilevel-every 2 --checkpoint-every 3",
    "mcl": "--method mcl --cohort resnet8,resnet8 --loss bank --num-negatives 8",
}


def sweep(count: int, seed: int) -> dict[str, int]:
    """Kills runs at random moments, and lets each go on until it ends.

    A quarter of the kills are SIGTERM, at which a run saves before it leaves.

    Args:
        count: kills in all.
        seed: seed of the moments.

    Returns:
        tried: kills that found a run alive; survived: how many of them were in runs that ended
        with the same weights; lost: in runs that ended with others; refused: in runs that did not
        go on.
    """
    rng = random.Random(seed)
    counts = {"tried": 0, "survived": 0, "refused": 0, "lost": 0}
    with tempfile.TemporaryDirectory() as place:
        whole: dict[str, tuple[str, float]] = {}
        while counts["tried"] < count:
            name = rng.choice(sorted(RUNS))
            if name not in whole:
                whole[name] = _uninterrupted(name, Path(place, name))
            wanted, seconds = whole[name]
            folder = Path(place, "killed")
            kills = rng.randint(1, min(4, count - counts["tried"]))
            done, outcome = _killed_run(name, folder, kills, seconds, rng)
            if outcome == "ended":
                outcome = "survived" if _weights(folder) == wanted else "lost"
            if outcome != "survived":
                print(f"kills: seed {seed}, {name}, {counts['tried']} to {done} more: {outcome}")
                print((folder.with_suffix(".log")).read_text())
            counts["tried"] += done
            counts[outcome] += done
            shutil.rmtree(folder, ignore_errors=True)
    return counts


def _uninterrupted(name: str, folder: Path) -> tuple[str, float]:
    """Weights of a run and its time in seconds, the start of its process included."""
    started = time.monotonic()
    process = _started(name, folder)
    process.join()
    if process.exitcode:
        raise RuntimeError((folder.with_suffix(".log")).read_text())
    return _weights(folder), time.monotonic() - started


def _killed_run(
    name: str, folder: Path, kills: int, seconds: float, rng: random.Random
) -> tuple[int, str]:
    """Number of kills that found the run alive, and "ended" or "refused"."""
    done = 0
    for _ in range(kills):
        process = _started(name, folder)
        # Late enough to be in training, most times; what is left gets shorter with each kill.
        process.join(rng.uniform(0.1, 0.9) * seconds)
        assert process.pid is not None
        if process.exitcode is None:
            number = signal.SIGTERM if rng.random() < 0.25 else signal.SIGKILL
            os.kill(process.pid, number)
            done += 1
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM):
            return done, "refused"
    last = _started(name, folder)
    last.join()
    return done, "ended" if last.exitcode == 0 else "refused"


def _started(name: str, folder: Path) -> BaseProcess:
    """A process that begins a run, or goes on with it."""
    command = [*_COMMON, *RUNS[name].split(), "--run-dir", str(folder)]
    if (folder / "config.yaml").exists():
        command = ["train", "--no-progress", "--resume", str(folder)]
    # Its server has imported the package once for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mclfast.train.trainer", "sweeps.kills"])
    process = context.Process(target=_train, args=(command, str(folder.with_suffix(".log"))))
    process.start()
    return process


def _train(command: list[str], log: str) -> None:
    import torch

    from mclfast.cli.main import main

    torch.set_num_threads(1)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(command))


def _weights(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("peer*/backbone.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
