"""Learning rate and loss weights by epoch, pure functions (so there is no state to resume)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mclfast.config import TrainConfig


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Learning rate of an epoch counted from 0.

    cosine: ``lr * (1 + cos(pi * epoch / epochs)) / 2``; multistep: times ``lr_decay`` at each
    milestone reached.
    """
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
    passed = sum(epoch >= milestone for milestone in config.milestones)
    return config.lr * config.lr_decay**passed


def sigmoid_rampup(epoch: int, length: int) -> float:
    """``exp(-5 (1 - e / R)**2)`` with e the epoch clipped to [0, R]: 0.0067 at 0, 1 from R on.

    Args:
        epoch: counted from 0.
        length: R, epochs until the full weight; 0 for the full weight from the start.

    Source: temporal ensembling, arXiv 1610.02242; used by ONE, OKDDip, FFL and PCL.
    """
    if length <= 0:
        return 1.0
    return math.exp(-5 * (1 - min(max(epoch, 0), length) / length) ** 2)
