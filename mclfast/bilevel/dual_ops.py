"""Forward-mode rules of this package: convolution, normalisations, ReLU.

PyTorch's own rule for batch normalisation is a chain of some thirty elementwise operations, whose
graph keeps most of its intermediates. Here value and tangent are computed together, and their
backward pass is written out. The other normalisations have rules here because those of PyTorch are
wrong once they are differentiated again. PyTorch's rule for ReLU in place copies the tangent, and
its gradient loses the channels-last layout. All other operations keep PyTorch's rules;
:mod:`mclfast.bilevel.known_ops` says which of them are right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mclfast.bilevel.dual_batch_norm import Running, dual_batch_norm
from mclfast.bilevel.dual_norms import Affine, dual_group_norm, dual_layer_norm

_AXES = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_RELU_IN_PLACE = {torch.relu_, torch.Tensor.relu_}


class ConvolutionTape:
    """Outputs of the convolutions of one forward pass, in the order of the calls.

    A later pass with tangents at the same parameters reads them instead of computing them again.
    Batch normalisation keeps them for its backward pass anyway, so they cost memory only after it.
    """

    def __init__(self) -> None:
        self._outputs: list[tuple[Tensor, int] | None] = []

    def append(self, output: Tensor) -> None:
        kept = output.detach()
        # Both tensors share a version counter; a later in-place change makes the output useless.
        self._outputs.append((kept, kept._version))

    def __len__(self) -> int:
        return len(self._outputs)

    def take(self, position: int) -> Tensor | None:
        """Gives the output of a call away, once; None if it was changed in place since."""
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
    """Mode that takes over convolutions, normalisations and in-place ReLU of dual tensors.

    Args:
        tape: outputs of an earlier forward pass with the same calls and values; None to compute
            them again.

    Raises:
        NotImplementedError: an operator from outside PyTorch is called, which may drop the tangents
            of its inputs without a word.
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
        if (norm := _NORMS.get(func)) is not None:
            return norm(*args, **kwargs)
        if func in _RELU_IN_PLACE:
            return _ReLUInPlace.apply(*args)
        if func is F.relu:
            return _relu(*args, **kwargs)
        if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            name = str(func)
            if not name.startswith(("aten.", "prims.")):
                raise NotImplementedError(f"{name}: no forward-mode derivative is known")
        return func(*args, **kwargs)


def unpacked(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Value and tangent of a dual tensor, both of one dtype; None as the tangent of any other."""
    value, tangent = forward_ad.unpack_dual(x)
    # Some rules of PyTorch give a wider tangent under autocast.
    return value, None if tangent is None else tangent.to(value.dtype)


def _with_tangent(x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and tangent; zeros for the tangent of a tensor that depends on no parameter."""
    value, tangent = unpacked(x)
    return value, torch.zeros_like(value) if tangent is None else tangent


def _made_dual(value: Tensor, tangent: Tensor) -> Tensor:
    """A dual tensor that is not a view of its value; nothing else may hold the value.

    Where the ReLU that often follows changes a view in place, autograd would write the view's
    gradient through a copy of the gradient of its base.
    """
    result: Tensor = _NoView.apply(forward_ad.make_dual(value, tangent))
    return result


class _NoView(torch.autograd.Function):
    """Identity whose output has the input's memory without being a view of it."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.new_empty(0).set_(x.detach())

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad

    @staticmethod
    def jvp(ctx, tangent):  # type: ignore[no-untyped-def]
        return tangent


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
        # The casts come before the Function: inside it the backward pass would not see them.
        dtype = torch.get_autocast_dtype(device)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    settings = (
        [[v] * axes if isinstance(v, int) else list(v) for v in (stride, padding, dilation)],
        groups,
    )
    pairs = *_unpacked(input), *_unpacked(weight), *_unpacked(bias)
    value, tangent = _DualConvolution.apply(*pairs, settings, recorded)
    return _made_dual(value, tangent)


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
    """y = x * w + b and its tangent y' = x' * w + x * w' + b', where w' and b' are constants."""

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
            g_x += _convolve_backward(grad_t, x, weight_t, ctx.settings, (True, False, False))[0]
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
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    x, x_t = _with_tangent(input)
    running = Running(running_mean, running_var, momentum)
    value, tangent = dual_batch_norm(x, x_t, *_unpacked(weight), *_unpacked(bias), running, eps)
    return _made_dual(value, tangent)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    affine = Affine(*_unpacked(weight), *_unpacked(bias))
    found = dual_layer_norm(*_with_tangent(_cast(input)), normalized_shape, affine, eps)
    return _made_dual(*found)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    affine = Affine(*_unpacked(weight), *_unpacked(bias))
    return _made_dual(*dual_group_norm(*_with_tangent(_cast(input)), num_groups, affine, eps))


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    x, x_t = _with_tangent(input)
    if running_mean is not None:
        with torch.no_grad():
            F.instance_norm(x, running_mean, running_var, momentum=momentum, eps=eps)
    affine = Affine(*_unpacked(weight), *_unpacked(bias))
    return _made_dual(*dual_group_norm(x, x_t, x.shape[1], affine, eps))


_NORMS: dict[Any, Callable[..., Tensor]] = {
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
}


def _cast(input: Tensor) -> Tensor:
    """The input as autocast of a GPU has it for these norms, in float32."""
    cast = input.is_cuda and torch.is_autocast_enabled("cuda")
    return input.float() if cast else input


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    result: Tensor = _ReLUInPlace.apply(input) if inplace else torch.relu(input)
    return result


class _ReLUInPlace(torch.autograd.Function):
    """max(x, 0) in place, with a tangent that is changed in place too."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.mark_dirty(x)
        x.clamp_min_(0)
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return torch.ops.aten.threshold_backward(grad, ctx.saved_tensors[0], 0)

    @staticmethod
    def jvp(ctx, tangent):  # type: ignore[no-untyped-def]
        return _MaskInPlace.apply(tangent, ctx.saved_tensors[0].detach())


class _MaskInPlace(torch.autograd.Function):
    """Sets a tangent to zero, in place, wherever the value is zero."""

    @staticmethod
    def forward(ctx, tangent, value):  # type: ignore[no-untyped-def]
        ctx.mark_dirty(tangent)
        ctx.save_for_backward(value)
        return torch.ops.aten.threshold_backward.grad_input(tangent, value, 0, grad_input=tangent)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return torch.ops.aten.threshold_backward(grad, ctx.saved_tensors[0], 0), None
