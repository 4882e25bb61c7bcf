"""One SGD step of a bilevel gradient: the gradient of its objective, and products with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mclfast._base.checks import describe
from mclfast._base.random import RngState, rng_state, set_rng_state

Params = dict[str, Tensor]


class Step:
    """A step on any objective, whose product is computed as the gradient of a gradient.

    Args:
        argument: name of the objective in error messages.
        objective: function from parameters to a loss.
        params: parameters before the step.
    """

    def __init__(self, argument: str, objective: Callable[[Any], Tensor], params: Params) -> None:
        self.argument = argument
        self.objective = objective
        self.params = params
        self._before: RngState = rng_state()

    def loss(self, params: Params) -> Tensor:
        """The objective as a function of the parameters."""
        return self.objective(params)

    def gradient(
        self, hyperparams: Sequence[Tensor] = ()
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Value and gradient of the objective.

        Args:
            hyperparams: tensors to differentiate by, beside the parameters.

        Returns:
            The value and the gradients for the parameters and for the hyperparameters; zeros where
            the objective does not use one.
        """
        leaves = self.leaves()
        loss = self.checked(self.loss(leaves))
        found = grad([loss], [*leaves.values(), *hyperparams])
        return loss.detach(), *self.split(found, hyperparams)

    def product(
        self, direction: Sequence[Tensor], hyperparams: Sequence[Tensor], *, with_params: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradient of <g, direction>, where g is the objective's gradient.

        Args:
            direction: one tensor per parameter.
            hyperparams: tensors to differentiate by, beside the parameters.
            with_params: whether the gradient for the parameters is wanted; it is zero otherwise.

        Returns:
            The gradients for the parameters and for the hyperparameters.
        """
        set_rng_state(self._before)
        leaves = self.leaves()
        grads = grad([self.loss(leaves)], leaves.values(), create_graph=True)
        wanted = [*(leaves.values() if with_params else ()), *hyperparams]
        found = grad([inner_product(grads, direction)], wanted)
        count = len(wanted) - len(hyperparams)
        return self.filled(found[:count]), zeros_for_none(found[count:], hyperparams)

    def leaves(self) -> Params:
        """The parameters as new leaves of autograd."""
        return {n: v.detach().requires_grad_() for n, v in self.params.items()}

    def checked(self, loss: Tensor) -> Tensor:
        """The loss as it is; ValueError unless it is a 0-dim tensor."""
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise ValueError(f"{self.argument}: expected a 0-dim loss, got {describe(loss)}")
        return loss

    def split(
        self, found: Sequence[Tensor | None], hyperparams: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients for parameters and for hyperparameters, from those of both in one list."""
        count = len(self.params)
        return self.used(found[:count]), zeros_for_none(found[count:], hyperparams)

    def used(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradient with zeros for None; ValueError if all of it is None."""
        # An objective that ignores the values it is passed would give zeros without a word.
        if all(g is None for g in grads):
            raise ValueError(
                f"{self.argument}: expected a loss that depends on the params it is passed, "
                "got one that does not"
            )
        return self.filled(grads)

    def filled(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """One gradient for each parameter, with zeros for None and for an empty list."""
        return zeros_for_none(grads or [None] * len(self.params), self.params.values())


def grad(
    outputs: Sequence[Tensor],
    inputs: Iterable[Tensor],
    cotangents: Sequence[Tensor | None] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> list[Tensor | None]:
    """:func:`torch.autograd.grad` that also takes outputs without a graph.

    No gradient comes from an output without a graph, or from one whose cotangent is None.
    """
    inputs = list(inputs)
    pairs = [
        (o, c)
        for o, c in zip(outputs, cotangents or [torch.ones_like(o) for o in outputs], strict=True)
        if o.requires_grad and c is not None
    ]
    if not pairs:
        return [None] * len(inputs)
    return list(
        torch.autograd.grad(
            [o for o, _ in pairs],
            inputs,
            [c for _, c in pairs],
            create_graph=create_graph,
            retain_graph=retain_graph,
            allow_unused=True,
        )
    )


def inner_product(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> Tensor:
    """Sum of the products of two lists of tensors; None counts as zero."""
    parts = [(x * y).sum() for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def zeros_for_none(values: Sequence[Tensor | None], like: Iterable[Tensor]) -> list[Tensor]:
    """The values, with zeros of the shape of ``like`` in place of None."""
    return [torch.zeros_like(x) if v is None else v for v, x in zip(values, like, strict=True)]
