"""The memory-bank losses as torch.library operators.

An operator gathers each bank row that it needs once or twice and keeps statistics [M, N, B], never
the gathered rows. Index tensors may have any row stride, so that one set of negatives for the whole
batch is passed as an expanded view. Banks get no gradient; they must not be updated between an
operator and its backward, which autograd checks. The docstring of ``in_batch.py`` explains the
backends, the bit mask of families and the derivatives, which are the same here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mclfast._base.tensors import statistics_dtype
from mclfast.ops.derivatives import Operators, gradient_of_fused
from mclfast.ops.in_batch import (
    families_with_gradient,
    fused_objective,
    implementation,
    like,
    passed_on,
    wide_like,
    with_statistics,
)

_KEYS = "Tensor banks, Tensor pos_idx, Tensor neg_idx"
_SETTINGS = "SymInt[] stages, float temperature, float kl_temperature, int families, str backend"
_COTANGENTS = "Tensor g_vcl, Tensor g_soft_vcl, Tensor g_icl, Tensor g_soft_icl"


def _row_shapes(nodes: Tensor, banks: Tensor) -> list[Tensor]:
    """Empty tensors like vcl, soft_vcl, icl, soft_icl, lse, kl_lse."""
    (count, batch), dtype = nodes.shape[:2], statistics_dtype(nodes)
    pair, per_bank = (count, count, batch), (banks.shape[0], count, batch)
    shapes = ((count, batch), pair, per_bank, pair, per_bank, per_bank)
    return [nodes.new_empty(shape, dtype=dtype) for shape in shapes]


#: (nodes [N, B, D], banks [M, n, D], pos_idx [B, 1 + P], neg_idx [B, K], ...) -> vcl [N, B],
#: soft_vcl [N, N, B], icl [M, N, B], soft_icl [N, N, B], and the statistics lse, kl_lse [M, N, B],
#: which are not differentiable.
bank_mcl_rows = torch.library.custom_op(
    "mclfast::bank_mcl_rows",
    passed_on("bank_mcl_forward", stages_at=4),
    mutates_args=(),
    schema=f"(Tensor nodes, {_KEYS}, {_SETTINGS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@bank_mcl_rows.register_fake
def _(nodes: Tensor, banks: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(_row_shapes(nodes, banks))


def _rows_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[4:])
    ctx.save_for_backward(*inputs[:4], *output[4:])
    ctx.settings = inputs[4:]


def _rows_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    nodes, banks, *rest = ctx.saved_tensors
    stages, temperature, kl_temperature, families, backend = ctx.settings
    families, cotangents = families_with_gradient(
        grads[:4], families, lambda: _row_shapes(nodes, banks)
    )
    if not families:
        return (None,) * 9
    settings = stages, temperature, kl_temperature, families, backend
    return bank_mcl_rows_backward(*cotangents, nodes, banks, *rest, *settings), *(None,) * 8


bank_mcl_rows.register_autograd(_rows_backward, setup_context=_rows_context)


def _single(name: str) -> Any:
    """A call of the implementation ``name`` in the backend that the last argument names."""

    def call(*arguments: Any) -> Tensor:
        *values, backend = arguments
        found: Tensor = implementation(backend, name)(*values)
        return found

    return call


#: (four cotangents, nodes, banks, indices, statistics, ...) -> gradient [N, B, D] in the dtype of
#: nodes.
bank_mcl_rows_backward = torch.library.custom_op(
    "mclfast::bank_mcl_rows_backward",
    with_statistics("bank_mcl_backward", 8),
    mutates_args=(),
    schema=f"({_COTANGENTS}, Tensor nodes, {_KEYS}, Tensor lse, Tensor kl_lse, {_SETTINGS})"
    " -> Tensor",
)


@bank_mcl_rows_backward.register_fake
def _(*inputs: Any) -> Tensor:
    return like(inputs[4])


def _rows_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.settings = inputs[10:]


def _rows_double_backward(ctx: Any, v_nodes: Tensor) -> tuple[Any, ...]:
    h_nodes, *h_cotangents = bank_mcl_rows_double_backward(
        v_nodes, *ctx.saved_tensors, *ctx.settings
    )
    return *h_cotangents, h_nodes, *(None,) * 10


bank_mcl_rows_backward.register_autograd(
    _rows_double_backward, setup_context=_rows_backward_context
)


#: (v [N, B, D], four cotangents, nodes, ...) -> gradient of <v, backward(cotangents, nodes)> for
#: nodes and the four cotangents.
bank_mcl_rows_double_backward = torch.library.custom_op(
    "mclfast::bank_mcl_rows_double_backward",
    with_statistics("bank_mcl_double_backward", 9),
    mutates_args=(),
    schema=f"(Tensor v_nodes, {_COTANGENTS}, Tensor nodes, {_KEYS}, Tensor lse, Tensor kl_lse, "
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@bank_mcl_rows_double_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    nodes, banks = inputs[5:7]
    return like(nodes), *_row_shapes(nodes, banks)[:4]


#: The rows with all their derivatives.
BANK_ROWS = Operators(
    bank_mcl_rows,
    bank_mcl_rows_backward,
    bank_mcl_rows_double_backward,
    num_inputs=1,
    num_values=4,
    statistics=lambda found: found[4:],
    families_at=3,
)


#: (four row weights, nodes, banks, indices, ...) -> loss = sum of weights times rows, the rows,
#: lse, kl_lse and the gradient of the loss for nodes. The loss is differentiable for nodes, twice;
#: the weights get no gradient and the rows give none.
bank_mcl_objective = torch.library.custom_op(
    "mclfast::bank_mcl_objective",
    fused_objective("bank_mcl_fused", stages_at=8),
    mutates_args=(),
    schema=f"({_COTANGENTS}, Tensor nodes, {_KEYS}, {_SETTINGS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@bank_mcl_objective.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    nodes, banks = inputs[4:6]
    loss = nodes.new_empty((), dtype=statistics_dtype(nodes))
    return loss, *_row_shapes(nodes, banks), wide_like(nodes)


def _objective_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:7])
    ctx.save_for_backward(*inputs[:8], *output[5:8])
    ctx.settings = inputs[8:]


def _objective_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Scales the gradient that the operator put out; a gradient of that output is second order."""
    *inputs, grad_nodes = ctx.saved_tensors

    def second(v_nodes: Tensor) -> Tensor:
        return bank_mcl_rows_double_backward(v_nodes, *inputs, *ctx.settings)[0]

    total = gradient_of_fused(grads[0], grad_nodes, grads[7], second, inputs[4].dtype)
    return *(None,) * 4, total, *(None,) * 8


bank_mcl_objective.register_autograd(_objective_backward, setup_context=_objective_context)


#: (nodes [M, B, D], banks [M, n, D], pos_idx [B, 1], neg_idx [B, K], ...) -> log-sum-exp over the
#: keys of anchor j's logits with bank i, [M, M, B]; 0 on the diagonal, not differentiable.
bank_nce_lse = torch.library.custom_op(
    "mclfast::bank_nce_lse",
    _single("bank_nce_lse"),
    mutates_args=(),
    schema=f"(Tensor nodes, {_KEYS}, float temperature, str backend) -> Tensor",
)


@bank_nce_lse.register_fake
def _(nodes: Tensor, banks: Tensor, *rest: Any) -> Tensor:
    return _row_shapes(nodes, banks)[4]


_NCE = f"Tensor nodes, {_KEYS}, Tensor log_normalizer, float temperature, float eps, str backend"


def _bank_nce(*arguments: Any) -> tuple[Tensor, Tensor]:
    *values, backend = arguments
    rows, grad = implementation(backend, "bank_nce_fused")(*values)
    return rows.sum() / rows.shape[-1], grad


#: (nodes, banks, indices, log_normalizer [M, M], ...) -> the loss, differentiable for nodes, twice,
#: and its gradient.
bank_nce = torch.library.custom_op(
    "mclfast::bank_nce", _bank_nce, mutates_args=(), schema=f"({_NCE}) -> (Tensor, Tensor)"
)


@bank_nce.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    nodes = inputs[0]
    return nodes.new_empty((), dtype=statistics_dtype(nodes)), wide_like(nodes)


def _nce_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.settings = inputs[5:]


def _nce_backward(ctx: Any, g_loss: Tensor | None, v_nodes: Tensor | None) -> tuple[Any, ...]:
    *inputs, grad_nodes = ctx.saved_tensors

    def second(v: Tensor) -> Tensor:
        return bank_nce_double_backward(v, *inputs, *ctx.settings)

    total = gradient_of_fused(g_loss, grad_nodes, v_nodes, second, inputs[0].dtype)
    return total, *(None,) * 7


bank_nce.register_autograd(_nce_backward, setup_context=_nce_context)


#: (v [M, B, D], ...) -> gradient of <v, gradient of the loss> for nodes.
bank_nce_double_backward = torch.library.custom_op(
    "mclfast::bank_nce_double_backward",
    _single("bank_nce_double_backward"),
    mutates_args=(),
    schema=f"(Tensor v_nodes, {_NCE}) -> Tensor",
)


@bank_nce_double_backward.register_fake
def _(*inputs: Any) -> Tensor:
    return like(inputs[1])


#: The second derivative of the noise-contrastive loss; its operator gives the first.
BANK_NCE = Operators(
    None, None, bank_nce_double_backward, num_inputs=1, num_values=0, statistics=lambda found: ()
)


def _bank_update(
    banks: Tensor, index: Tensor, embeddings: Tensor, momentum: float, backend: str
) -> None:
    implementation(backend, "bank_update_")(banks, index, embeddings, momentum)


#: (banks [M, n, D], index [B], embeddings [M, B, D], ...): banks are changed in place.
bank_update = torch.library.custom_op(
    "mclfast::bank_update",
    _bank_update,
    mutates_args=("banks",),
    schema="(Tensor(a!) banks, Tensor index, Tensor embeddings, float momentum, str backend) -> ()",
)


@bank_update.register_fake
def _(*inputs: Any) -> None:
    return None
