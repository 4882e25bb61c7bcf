"""Learning rate by epoch, a pure function of the settings (so there is no state to resume)."""

from __future__ import annotations

import math

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
