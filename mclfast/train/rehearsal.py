"""What follows the training of a run, tried on next to nothing before the first step."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mclfast._base.modules import buffers_kept, evaluation_mode
from mclfast._base.random import rng_restored
from mclfast.cohort.cohort import Cohort
from mclfast.data.dataset import Dataset
from mclfast.methods.base import Method
from mclfast.train import plots
from mclfast.train.evaluation import CohortAccuracy, cohort_accuracy
from mclfast.train.export import weights_of
from mclfast.train.history import accuracies


def rehearse_evaluation(cohort: Cohort, method: Method, data: Dataset) -> None:
    """Evaluates a cohort on two test images; networks, method and generators stay as they were.

    Infinite logits are let pass: the training says more of them.

    Args:
        cohort: the peers.
        method: method of the run, which makes the logits of all peers together.
        data: data set whose test images are read.

    Raises:
        ValueError: the networks or the method cannot be evaluated.
    """
    few = data.test.subset(torch.arange(min(2, len(data.test)), device=data.test.labels.device))
    kept = buffers_kept([cohort, method])
    with kept, rng_restored(), evaluation_mode(method), suppress(FloatingPointError):
        cohort_accuracy(cohort, replace(data, test=few), batch_size=2, ensemble=method.ensemble)


def rehearse_files(
    exports: Sequence[tuple[nn.Module, dict[str, Any]]], names: Sequence[str], title: str
) -> None:
    """Draws the curves of one epoch in a temporary folder and makes the exports in memory.

    Args:
        exports: each backbone with its description.
        names: names of the peers.
        title: heading of the curves.

    Raises:
        ValueError: a backbone cannot be exported, or the curves cannot be drawn.
    """
    for peer, (backbone, description) in enumerate(exports):
        try:
            weights_of(backbone)
            json.dumps(description)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"cohort: expected backbones that can be exported, got peer {peer}: {error}"
            ) from error
    found = CohortAccuracy((0.0,) * len(names), 0.0, 0.0)
    row = {"epoch": 1.0, "train_loss": 1.0, **accuracies(found, [], len(names))}
    with tempfile.TemporaryDirectory() as folder:
        plots.run_curves([row], names, Path(folder) / "curves.png", title)
