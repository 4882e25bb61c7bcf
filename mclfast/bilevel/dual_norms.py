"""Layer, group and instance normalisation of a value and its tangent.

Each normalises rows of numbers by their own mean and variance, as batch normalisation does with the
channels of a batch of one. So :mod:`mclfast.bilevel.dual_batch_norm` gives n and n', with its
written-out backward pass, and what follows is y = w n + b with y' = w n' + w' n + b'. PyTorch's own
forward-mode rules take mean and variance for constants when they are differentiated again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mclfast.bilevel.dual_batch_norm import Running, dual_batch_norm

_HALVES = (torch.float16, torch.bfloat16)


class Affine(NamedTuple):
    """Scale, shift and their tangents, which are constants; None for 1, 0 and zero tangents."""

    weight: Tensor | None
    weight_t: Tensor | None
    bias: Tensor | None
    bias_t: Tensor | None


def dual_layer_norm(
    x: Tensor, x_t: Tensor, shape: Sequence[int], affine: Affine, eps: float
) -> tuple[Tensor, Tensor]:
    """Value and tangent of ``layer_norm``.

    Args:
        x, x_t: input [..., *shape] and its tangent.
        shape: sizes of the last axes, which are normalised together.
        affine: scale and shift, of this shape.
        eps: number added to the variance.
    """
    n, n_t = _normalized(x, x_t, math.prod(shape), eps)
    return _scaled(n, n_t, affine, x.dtype)


def dual_group_norm(
    x: Tensor, x_t: Tensor, groups: int, affine: Affine, eps: float
) -> tuple[Tensor, Tensor]:
    """Value and tangent of ``group_norm``; of ``instance_norm`` with a group for each channel.

    Args:
        x, x_t: input [N, C, ...] and its tangent.
        groups: number of groups that the channels are divided into.
        affine: scale and shift, [C].
        eps: number added to the variance.
    """
    n, n_t = _normalized(x, x_t, x[0].numel() // groups, eps)
    along_channels = (-1, *[1] * (x.dim() - 2))
    parts = [None if t is None else t.view(along_channels) for t in affine]
    return _scaled(n, n_t, Affine(*parts), x.dtype)


def _normalized(x: Tensor, x_t: Tensor, count: int, eps: float) -> tuple[Tensor, Tensor]:
    """The input with every ``count`` values in a row normalised, and the tangent of that."""
    wide = torch.float32 if x.dtype in _HALVES else x.dtype
    rows = (1, -1, count)
    nothing = None, None, None, None
    n, n_t = dual_batch_norm(
        x.to(wide).reshape(rows),
        x_t.to(wide).reshape(rows),
        *nothing,
        Running(None, None, 0.0),
        eps,
    )
    return n.view(x.shape), n_t.view(x.shape)


def _scaled(n: Tensor, n_t: Tensor, affine: Affine, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    value, tangent = n, n_t
    if affine.weight is not None:
        value, tangent = n * affine.weight, n_t * affine.weight
    if affine.weight_t is not None:
        tangent = tangent + n * affine.weight_t
    if affine.bias is not None:
        value = value + affine.bias
    if affine.bias_t is not None:
        tangent = tangent + affine.bias_t
    return value.to(dtype), tangent.to(dtype)
