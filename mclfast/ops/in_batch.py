"""The in-batch losses as torch.library operators: schema, fake kernels, autograd formulas.

An operator returns per-anchor rows, or a loss whose row weights are known in advance, and the row
statistics from which its backward recomputes the similarities; no [B, B] matrix is kept. The string
``backend`` names the implementation: "cpu" for the C++ extension, "triton" for the kernels of
``mclfast.kernels`` (on a GPU, or interpreted on a CPU), "cuda" for the extension's CUDA kernels.
``torch.compile`` sees one operator and uses the formulas registered here; otherwise derivatives are
those of ``derivatives.py``. Operators of the memory-bank losses are in ``banks.py``.

``families`` is a bit mask of the rows asked for (``mclfast/kernels/families.py``); the other rows
are zero and cost nothing. Teachers are constants in the first and in the second derivative, as in
``mclfast/losses/reference.py``; there is no third derivative.

Under autocast an operator takes its inputs as they come: statistics are float32 or wider for every
input dtype, so there is nothing to cast.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mclfast._base.tensors import statistics_dtype
from mclfast.kernels.families import EACH
from mclfast.ops import backends
from mclfast.ops.derivatives import Operators, families_of, gradient_of_fused

_SETTINGS = "SymInt[] stages, float temperature, float kl_temperature, int families"
_COTANGENTS = "Tensor g_vcl, Tensor g_soft_vcl, Tensor g_icl, Tensor g_soft_icl"


def implementation(backend: str, name: str) -> Callable[..., Any]:
    """The function ``name`` of the backend "cpu", "cuda" or "triton"."""
    if backend == "cpu":
        backends.extension()  # registers its operators when it is loaded
        return getattr(torch.ops.mclfast_cpu, name)
    if backend == "cuda":
        backends.extension()
        return getattr(torch.ops.mclfast_cuda, name)
    # Imported by name, because mypy does not see that the folder kernels/ is mclfast.kernels.
    return getattr(importlib.import_module("mclfast.kernels.ops"), name)


def networks_of(stages: Sequence[int]) -> list[int]:
    """The network of each node, for the number of nodes (stages) of each network."""
    return [network for network, count in enumerate(stages) for _ in range(count)]


def passed_on(name: str, stages_at: int | None = None) -> Callable[..., tuple[Tensor, ...]]:
    """A call of the implementation ``name`` in the backend that the last argument names.

    Args:
        name: name of the implementation.
        stages_at: place of the argument ``stages``, for which the implementation takes networks;
            None without one.
    """

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        *values, backend = arguments
        if stages_at is not None:
            values[stages_at] = networks_of(values[stages_at])
        return tuple(implementation(backend, name)(*values))

    return call


def with_statistics(name: str, tensors: int) -> Callable[..., Any]:
    """A call of an implementation that takes networks, and the statistics after them.

    Args:
        name: name of the implementation.
        tensors: number of arguments before the statistics lse and kl_lse.
    """

    def call(*arguments: Any) -> Any:
        *settings, backend = arguments[tensors + 2 :]
        stages, *numbers = settings
        statistics = arguments[tensors : tensors + 2]
        found = implementation(backend, name)(
            *arguments[:tensors], networks_of(stages), *statistics, *numbers
        )
        return found if isinstance(found, Tensor) else tuple(found)

    return call


def weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """``(weights * rows).sum()`` in one call, as small batches are bound by the number of calls."""
    return torch.dot(weights.reshape(-1), rows.reshape(-1))


def fused_objective(name: str, stages_at: int) -> Callable[..., tuple[Tensor, ...]]:
    """A call of the implementation ``name`` that adds the loss to its rows, statistics, gradient.

    The call takes the four row weights first, and the families and the backend last; it returns the
    loss first.

    Args:
        name: name of the implementation.
        stages_at: place of the argument ``stages``, for which the implementation takes networks.
    """

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        *values, backend = arguments
        values[stages_at] = networks_of(values[stages_at])
        *rows, lse, kl_lse, grad = implementation(backend, name)(*values)
        first, *rest = (
            weighted_sum(g, row)
            for bit, g, row in zip(EACH, values[:4], rows, strict=True)
            if values[-1] & bit
        )
        return sum(rest, start=first), *rows, lse, kl_lse, grad

    return call


def wide_like(x: Tensor) -> Tensor:
    """An empty contiguous tensor of the same shape and device, in the dtype of statistics."""
    return torch.empty_like(x, dtype=statistics_dtype(x), memory_format=torch.contiguous_format)


def like(x: Tensor) -> Tensor:
    """An empty contiguous tensor of the same shape, dtype and device."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _row_shapes(nodes: Tensor, rows: int) -> list[Tensor]:
    """Empty tensors like vcl, soft_vcl, icl, soft_icl, lse, kl_lse."""
    count, dtype = nodes.shape[0], statistics_dtype(nodes)
    pair = (count, count, rows)
    shapes = ((count, rows), pair, pair, pair, pair, pair)
    return [nodes.new_empty(shape, dtype=dtype) for shape in shapes]


#: (nodes [N, B, D], labels [B], ...) -> vcl [N, R], soft_vcl, icl, soft_icl [N, N, R], and the
#: statistics lse, kl_lse [N, N, R], which are not differentiable.
mcl_rows = torch.library.custom_op(
    "mclfast::mcl_rows",
    passed_on("mcl_rows_forward", stages_at=2),
    mutates_args=(),
    schema=f"(Tensor nodes, Tensor labels, {_SETTINGS}, SymInt row_start, SymInt row_count, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@mcl_rows.register_fake
def _(nodes: Tensor, labels: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    return tuple(_row_shapes(nodes, settings[5]))


def _rows_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    nodes, labels, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[4:])
    ctx.save_for_backward(nodes, labels, *output[4:])


def families_with_gradient(
    grads: Sequence[Tensor | None], families: int, shapes: Callable[[], list[Tensor]]
) -> tuple[int, list[Tensor]]:
    """The families that a loss depends on, and the four cotangents, zero for the others.

    Args:
        grads: cotangents of the four families of rows; None where a loss does not depend on them.
        families: bit mask of the families of the rows.
        shapes: call that gives tensors like the rows.
    """
    if all(g is not None for g in grads):
        return families, [g for g in grads if g is not None]
    made = zip(grads, shapes()[:4], strict=True)
    filled = [torch.zeros_like(row) if g is None else g for g, row in made]
    return families & families_of(grads), filled


def _rows_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    nodes, labels, *statistics = ctx.saved_tensors
    stages, temperature, kl_temperature, families, *rest = ctx.settings
    families, cotangents = families_with_gradient(
        grads[:4], families, lambda: _row_shapes(nodes, rest[1])
    )
    if not families:
        return (None,) * 9
    settings = stages, temperature, kl_temperature, families, *rest
    return mcl_rows_backward(*cotangents, nodes, labels, *statistics, *settings), *(None,) * 8


mcl_rows.register_autograd(_rows_backward, setup_context=_rows_context)


#: (four cotangents, nodes, labels, statistics, ...) -> gradient [N, B, D] in the dtype of nodes.
mcl_rows_backward = torch.library.custom_op(
    "mclfast::mcl_rows_backward",
    with_statistics("mcl_rows_backward", 6),
    mutates_args=(),
    schema=f"({_COTANGENTS}, Tensor nodes, Tensor labels, Tensor lse, Tensor kl_lse, "
    f"{_SETTINGS}, SymInt row_start, SymInt row_count, str backend) -> Tensor",
)


@mcl_rows_backward.register_fake
def _(*inputs: Any) -> Tensor:
    return like(inputs[4])


def _rows_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.settings = inputs[8:]


def _rows_double_backward(ctx: Any, v_nodes: Tensor) -> tuple[Any, ...]:
    h_nodes, *h_cotangents = mcl_rows_double_backward(v_nodes, *ctx.saved_tensors, *ctx.settings)
    return *h_cotangents, h_nodes, *(None,) * 10


mcl_rows_backward.register_autograd(_rows_double_backward, setup_context=_rows_backward_context)


#: (v [N, B, D], four cotangents, nodes, ...) -> gradient of <v, backward(cotangents, nodes)> for
#: nodes and the four cotangents.
mcl_rows_double_backward = torch.library.custom_op(
    "mclfast::mcl_rows_double_backward",
    with_statistics("mcl_rows_double_backward", 7),
    mutates_args=(),
    schema=f"(Tensor v_nodes, {_COTANGENTS}, Tensor nodes, Tensor labels, Tensor lse, "
    f"Tensor kl_lse, {_SETTINGS}, SymInt row_start, SymInt row_count, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@mcl_rows_double_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    nodes = inputs[5]
    row_count = inputs[-2]
    return like(nodes), *_row_shapes(nodes, row_count)[:4]


#: The rows with all their derivatives.
ROWS = Operators(
    mcl_rows,
    mcl_rows_backward,
    mcl_rows_double_backward,
    num_inputs=1,
    num_values=4,
    statistics=lambda found: found[4:],
    families_at=3,
)


#: (four row weights, nodes, labels, ...) -> loss = sum of weights times rows, the rows, lse, kl_lse
#: and the gradient of the loss for nodes in the dtype of statistics, in one sweep over the
#: similarities. The loss is
#: differentiable for nodes, twice; the weights get no gradient and the rows give none.
mcl_objective = torch.library.custom_op(
    "mclfast::mcl_objective",
    fused_objective("mcl_rows_fused", stages_at=6),
    mutates_args=(),
    schema=f"({_COTANGENTS}, Tensor nodes, Tensor labels, {_SETTINGS}, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@mcl_objective.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    nodes = inputs[4]
    loss = nodes.new_empty((), dtype=statistics_dtype(nodes))
    return loss, *_row_shapes(nodes, nodes.shape[1]), wide_like(nodes)


def _objective_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:7])
    ctx.save_for_backward(*inputs[:6], output[5], output[6], output[7])
    ctx.settings = inputs[6:]


def _objective_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Scales the gradient that the operator put out; a gradient of that output is second order."""
    *inputs, grad_nodes = ctx.saved_tensors
    *settings, backend = ctx.settings

    def second(v_nodes: Tensor) -> Tensor:
        rows = 0, grad_nodes.shape[1]
        return mcl_rows_double_backward(v_nodes, *inputs, *settings, *rows, backend)[0]

    total = gradient_of_fused(grads[0], grad_nodes, grads[7], second, inputs[4].dtype)
    return *(None,) * 4, total, *(None,) * 6


mcl_objective.register_autograd(_objective_backward, setup_context=_objective_context)


#: (a [B, D], b [B, D], ...) -> log-sum-exp of the rows and of the columns of S = a b^T /
#: temperature, and its diagonal; [B] each, all differentiable.
info_nce = torch.library.custom_op(
    "mclfast::info_nce",
    passed_on("info_nce_forward"),
    mutates_args=(),
    schema="(Tensor a, Tensor b, float temperature, str backend) -> (Tensor, Tensor, Tensor)",
)


@info_nce.register_fake
def _(a: Tensor, b: Tensor, temperature: float, backend: str) -> tuple[Tensor, ...]:
    return tuple(a.new_empty(a.shape[0], dtype=statistics_dtype(a)) for _ in range(3))


def _info_nce_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, b, *ctx.settings = inputs
    ctx.save_for_backward(a, b, output[0], output[1])


def _info_nce_first(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    a, b, row_lse, col_lse = ctx.saved_tensors
    found = info_nce_backward(*grads, a, b, row_lse.detach(), col_lse.detach(), *ctx.settings)
    return *found, None, None


info_nce.register_autograd(_info_nce_first, setup_context=_info_nce_context)


_INFO_NCE = (
    "Tensor g_row, Tensor g_col, Tensor g_diagonal, Tensor a, Tensor b, Tensor row_lse, "
    "Tensor col_lse, float temperature, str backend"
)

#: (cotangents of the three outputs, a, b, ...) -> gradients of a and b.
info_nce_backward = torch.library.custom_op(
    "mclfast::info_nce_backward",
    passed_on("info_nce_backward"),
    mutates_args=(),
    schema=f"({_INFO_NCE}) -> (Tensor, Tensor)",
)


@info_nce_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    return tuple(like(x) for x in inputs[3:5])


def _info_nce_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.settings = inputs[7:]


def _info_nce_second(ctx: Any, v_a: Tensor, v_b: Tensor) -> tuple[Any, ...]:
    h_a, h_b, *h_cotangents = info_nce_double_backward(v_a, v_b, *ctx.saved_tensors, *ctx.settings)
    return *h_cotangents, h_a, h_b, *(None,) * 4


info_nce_backward.register_autograd(_info_nce_second, setup_context=_info_nce_backward_context)


#: (v of a, v of b, cotangents, a, b, ...) -> gradient of <v, info_nce_backward(cotangents, a, b)>
#: for a, b and the cotangents.
info_nce_double_backward = torch.library.custom_op(
    "mclfast::info_nce_double_backward",
    passed_on("info_nce_double_backward"),
    mutates_args=(),
    schema=f"(Tensor v_a, Tensor v_b, {_INFO_NCE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@info_nce_double_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    a, b = inputs[5:7]
    return (
        like(a),
        like(b),
        *(a.new_empty(a.shape[0], dtype=statistics_dtype(a)) for _ in range(3)),
    )


#: InfoNCE with all its derivatives; the statistics are two of the values.
INFO_NCE = Operators(
    info_nce,
    info_nce_backward,
    info_nce_double_backward,
    num_inputs=2,
    num_values=3,
    statistics=lambda found: found[:2],
)
