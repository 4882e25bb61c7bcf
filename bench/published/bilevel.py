"""The baseline of a bilevel step: the sequence of L-MCL with double backward, written as published.

Networks are trained for real: every SGD step is taken by an optimiser, copies of the whole state of
networks and optimiser are kept before each, loaded again for the reverse sweep, and at last rolled
back. Every product in the reverse sweep is the gradient of a gradient, also for the first step and
for the outer one. Pairs of stages compute their own similarity matrices. One thing differs from the
published code: it leaves a factor of the weight decay off the adjoint of the momentum, which stands
here so that results equal those of :func:`mclfast.bilevel_gradient`.

Source: arXiv 2207.11518, section 3.4; the code published with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mclfast.bench.published.in_batch import layerwise_mcl_loss
from mclfast.cohort.cohort import Cohort
from mclfast.methods.lmcl import LayerwiseMCL

Objective = Callable[[Tensor, Tensor], Tensor]


class PublishedBilevel:
    """The gradient of one bilevel step for the parameters of the matcher.

    Args:
        cohort: peers with auxiliary heads and projection heads; as before after every call.
        method: the method whose matcher is trained.
        lr, momentum, weight_decay: settings of the SGD steps differentiated through.
        inner_steps: steps on the layer-wise loss; one on the cross entropy follows.
    """

    def __init__(
        self,
        cohort: Cohort,
        method: LayerwiseMCL,
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        inner_steps: int = 2,
    ) -> None:
        self.cohort, self.method = cohort, method
        self.settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        self.objectives: Sequence[Objective] = [self._inner] * inner_steps + [self._outer]

    def __call__(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """For images [B, C, H, W] with labels [B]."""
        params = list(self.cohort.parameters())
        optimizer = torch.optim.SGD(params, **self.settings)  # type: ignore[arg-type]
        for p in params:
            # Without a gradient SGD would leave out the classifiers, and their weight decay.
            p.grad = torch.zeros_like(p)
        states: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for objective in self.objectives:
            states.append(copy.deepcopy((self.cohort.state_dict(), optimizer.state_dict())))
            optimizer.zero_grad(set_to_none=False)
            objective(images, labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        self._outer(images, labels).backward()  # type: ignore[no-untyped-call]
        adjoint = [p.grad.clone() for p in params if p.grad is not None]
        found = self._reverse(images, labels, params, adjoint, [state[0] for state in states])
        self.cohort.load_state_dict(states[0][0])
        optimizer.zero_grad(set_to_none=True)
        self.method.zero_grad(set_to_none=True)
        return found

    def _reverse(
        self,
        images: Tensor,
        labels: Tensor,
        params: Sequence[Tensor],
        adjoint: list[Tensor],
        states: list[dict[str, Any]],
    ) -> list[Tensor]:
        lr, momentum, decay = self.settings.values()
        hyperparams = self.method.meta_parameters()
        total = [torch.zeros_like(h) for h in hyperparams]
        velocity = [torch.zeros_like(p) for p in params]
        for objective, state in reversed([*zip(self.objectives, states, strict=True)]):
            self.cohort.load_state_dict(state)
            u = [v - lr * a for v, a in zip(velocity, adjoint, strict=True)]
            grads = torch.autograd.grad(
                objective(images, labels), params, create_graph=True, allow_unused=True
            )
            pairs = zip(grads, u, strict=True)
            product = torch.stack([(g * d).sum() for g, d in pairs if g is not None]).sum()
            found = torch.autograd.grad(product, [*params, *hyperparams], allow_unused=True)
            along = [
                torch.zeros_like(x) if f is None else f
                for f, x in zip(found, [*params, *hyperparams], strict=True)
            ]
            total = [t + f for t, f in zip(total, along[len(params) :], strict=True)]
            adjoint = [
                a + decay * d + h for a, d, h in zip(adjoint, u, along[: len(params)], strict=True)
            ]
            velocity = [momentum * d for d in u]
        return total

    def _inner(self, images: Tensor, labels: Tensor) -> Tensor:
        outputs = self.cohort(images)
        nodes = torch.stack([e for stages in outputs.embeddings for e in stages])
        networks = [m for m, stages in enumerate(outputs.embeddings) for _ in stages]
        o = self.method.options
        terms = layerwise_mcl_loss(
            nodes,
            networks,
            labels,
            self.method.matcher(outputs.features),
            temperature=o.temperature,
            kl_temperature=o.kl_temperature,
        )
        return terms.weighted_sum(*self.method.weights())

    def _outer(self, images: Tensor, labels: Tensor) -> Tensor:
        heads = [z for stages in self.cohort(images).logits for z in stages]
        return torch.stack([F.cross_entropy(z, labels) for z in heads]).sum()
