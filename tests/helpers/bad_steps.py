"""Trainers whose steps make numbers that are not finite, where a test says so."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mclfast.cohort.outputs import Batch, PeerOutputs
from mclfast.train.trainer import Trainer


class BadGradient(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * math.nan


def bad_loss(trainer: Trainer, bad: Callable[[int], bool], value: float = math.nan) -> Trainer:
    """The trainer with a loss, and its term "ce", of ``value`` in the steps that ``bad`` names."""
    loss = trainer.method.loss

    def changed(outputs: PeerOutputs, batch: Batch) -> dict[str, Tensor]:
        parts = loss(outputs, batch)
        if bad(batch.step):
            parts = parts | {"ce": parts["ce"] + value, "loss": parts["loss"] + value}
        return parts

    trainer.method.loss = changed  # type: ignore[method-assign]
    return trainer
