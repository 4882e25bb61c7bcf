"""What changes by epoch, as pure functions of the settings (so there is no state to resume)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Methods are named in the config, and some of them need a schedule.
    from mclfast.config import TrainConfig


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Learning rate of an epoch counted from 0.

    cosine: ``lr * (1 + cos(pi * epoch / epochs)) / 2``; multistep: times ``lr_decay`` at each
    milestone reached. Either is multiplied by ``(epoch + 1) / (warmup_epochs + 1)`` in the first
    ``warmup_epochs`` epochs: a linear warm-up that delays nothing after it.

    Source of the warm-up: arXiv 1706.02677 (section 2.2), there by step.
    """
    warmup = min(1.0, (epoch + 1) / (config.warmup_epochs + 1))
    if config.schedule == "cosine":
        return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
    passed = sum(epoch >= milestone for milestone in config.milestones)
    return config.lr * warmup * config.lr_decay**passed


def sigmoid_rampup(epoch: int, length: int) -> float:
    """``exp(-5 (1 - epoch / length)^2)`` of an epoch counted from 0, and 1 from ``length`` on.

    Epochs before 0 count as 0, where it is exp(-5) = 0.0067; a length of 0 is 1 throughout.

    Source: temporal ensembling, arXiv 1610.02242; used by ONE, OKDDip, FFL and PCL.
    """
    epoch = max(epoch, 0)
    return 1.0 if epoch >= length else math.exp(-5 * (1 - epoch / length) ** 2)
