"""Training-mode batch normalisation of a value and its tangent, with the backward pass of both.

With batch statistics the value is y = w n + b, where n = (x - mean) / std, and the tangent is
y' = w n' + w' n + b'. The projection P(g) = (g - mean(g) - n mean(n g)) / std is its own transpose.
With it n' = P(x') and, for gradients u of y and v of y',

    dL/dx' = w P(v)
    dL/dx  = w P(u) + (w' - w q / std) P(v) - w (mean(n v) n' + mean(n' v) n) / std
    dL/dw  = sum(n u + n' v),   dL/db = sum(u),   q = mean(n x')

Tangents w', b' of the parameters are constants.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from mclfast.ops import backends

_FUSED_DTYPES = (torch.float32, torch.float64)


class Running(NamedTuple):
    """Running mean and variance, updated in place; None for a norm without running statistics."""

    mean: Tensor | None
    var: Tensor | None
    momentum: float


def dual_batch_norm(
    x: Tensor,
    x_t: Tensor,
    weight: Tensor | None,
    weight_t: Tensor | None,
    bias: Tensor | None,
    bias_t: Tensor | None,
    running: Running,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Value and tangent of ``batch_norm(training=True)``.

    Args:
        x, x_t: input [N, C, ...] and its tangent.
        weight, bias: scale and shift of each channel, [C]; None for 1 and 0.
        weight_t, bias_t: tangents of weight and bias, which are constants; None for zero.
        running: running statistics, updated once.
        eps: number added to the variance.

    Returns:
        y and y', differentiable once by x, x_t, weight and bias.
    """
    numbers = [x, x_t, weight, weight_t, bias, bias_t, running.mean, running.var]
    fused = (
        x.device.type == "cpu"
        and x.dtype in _FUSED_DTYPES
        and all(t is None or t.dtype == x.dtype for t in numbers)
        and fused_available()
    )
    function = FusedBatchNorm if fused else PlainBatchNorm
    y, y_t = function.apply(x, x_t, weight, weight_t, bias, bias_t, running, eps)
    return y, y_t


def fused_available() -> bool:
    """Whether the CPU operators of :class:`FusedBatchNorm` can be used here."""
    available = backends.available("cpu")
    if available:
        _register_fakes()
    return available


@functools.cache
def _register_fakes() -> None:
    """Defines the operators on tensors without data, which the memory planner runs a step on."""

    @torch.library.register_fake("mclfast_cpu::dual_batch_norm")
    def _(x: Tensor, *_: object) -> tuple[Tensor, ...]:
        return torch.empty_like(x), torch.empty_like(x), *x.new_empty(4, x.shape[1]).unbind()

    @torch.library.register_fake("mclfast_cpu::dual_batch_norm_backward")
    def _(g: Tensor, g_t: Tensor, x: Tensor, *_: object) -> tuple[Tensor, ...]:
        return torch.empty_like(x), torch.empty_like(x), *x.new_empty(2, x.shape[1]).unbind()


class FusedBatchNorm(torch.autograd.Function):
    """Value and tangent from one CPU operator, and their gradients from another."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x, x_t, weight, weight_t, bias, bias_t, running, eps
    ):
        mean, var, momentum = running
        y, y_t, *statistics = torch.ops.mclfast_cpu.dual_batch_norm(
            x, x_t, weight, weight_t, bias, bias_t, mean, var, momentum, eps
        )
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, x_t, weight, weight_t, *statistics)
        return y, y_t

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_t):  # type: ignore[no-untyped-def]
        saved = ctx.saved_tensors
        g_x, g_x_t, g_weight, g_bias = torch.ops.mclfast_cpu.dual_batch_norm_backward(
            grad, grad_t, *saved
        )
        has_weight = saved[2] is not None
        return (
            g_x,
            g_x_t,
            g_weight if has_weight else None,
            None,
            g_bias if ctx.has_bias else None,
            None,
            None,
            None,
        )


class PlainBatchNorm(torch.autograd.Function):
    """Value and tangent from operators of PyTorch, on any device."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x, x_t, weight, weight_t, bias, bias_t, running, eps
    ):
        running_mean, running_var, momentum = running
        value, mean, rstd = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, eps
        )
        count = x.numel() // x.shape[1]
        tangent, n_x_t, _ = _project(x_t, x, mean, rstd, eps)
        if weight is not None:
            tangent *= _along_channels(weight, x)
        if weight_t is not None:
            tangent.addcmul_(x, _along_channels(weight_t * rstd, x))
            shift = -weight_t * rstd * mean
            bias_t = shift if bias_t is None else bias_t + shift
        if bias_t is not None:
            tangent += _along_channels(bias_t, x)
        ctx.eps = eps
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, x_t, weight, weight_t, mean, rstd, n_x_t / count)
        return value, tangent

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_t):  # type: ignore[no-untyped-def]
        x, x_t, weight, weight_t, mean, rstd, q = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        statistics = x, mean, rstd, ctx.eps
        g_x, n_u, u = _project(grad, *statistics)
        g_x_t, n_v, _ = _project(grad_t, *statistics)
        n_t = _project(x_t, *statistics)[0]
        axes = [0, *range(2, x.dim())]
        n_t_v = (n_t * grad_t).sum(axes, dtype=mean.dtype)
        if weight is None:
            weight = torch.ones_like(mean)
        scale = weight * rstd / count
        of_v = -weight * rstd * q if weight_t is None else weight_t - weight * rstd * q
        of_x = -scale * n_t_v * rstd
        g_x *= _along_channels(weight, x)
        g_x.addcmul_(g_x_t, _along_channels(of_v, x))
        g_x.addcmul_(n_t, _along_channels(-scale * n_v, x))
        g_x.addcmul_(x, _along_channels(of_x, x))
        g_x.sub_(_along_channels(of_x * mean, x))
        g_x_t *= _along_channels(weight, x)
        g_weight = n_u + n_t_v if ctx.needs_input_grad[2] else None
        return g_x, g_x_t, g_weight, None, u if ctx.has_bias else None, None, None, None


def _along_channels(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 2))


def _project(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The projection P(g) of this module's formulas, and sum(n g) and sum(g) for each channel."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        grad, x, None, None, None, mean, rstd, True, eps, [True, True, True]
    )
    return found
