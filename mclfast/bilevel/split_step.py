"""A step on a loss of the outputs of networks, with products by forward mode.

Let o be the outputs, L the loss, theta the parameters, phi the hyperparameters, and J u the
tangents of the outputs in a direction u. The product is <dL/dtheta, u> = <dL/do, J u>. With
l = dL/do and m = (d2L/do2) J u held constant, its gradient is

    for phi     <d2L/(do dphi), J u>, without another pass through the networks
    for theta   the gradient of <l, J u> + <m, o>, one backward pass through values and tangents

A gradient of the gradient would differentiate the backward pass of every layer instead. It serves
where forward mode does not; of several networks, one at a time then too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from mclfast._base.random import RngState, rng_state, set_rng_state
from mclfast.bilevel.dual_ops import ConvolutionTape, DualOps, RecordConvolutions, unpacked
from mclfast.bilevel.forward_choice import ForwardChoice
from mclfast.bilevel.nest import Nest
from mclfast.bilevel.step import Params, Step, grad, inner_product, zeros_for_none

Part = Callable[[Params], Any]
Element = TypeVar("Element")


class NetworkFunctions(NamedTuple):
    """Networks as functions of the parameters.

    Attributes:
        parts: functions that give outputs, any nest that :class:`mclfast.bilevel.nest.Nest` takes.
        alone: whether the loss takes the outputs of a single part, not the list of all outputs.
    """

    parts: tuple[Part, ...]
    alone: bool


class SplitStep(Step):
    """A step on ``loss(outputs of networks)``.

    The activations of one part are in memory at a time. Each of several parts runs without a graph
    first, for the loss, and once more for its backward pass.

    Args:
        argument: name of the loss in error messages.
        objective: function from the outputs to the loss.
        networks: functions that give the outputs.
        params: parameters before the step.
        choice: says whether :meth:`product` may use forward mode; all steps of a call share it.
        tape: place to keep outputs of convolutions in :meth:`gradient` for :meth:`product`; used
            for a single part only.
    """

    def __init__(
        self,
        argument: str,
        objective: Callable[[Any], Tensor],
        networks: NetworkFunctions,
        params: Params,
        choice: ForwardChoice,
        tape: ConvolutionTape | None = None,
    ) -> None:
        super().__init__(argument, objective, params)
        self.parts = networks.parts
        self.alone = networks.alone
        self.choice = choice
        self.tape = tape if len(self.parts) == 1 else None
        #: States of the generators before each part, and before the loss.
        self.states: list[RngState] = []

    def loss(self, params: Params) -> Tensor:
        return self._loss([part(params) for part in self.parts])

    def _loss(self, outputs: list[Any]) -> Tensor:
        return self.objective(outputs[0] if self.alone else outputs)

    def gradient(
        self, hyperparams: Sequence[Tensor] = ()
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        graph = len(self.parts) == 1
        leaves = self.leaves()
        wanted = [*leaves.values(), *hyperparams]
        outputs = []
        for j in range(len(self.parts)):
            self.states.append(rng_state())
            with torch.set_grad_enabled(graph), self._recording():
                outputs.append(self._run(j, leaves) if graph else self.parts[j](self.params))
        self.states.append(rng_state())
        if graph:
            loss = self.checked(self._loss(outputs))
            return loss.detach(), *self.split(grad([loss], wanted), hyperparams)
        nests = [Nest(values) for values in outputs]
        free, loss = self._loss_of(nests)
        after = rng_state()
        found = grad([loss], [*_joined(free), *hyperparams])
        cotangents = _divided(found, free)
        count = len(found) - len(hyperparams)
        total: list[Tensor | None] = [*[None] * len(leaves), *found[count:]]
        for j, own in enumerate(cotangents):
            set_rng_state(self.states[j])
            total = _added(total, grad(Nest(self._run(j, leaves)).tensors, wanted, own))
        set_rng_state(after)
        return loss.detach(), *self.split(total, hyperparams)

    def _run(self, part: int, leaves: Params) -> Any:
        """Outputs of a part with a graph, which tells whether forward mode is right for it."""
        with self.choice.watching(part):
            outputs = self.parts[part](leaves)
        self.choice.look(part, Nest(outputs).tensors)
        return outputs

    def product(
        self, direction: Sequence[Tensor], hyperparams: Sequence[Tensor], *, with_params: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        if self.choice.allowed:
            try:
                return self._split_product(direction, hyperparams, with_params, forward=True)
            except (NotImplementedError, CheckpointError) as error:
                # A checkpointed block is run again without its tangents.
                self.choice.refuse(str(error).splitlines()[0])
        if len(self.parts) > 1 and not self.choice.reads_hyperparams:
            return self._split_product(direction, hyperparams, with_params, forward=False)
        return super().product(direction, hyperparams, with_params=with_params)

    def _split_product(
        self,
        direction: Sequence[Tensor],
        hyperparams: Sequence[Tensor],
        with_params: bool,
        forward: bool,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The product with the loss apart; the parts by forward mode or by double backward."""
        graph = forward and with_params and len(self.parts) == 1
        places = range(len(self.parts))
        runs = [
            self.dual_run(j, direction, graph) if forward else self.reverse_run(j, direction)
            for j in places
        ]
        tangents = [run.tangents for run in runs]
        set_rng_state(self.states[-1])
        free, loss = self._loss_of([run.nest for run in runs])
        first = grad([loss], _joined(free), create_graph=True)
        # The tangents are detached: the gradient through the networks is taken further down.
        along = inner_product(first, [None if t is None else t.detach() for t in _joined(tangents)])
        wanted = [*(_joined(free) if with_params else ()), *hyperparams]
        found = grad([along], wanted)
        for_hyperparams = zeros_for_none(found[len(wanted) - len(hyperparams) :], hyperparams)
        if not with_params:
            return self.filled([]), for_hyperparams
        of_tangents = _divided([None if f is None else f.detach() for f in first], free)
        of_values = _divided(found[: len(_joined(free))], free)
        del first, along, loss
        total: list[Tensor | None] = [None] * len(self.params)
        for j in places:
            if forward:
                cotangents = [*of_values[j], *of_tangents[j]]
                # The run gets no name, so that its graph is freed before the next one is made.
                grads = (runs[j] if graph else self.dual_run(j, direction, True)).grad(cotangents)
            else:
                grads = self.reverse_grad(j, direction, of_values[j], of_tangents[j])
            total = _added(total, grads)
        return self.filled(total), for_hyperparams

    def _recording(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.tape is None else RecordConvolutions(self.tape)

    def _loss_of(self, nests: Sequence[Nest]) -> tuple[list[list[Tensor]], Tensor]:
        """The outputs as new leaves of autograd, and the loss computed from them."""
        free = [[t.detach().requires_grad_() for t in nest.tensors] for nest in nests]
        outputs = [nest.rebuilt(own) for nest, own in zip(nests, free, strict=True)]
        return free, self.checked(self._loss(outputs))

    def dual_run(self, part: int, direction: Sequence[Tensor], graph: bool) -> DualRun:
        """Runs a part in forward mode, with tangents of the parameters in a direction.

        Args:
            part: number of the part.
            direction: one tangent per parameter.
            graph: whether autograd records the run.
        """
        set_rng_state(self.states[part])
        leaves = self.leaves() if graph else self.params
        with torch.set_grad_enabled(graph), forward_ad.dual_level():
            duals = {
                name: forward_ad.make_dual(value, along)
                for (name, value), along in zip(leaves.items(), direction, strict=True)
            }
            with DualOps(self.tape):
                nest = Nest(self.parts[part](duals))
            pairs = [unpacked(t) for t in nest.tensors]
        return DualRun(leaves, nest, [value for value, _ in pairs], [t for _, t in pairs])

    def reverse_run(self, part: int, direction: Sequence[Tensor]) -> DualRun:
        """Values and tangents of a part without forward mode, and without a graph.

        A backward pass with cotangents c is linear in c: the gradient of <J^T c, u> for c is J u,
        for any c.
        """
        set_rng_state(self.states[part])
        leaves = self.leaves()
        nest = Nest(self.parts[part](leaves))
        cotangents = [torch.zeros_like(o, requires_grad=True) for o in nest.tensors]
        backward = grad(nest.tensors, leaves.values(), cotangents, create_graph=True)
        tangents = grad([inner_product(backward, direction)], cotangents)
        values = [o.detach() for o in nest.tensors]
        return DualRun(leaves, Nest(nest.rebuilt(values)), values, tangents)

    def reverse_grad(
        self,
        part: int,
        direction: Sequence[Tensor],
        of_values: Sequence[Tensor | None],
        of_tangents: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """Gradient for the parameters from the cotangents of values and tangents of a part."""
        set_rng_state(self.states[part])
        leaves = self.leaves()
        outputs = Nest(self.parts[part](leaves)).tensors
        backward = grad(outputs, leaves.values(), of_tangents, create_graph=True)
        sums = [inner_product(backward, direction), inner_product(outputs, of_values)]
        return grad(sums, leaves.values())


class DualRun(NamedTuple):
    """A part run in forward mode; a tangent is None if its value depends on no parameter."""

    leaves: Params
    nest: Nest
    values: list[Tensor]
    tangents: list[Tensor | None]

    def grad(self, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradient for the parameters, from the cotangents of values and tangents."""
        pairs = zip([*self.values, *self.tangents], cotangents, strict=True)
        known = [(o, c) for o, c in pairs if o is not None]
        return grad([o for o, _ in known], self.leaves.values(), [c for _, c in known])


def _joined(lists: Sequence[Sequence[Element]]) -> list[Element]:
    return [x for own in lists for x in own]


def _divided(values: Sequence[Element], like: Sequence[Sequence[Any]]) -> list[list[Element]]:
    """The inverse of :func:`_joined`, into lists of the lengths of ``like``."""
    rest = iter(values)
    return [list(islice(rest, len(own))) for own in like]


def _added(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [x if y is None else y if x is None else x + y for x, y in zip(a, b, strict=True)]
