"""From a config to a trainer: data, cohort and method by name, initial weights by seed."""

from __future__ import annotations

from pathlib import Path

import torch

from mclfast.config import TrainConfig
from mclfast.data.dataset import Dataset
from mclfast.execution.parts import load_images, make_parts
from mclfast.train.history import RunResult
from mclfast.train.trainer import Trainer


def train(
    config: TrainConfig, run_dir: Path | str | None = None, *, progress: bool = True
) -> RunResult:
    """Builds everything that a config names and trains it, from the last checkpoint if any."""
    return build(config, run_dir).fit(progress=progress)


def build(config: TrainConfig, run_dir: Path | str | None = None) -> Trainer:
    """The trainer of a config; the seed fixes every initial weight."""
    return assemble(load_images(config), config, run_dir)


def assemble(data: Dataset, config: TrainConfig, run_dir: Path | str | None = None) -> Trainer:
    """The trainer of a config on data that is there; ``config.data`` is not read."""
    torch.manual_seed(config.seed)
    cohort, method = make_parts(config, data.num_classes, data.in_channels)
    return Trainer(cohort, method, data, config, run_dir, network_names=config.cohort)
