"""Forward-mode rules of convolution and batch normalisation that are cheap to differentiate again.

PyTorch's own rule of batch normalisation is a chain of some thirty elementwise operations, whose
graph keeps most of its intermediates. Here value and tangent are computed together and their
backward pass is written out. Everything else keeps PyTorch's rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_AXES = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


class ConvolutionTape:
    """Outputs of the convolutions of one forward pass, in the order of the calls.

    A pass with tangents at the same parameters reads them instead of computing them again. Batch
    normalisation keeps them for its backward pass anyway, so they cost memory only after it.
    """

    def __init__(self) -> None:
        self._outputs: list[tuple[Tensor, int] | None] = []

    def append(self, output: Tensor) -> None:
        kept = output.detach()
        # Both count in-place changes together: one that follows makes the output useless.
        self._outputs.append((kept, kept._version))

    def __len__(self) -> int:
        return len(self._outputs)

    def take(self, position: int) -> Tensor | None:
        """The output of a call, once; None where it was changed in place since."""
        kept, self._outputs[position] = self._outputs[position], None
        if kept is None or kept[0]._version != kept[1]:
            return None
        return kept[0]


class RecordConvolutions(TorchFunctionMode):
    """Appends the output of every convolution to a tape."""

    def __init__(self, tape: ConvolutionTape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _AXES:
            self.tape.append(output)
        return output


class DualOps(TorchFunctionMode):
    """Takes over convolution and batch normalisation of dual tensors.

    Args:
        tape: of a forward pass of the same calls with the same values; None to compute them.

    Raises:
        NotImplementedError: in an operator from outside PyTorch, which may drop the tangents of its
            inputs without a word.
    """

    def __init__(self, tape: ConvolutionTape | None = None) -> None:
        super().__init__()
        self.tape = tape
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _AXES:
            recorded = None if self.tape is None else self.tape.take(self.calls)
            self.calls += 1
            return _convolution(func, recorded, *args, **kwargs)
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            name = str(func)
            if not name.startswith(("aten.", "prims.")):
                raise NotImplementedError(f"{name}: no forward-mode derivative is known")
        return func(*args, **kwargs)


def unpacked(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Value and tangent of a dual tensor, both of one dtype; no tangent of another tensor."""
    value, tangent = forward_ad.unpack_dual(x)
    # Some rules of PyTorch give a wider tangent under autocast.
    return value, None if tangent is None else tangent.to(value.dtype)


def _unpacked(x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if x is None else unpacked(x)


def _convolution(
    func: Any,
    recorded: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    axes = _AXES[func]
    if isinstance(padding, str) or input.dim() != axes + 2:
        result: Tensor = func(input, weight, bias, stride, padding, dilation, groups)
        return result
    device = input.device.type
    if torch.is_autocast_enabled(device):
        # Inside a Function autocast would come too late for the backward pass.
        dtype = torch.get_autocast_dtype(device)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    settings = (
        [[v] * axes if isinstance(v, int) else list(v) for v in (stride, padding, dilation)],
        groups,
    )
    pairs = *_unpacked(input), *_unpacked(weight), *_unpacked(bias)
    value, tangent = _DualConvolution.apply(*pairs, settings, recorded)
    return forward_ad.make_dual(value, tangent)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Any) -> Tensor:
    (stride, padding, dilation), groups = settings
    zeros = [0] * len(stride)
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, zeros, groups)


def _convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, settings: Any, mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    (stride, padding, dilation), groups = settings
    zeros = [0] * len(stride)
    sizes = [weight.shape[0]]
    grads: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        grad, x, weight, sizes, stride, padding, dilation, False, zeros, groups, list(mask)
    )
    return grads[0], grads[1], grads[2]


class _DualConvolution(torch.autograd.Function):
    """y = x * w + b and its tangent y' = x' * w + x * w' + b'; w', b' are constants."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x, x_t, weight, weight_t, bias, bias_t, settings, recorded
    ):
        with torch.autocast(x.device.type, enabled=False):
            value = _convolve(x, weight, bias, settings) if recorded is None else recorded
            tangent = None
            if weight_t is not None:
                tangent = _convolve(x, weight_t, bias_t, settings)
            if x_t is not None:
                along = _convolve(x_t, weight, bias_t if tangent is None else None, settings)
                tangent = along if tangent is None else tangent.add_(along)
            if tangent is None:
                tangent = torch.zeros_like(value)
                if bias_t is not None:
                    tangent += bias_t.view(-1, *[1] * (x.dim() - 2))
        ctx.settings = settings
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, x_t, weight, weight_t)
        return value, tangent

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_t):  # type: ignore[no-untyped-def]
        x, x_t, weight, weight_t = ctx.saved_tensors
        need_x, need_t, need_weight = (ctx.needs_input_grad[i] for i in range(3))
        need_bias = ctx.has_bias and ctx.needs_input_grad[4]
        g_x, g_weight, g_bias = _convolve_backward(
            grad, x, weight, ctx.settings, (need_x, need_weight, need_bias)
        )
        g_x_t = None
        if x_t is not None:
            g_x_t, more, _ = _convolve_backward(
                grad_t, x_t, weight, ctx.settings, (need_t, need_weight, False)
            )
            g_weight = more if g_weight is None else g_weight.add_(more) if need_weight else None
        if weight_t is not None and need_x:
            g_x += _convolve_backward(
                grad_t, x, weight_t, ctx.settings, (True, False, False)
            )[0]
        return g_x, g_x_t, g_weight, None, g_bias, None, None, None


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    x, x_t = unpacked(input)
    if not training or x_t is None:
        return F.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    running = (running_mean, running_var, momentum)
    value, tangent = _DualBatchNorm.apply(
        x, x_t, *_unpacked(weight), *_unpacked(bias), running, eps
    )
    return forward_ad.make_dual(value, tangent)


class _DualBatchNorm(torch.autograd.Function):
    """y = w n + b on batch statistics, n = (x - mean) / std, and its tangent w n' + w' n + b'.

    With the projection P(g) = (g - mean(g) - n mean(n g)) / std, which is its own transpose,
    n' = P(x') and, for gradients u of y and v of y',

        dL/dx' = w P(v)
        dL/dx  = w P(u) + (w' - w q / std) P(v) - w (mean(n v) n' + mean(n' v) n) / std
        dL/dw  = sum(n u + n' v),   dL/db = sum(u),   q = mean(n x')

    w', b' are constants.
    """

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
    """P(g) of :class:`_DualBatchNorm`, and sum(n g), sum(g) for each channel."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        grad, x, None, None, None, mean, rstd, True, eps, [True, True, True]
    )
    return found
