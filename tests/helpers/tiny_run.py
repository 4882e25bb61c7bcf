"""A run of one small network, for tests that damage its files."""

from __future__ import annotations

from pathlib import Path

from mclfast.compare.one_run import perform
from mclfast.config import TrainConfig
from mclfast.train.builder import build

VALUES = {
    "method": "mcl",
    "cohort": "resnet8,resnet8",
    "data": "digits-full",
    "train_per_class": 2,
    "batch_size": 20,
    "images_per_class": 2,
    "projection_dim": 4,
    "bilevel_every": 0,
    "eval_batch_size": 400,
    "epochs": 3,
    "device": "cpu",
}


def config() -> TrainConfig:
    """The settings of the run."""
    return TrainConfig.from_values(VALUES)


def unfinished(folder: Path) -> Path:
    """Trains two of its three epochs, which leaves two checkpoints.

    Args:
        folder: folder of the run.
    """
    build(config(), folder).fit(progress=False, stop_after=2)
    return folder


def finished(folder: Path) -> Path:
    """Trains it to its end, as a run of a comparison.

    Args:
        folder: folder of the run.
    """
    reason = perform(VALUES, folder, replace=False, progress=False, alone=False)
    assert reason is None, reason
    return folder
