"""Moving average of a module over training steps, its buffers included."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def frozen_copy(module: Module) -> Module:
    """A copy in evaluation mode without ``requires_grad``; parts shared in it stay shared."""
    return copy.deepcopy(module).requires_grad_(False).eval()


@torch.no_grad()
def update_average(
    average: nn.Module, module: nn.Module, decay: float, *, buffers: bool = True
) -> None:
    """``average = decay * average + (1 - decay) * module``, in place.

    Parameters and floating-point buffers (BatchNorm statistics) are averaged; other buffers, such
    as counters, are copied.

    Args:
        average: module that holds the average, made by :func:`frozen_copy`.
        module: module whose values are averaged, with the same structure.
        decay: share of the old values, in [0, 1]; 0 copies the module.
        buffers: whether to average buffers too; False for an average that runs in training mode and
            so has statistics of its own.

    Raises:
        ValueError: the decay lies outside [0, 1].
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: expected a value in [0, 1], got {decay}")
    mine, theirs = ([*m.parameters(), *(m.buffers() if buffers else ())] for m in (average, module))
    pairs = list(zip(mine, theirs, strict=True))
    floating = [(a, b) for a, b in pairs if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floating], [b for _, b in floating], 1 - decay)
    for a, b in pairs:
        if not a.is_floating_point():
            a.copy_(b)


def warmed_decay(step: int, limit: float) -> float:
    """``min(1 - 1 / (step + 1), limit)``: the plain mean of all steps until the limit is reached.

    Source: mean teacher, arXiv 1703.01780; used by PCL, arXiv 2006.04147.
    """
    return min(1 - 1 / (step + 1), limit)
