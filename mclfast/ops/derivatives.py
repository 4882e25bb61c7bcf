"""Derivatives of the fused operators: reverse and forward mode, nested, and under ``torch.func``.

A loss has operators for its values, for the gradient of their weighted sum and for the derivative
of that gradient along a direction. Every derivative up to second order follows from these three:

* a forward-mode derivative of the values is what the third operator gives for the cotangents;
* a forward-mode derivative of the gradient is the Hessian times the direction, as the Hessian is
  symmetric (teachers are constants in both derivatives, which leaves it so);
* a backward of the third operator is the Hessian times the new direction.

A third derivative would take a kernel of its own; asking for one raises.

``torch.vmap`` calls an operator once for each entry of the batch. ``torch.compile`` traces neither
these classes nor needs them: it calls the operators, whose own autograd formulas are registered in
``in_batch.py`` and ``banks.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from mclfast._base.checks import wants_gradient
from mclfast._base.tensors import statistics_dtype
from mclfast._base.transforms import in_forward_mode, under_transform
from mclfast.kernels.families import EACH

# Not tuples: torch.func would look into them for tensors.
_Settings = Sequence[Any]


@dataclass(frozen=True, eq=False)
class Operators:
    """The operators of a loss and the order of their arguments.

    Attributes:
        values: (inputs, constants, settings) -> the values, then statistics of them.
        gradient: (cotangents of the values, inputs, constants, statistics, settings) -> gradients
            of the inputs.
        second: (directions of the inputs, cotangents, inputs, constants, statistics, settings) ->
            derivative of the product of directions and gradients for the inputs, and for the
            cotangents.
        num_inputs: number of tensors that are differentiated.
        num_values: number of values.
        statistics: picks the statistics out of the results of ``values``.
        families_at: place of the bit mask of families among the settings; None without one.
    """

    values: Callable[..., Any] | None
    gradient: Callable[..., Any] | None
    second: Callable[..., Any]
    num_inputs: int
    num_values: int
    statistics: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    families_at: int | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """Operators with the arguments that are not tensors."""

    operators: Operators
    settings: _Settings

    def values(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        assert self.operators.values is not None
        return _as_tuple(self.operators.values(*tensors, *self.settings))

    def gradient(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        assert self.operators.gradient is not None
        return _as_tuple(self.operators.gradient(*tensors, *self.settings))

    def second(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _as_tuple(self.operators.second(*tensors, *self.settings))

    @property
    def num_gates(self) -> int:
        return self.operators.num_values + self.operators.num_inputs

    def split(self, tensors: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """(cotangents, inputs and what follows them)"""
        return tensors[: self.operators.num_values], tensors[self.operators.num_values :]

    def of_families(self, cotangents: Sequence[Tensor | None]) -> Call:
        """The call for the families that a loss depends on: the others cost nothing."""
        at = self.operators.families_at
        if at is None or all(x is not None for x in cotangents):
            return self
        settings = list(self.settings)
        settings[at] &= families_of(cotangents)
        return Call(self.operators, settings)


def families_of(cotangents: Sequence[Tensor | None]) -> int:
    """Bit mask of the families that have a cotangent.

    A family that takes no part must add nothing to the gradient, not even 0 times NaN.
    """
    return sum(bit for bit, x in zip(EACH, cotangents, strict=True) if x is not None)


def _as_tuple(found: Any) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def values(
    operators: Operators, tensors: Sequence[Tensor], settings: _Settings
) -> Sequence[Tensor]:
    """The values and statistics of a loss, differentiable to second order.

    Args:
        operators: operators of the loss.
        tensors: inputs and constants.
        settings: other arguments.
    """
    if torch.compiler.is_compiling() or not wants_gradient(*tensors):
        return operators.values(*tensors, *settings)  # type: ignore[misc]
    return _Values.apply(Call(operators, settings), *tensors)


def objective(
    call: Callable[..., Sequence[Tensor]],
    rows: Operators,
    row_settings: _Settings,
    num_weights: int,
    tensors: Sequence[Tensor],
    settings: _Settings,
) -> Sequence[Tensor]:
    """A loss whose operator gives its gradient too; differentiable to second order.

    Args:
        call: (weights, inputs, constants, settings) -> the loss, its values and statistics (if it
            has weights), and the gradient of the loss for its one input.
        rows: operators that give the second derivative for the weights as cotangents.
        row_settings: arguments of ``rows`` that are not tensors.
        num_weights: number of weights, which are constants.
        tensors: weights, inputs and constants.
        settings: other arguments of ``call``.
    """
    if torch.compiler.is_compiling() or not wants_gradient(*tensors):
        return call(*tensors, *settings)
    return _Objective.apply(
        _ObjectiveCall(call, settings, Call(rows, row_settings), num_weights), *tensors
    )


@dataclass(frozen=True, eq=False)
class _ObjectiveCall:
    call: Callable[..., Any]
    settings: _Settings
    rows: Call
    num_weights: int


def _each_alone(function: type[Function], info: Any, in_dims: Any, call: Any, *tensors: Any) -> Any:
    """Rule of ``torch.vmap``: one call for each entry, results stacked along a first axis."""
    found = []
    for i in range(info.batch_size):
        entry = (
            x if dim is None else x.select(dim, i)
            for x, dim in zip(tensors, in_dims[1:], strict=True)
        )
        found.append(function.apply(call, *entry))
    return tuple(torch.stack(x) for x in zip(*found, strict=True)), (0,) * len(found[0])


def _any(tensors: Sequence[Tensor | None]) -> bool:
    return any(x is not None for x in tensors)


def _filled(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, with zeros for those that are missing."""
    pairs = zip(found, like, strict=True)
    return [torch.zeros_like(x) if value is None else value for value, x in pairs]


def _sums(first: Sequence[Tensor] | None, second: Sequence[Tensor] | None) -> Sequence[Tensor]:
    """The sums of two lists of tensors, one of which may be missing."""
    if first is None or second is None:
        return first or second or ()
    return [a + b for a, b in zip(first, second, strict=True)]


def _save(ctx: Any, *tensors: Tensor) -> None:
    """Keeps tensors for the derivatives. A derivative reads them once: what unpacks them may not
    be repeated (``torch.utils.checkpoint``), or costs a copy (offloaded tensors)."""
    ctx.save_for_backward(*tensors)
    # Kept where a forward-mode derivative may ask for them only: an output among them would
    # otherwise hold on to itself.
    if under_transform() or in_forward_mode():
        ctx.save_for_forward(*tensors)


class _Values(Function):
    """(call, inputs, constants) -> values and statistics."""

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        return call.values(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        operators = ctx.call.operators
        ctx.mark_non_differentiable(*output[operators.num_values :])
        ctx.set_materialize_grads(False)
        ctx.shapes = [(x.shape, x.dtype) for x in output]
        _save(ctx, *tensors, *operators.statistics(output))

    @staticmethod
    def _zeros(ctx: Any, like: Tensor) -> list[Tensor]:
        shapes = ctx.shapes[: ctx.call.operators.num_values]
        return [like.new_zeros(shape, dtype=dtype) for shape, dtype in shapes]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        operators, inputs = ctx.call.operators, len(ctx.needs_input_grad) - 1
        cotangents = grads[: operators.num_values]
        if not _any(cotangents):
            return (None,) * (1 + inputs)
        call = ctx.call.of_families(cotangents)
        saved = ctx.saved_tensors
        filled = _filled(cotangents, _Values._zeros(ctx, saved[0]))
        found = _gradient(call, *filled, *saved)
        return None, *found, *(None,) * (inputs - operators.num_inputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        operators, saved = ctx.call.operators, ctx.saved_tensors
        size = operators.num_inputs
        directions = _filled(tangents[1 : 1 + size], saved[:size])
        found = _second(ctx.call, directions, _Values._zeros(ctx, saved[0]), saved)[size:]
        return *found, *(None,) * (len(ctx.shapes) - len(found))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _each_alone(_Values, info, in_dims, *arguments)


class _Gradient(Function):
    """(call, cotangents, inputs, constants, statistics) -> gradients of the inputs."""

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        return call.gradient(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.set_materialize_grads(False)
        _save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Any, ...]:
        arguments = len(ctx.needs_input_grad)
        if not _any(directions):
            return (None,) * arguments
        cotangents, rest = ctx.call.split(ctx.saved_tensors)
        size = ctx.call.operators.num_inputs
        found = _second(ctx.call, _filled(directions, rest[:size]), cotangents, rest)
        given = 1 + len(found)
        return None, *found[size:], *found[:size], *(None,) * (arguments - given)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        operators = ctx.call.operators
        cotangents, rest = ctx.call.split(ctx.saved_tensors)
        split = 1 + operators.num_values
        of_cotangents, of_inputs = tangents[1:split], tangents[split : split + operators.num_inputs]
        through_inputs = through_cotangents = None
        if _any(of_inputs):
            directions = _filled(of_inputs, rest[: operators.num_inputs])
            through_inputs = _second(ctx.call, directions, cotangents, rest)[: len(of_inputs)]
        if _any(of_cotangents):
            through_cotangents = _gradient(ctx.call, *_filled(of_cotangents, cotangents), *rest)
        return tuple(_sums(through_inputs, through_cotangents))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _each_alone(_Gradient, info, in_dims, *arguments)


def _gradient(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the inputs; see `_Gradient` for the tensors."""
    if not wants_gradient(*tensors):
        return call.gradient(*tensors)
    found: tuple[Tensor, ...] = _Gradient.apply(call, *tensors)
    return found


def _second(
    call: Call, directions: Sequence[Tensor], cotangents: Sequence[Tensor], rest: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Derivatives of <directions, gradient> for the inputs, then for the cotangents."""
    inputs = rest[: call.operators.num_inputs]
    if not wants_gradient(*directions, *cotangents, *inputs):
        return call.second(*directions, *cotangents, *rest)
    gates = [_Gate.apply(x) for x in (*cotangents, *inputs)]
    return _Second.apply(call, *directions, *cotangents, *rest, *gates)


class _Gate(Function):
    """The same tensor; a derivative that comes back through it would be a third one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> None:
        if grad is not None:
            raise _no_third_derivative()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)


def _no_third_derivative() -> NotImplementedError:
    return NotImplementedError(
        "a third derivative was asked for, and the fused losses have two: "
        'pass backend="reference", which has all of them'
    )


class _Second(Function):
    """(call, directions, cotangents, inputs, constants, statistics, gates) -> see `_second`.

    The gates are the cotangents and inputs once more. The derivative of a Hessian times a direction
    for them is the one that is missing; it goes to the gates, which raise if it is asked for.
    """

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        return call.second(*tensors[: len(tensors) - call.num_gates])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.set_materialize_grads(False)
        _save(ctx, *tensors[: len(tensors) - ctx.call.num_gates])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        call, size = ctx.call, ctx.call.operators.num_inputs
        saved = ctx.saved_tensors
        directions, (cotangents, rest) = saved[:size], call.split(saved[size:])
        inputs = rest[:size]
        for_directions = through_gradient = None
        for_inputs: Sequence[Tensor | None] = (None,) * size
        gates: Sequence[Tensor | None] = (None,) * call.num_gates
        if _any(grads[:size]):
            for_directions = _second(call, _filled(grads[:size], inputs), cotangents, rest)[:size]
            gates = [torch.zeros_like(x) for x in (*cotangents, *inputs)]
        if _any(grads[size:]):
            filled = _filled(grads[size:], cotangents)
            through_gradient = _gradient(call, *filled, *rest)
            for_inputs = _second(call, directions, filled, rest)[:size]
        found = _sums(for_directions, through_gradient) or (None,) * size
        constants = (None,) * (len(rest) - size)
        return None, *found, *(None,) * len(cotangents), *for_inputs, *constants, *gates

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        call, size = ctx.call, ctx.call.operators.num_inputs
        saved = ctx.saved_tensors
        directions, (cotangents, rest) = saved[:size], call.split(saved[size:])
        of_directions = tangents[1 : 1 + size]
        of_cotangents, of_rest = call.split(tangents[1 + size :])
        if _any(of_rest[:size]):
            raise _no_third_derivative()
        of_first = of_second = None
        if _any(of_directions):
            of_first = _second(call, _filled(of_directions, rest[:size]), cotangents, rest)
        if _any(of_cotangents):
            filled = _filled(of_cotangents, cotangents)
            found = _second(call, directions, filled, rest)[:size]
            of_second = *found, *(torch.zeros_like(x) for x in cotangents)
        return tuple(_sums(of_first, of_second))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _each_alone(_Second, info, in_dims, *arguments)


class _Objective(Function):
    """(call, weights, input, constants) -> loss, values and statistics, gradient of the loss."""

    @staticmethod
    def forward(call: _ObjectiveCall, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(call.call(*tensors, *call.settings))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:-1])
        ctx.num_results = len(output)
        statistics = output[-3:-1] if ctx.call.num_weights else ()
        _save(ctx, *tensors, *statistics, output[-1])

    @staticmethod
    def _along(call: _ObjectiveCall, saved: Sequence[Tensor], direction: Tensor) -> Tensor:
        """The Hessian of the loss times a direction, in the dtype of the input."""
        weights, rest = saved[: call.num_weights], saved[call.num_weights :]
        return _second(call.rows, [direction], weights, rest)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        count = ctx.call.num_weights
        if any(ctx.needs_input_grad[1 : 1 + count]):
            raise RuntimeError("weights of rows that require a gradient go to the operator of rows")
        *saved, gradient = ctx.saved_tensors
        found = gradient_of_fused(
            grads[0],
            gradient,
            grads[-1],
            lambda direction: _Objective._along(ctx.call, saved, direction),
            saved[count].dtype,
        )
        rest = len(ctx.needs_input_grad) - 2 - count
        return *(None,) * (1 + count), found, *(None,) * rest

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        count = ctx.call.num_weights
        *saved, gradient = ctx.saved_tensors
        if _any(tangents[1 : 1 + count]):
            raise RuntimeError("weights of rows with a tangent go to the operator of rows")
        direction = tangents[1 + count]
        assert direction is not None
        along = _Objective._along(ctx.call, saved, direction).to(gradient.dtype)
        of_loss = (gradient * direction).sum().to(statistics_dtype(gradient))
        return of_loss, *(None,) * (ctx.num_results - 2), along

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _each_alone(_Objective, info, in_dims, *arguments)


def gradient_of_fused(
    g_loss: Tensor | None,
    grad: Tensor,
    v_grad: Tensor | None,
    second: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> Tensor | None:
    """Gradient for the input of an operator whose results are a loss and the loss's gradient.

    Args:
        g_loss: cotangent of the loss; None for zero.
        grad: gradient of the loss [N, B, D], as the operator gave it.
        v_grad: cotangent of ``grad``; None for zero.
        second: function from ``v_grad`` to the gradient of its product with ``grad``.
        dtype: dtype of the input. A gradient in half precision is rounded after it is scaled.
    """
    total = None if g_loss is None else (g_loss * grad).to(dtype)
    if v_grad is None:
        return total
    return second(v_grad) if total is None else total + second(v_grad)


# PyTorch asks for the signature in every call, and finding it takes longer than a small operator.
for _function in (_Values, _Gradient, _Second, _Objective):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[attr-defined,union-attr]
