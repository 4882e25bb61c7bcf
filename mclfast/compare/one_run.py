"""One run of a comparison, in this process or in a process of its own.

``python -m mclfast.compare.one_run`` reads the run as a line of JSON from stdin. When stdin is
closed, the process that started it is gone or wants no more, and this process saves and exits; a
step that takes too long is not waited for, as checkpoints are complete at any moment.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mclfast._base.checks import shortened
from mclfast._base.files import write_sealed_json, write_text
from mclfast._base.machine import peak_resident, select_device
from mclfast._base.terminal import printable
from mclfast.config import TrainConfig
from mclfast.models import parameter_count
from mclfast.train.builder import build
from mclfast.train.folder import CHECKPOINT, remove_old_run
from mclfast.train.lock import hold
from mclfast.train.signals import Interrupted, heeded

#: Files written next to those of a run: its time and memory, or the reason of its failure.
COST, FAILURE = "cost.json", "failure.txt"

# Seconds in which a run that is told to end can save.
_PATIENCE = 60


def perform(
    values: dict[str, Any], folder: Path, *, replace: bool, progress: bool, alone: bool
) -> str | None:
    """Trains a run to its end, from its checkpoint if there is one.

    An error is written to ``failure.txt``, if that is possible: the reason in the first line, then
    the traceback.

    Args:
        values: settings of the run, by name.
        folder: folder of the run.
        replace: whether to remove a run that is already in the folder.
        progress: whether to show a progress bar.
        alone: whether this process serves this run only, so that its peak memory is the run's.

    Returns:
        The reason if the run failed, None if it finished.
    """
    try:
        (folder / FAILURE).unlink(missing_ok=True)
        _train(TrainConfig.from_values(values), folder, replace, progress, alone)
    # Any error, even a defect of a method, ends this run only: the other runs go on.
    except Exception as error:
        reason = " ".join(str(error).split())
        if type(error) not in (ValueError, FloatingPointError):
            reason = f"{type(error).__name__}: {reason}"
        # Some errors of CUDA fill a page.
        reason = shortened(reason, 300)
        # The failure may be a full disk, on which nothing can be written.
        with suppress(OSError):
            write_text(folder / FAILURE, f"{reason}\n\n{traceback.format_exc()}")
        return reason
    return None


def _train(config: TrainConfig, folder: Path, replace: bool, progress: bool, alone: bool) -> None:
    device = select_device(config.device)
    if device.type == "cuda":
        # Statistics of a device can be reset only after it has been used.
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
    trainer = build(config, folder)
    if replace:
        with hold(folder, "out"):
            # Removed only now, so that settings that cannot work cost no old run.
            remove_old_run(folder)
            (folder / COST).unlink(missing_ok=True)
    before = _checkpoint_time(folder)
    with heeded(trainer.stop):
        trainer.fit(progress=progress)
    # A run that only wrote its files again has not shown the memory of training.
    trained = _checkpoint_time(folder) != before
    if not trained and (folder / COST).is_file():
        return
    peak: int | None = None
    if trained and device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    elif trained and alone:
        peak = peak_resident()
    cost = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": peak,
        "parameters": [parameter_count(p.backbone) for p in trainer.cohort.peers],
        "parameters_in_training": parameter_count(trainer.cohort) + parameter_count(trainer.method),
    }
    write_sealed_json(folder / COST, cost)


def _checkpoint_time(folder: Path) -> int | None:
    """Time of the checkpoint in ns; None without one. It changes with every epoch trained."""
    path = folder / CHECKPOINT
    return path.stat().st_mtime_ns if path.is_file() else None


def _leave_with_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os._exit(1)


def main() -> int:
    """Reads a run from stdin and trains it; returns 1 if it failed, else 0."""
    task = json.loads(sys.stdin.readline())
    # Training has a handler of its own, which saves first.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    folder = Path(task["folder"])
    try:
        reason = perform(
            task["values"], folder, replace=task["replace"], progress=task["progress"], alone=True
        )
    except Interrupted as error:
        return error.status
    if reason is not None and not (folder / FAILURE).is_file():
        print(printable(reason), file=sys.stderr)
    return 0 if reason is None else 1


if __name__ == "__main__":
    sys.exit(main())
