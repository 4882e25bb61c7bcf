"""The baseline of training: the plain loop of L-MCL, written as published.

Every network runs on its own, every pair of stages of two networks computes its own weight and its
own similarity matrices, every head its own cross entropy, and the loop reads each number that it
shows from the device in every step. Networks and the modules beside them are those of mclfast; from
the same weights a step equals :class:`mclfast.TrainStep` up to rounding.

Source: arXiv 2207.11518, sections 3.3 to 3.5; the code published with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mclfast.bench.published.bilevel import PublishedBilevel
from mclfast.bench.published.in_batch import pair_terms
from mclfast.cohort.cohort import Cohort
from mclfast.config import TrainConfig
from mclfast.losses.results import MCLTerms
from mclfast.methods.lmcl import LayerwiseMCL


class PublishedStep:
    """The steps of the plain loop.

    Args:
        cohort: independent peers with auxiliary heads and projection heads; trained in place.
        method: the method whose matcher weights the pairs and whose aggregator is trained.
        config: settings of SGD and of the bilevel step. Temperatures and weights are among the
            method's options.
    """

    def __init__(self, cohort: Cohort, method: LayerwiseMCL, config: TrainConfig) -> None:
        self.cohort, self.method = cohort, method
        self.optimizer = torch.optim.SGD(
            [*cohort.parameters(), *method.aggregator.parameters()],
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
        self.meta_optimizer = torch.optim.SGD(
            method.meta_parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
        self._bilevel_gradient = PublishedBilevel(
            cohort,
            method,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            inner_steps=config.inner_steps,
        )

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """An ordinary step on images [B, C, H, W] with labels [B].

        Returns:
            The losses, and the accuracy in percent of every head and aggregate.
        """
        features, logits = self._forward(images)
        embeddings = [
            [head(f) for head, f in zip(heads.children(), stages, strict=True)]
            for heads, stages in zip(self.cohort.projections, features, strict=True)
        ]
        heads = [z for stages in logits for z in stages]
        aggregates = self.method.aggregator(features, logits)
        zero = images.new_zeros(())
        ce = sum((F.cross_entropy(z, labels) for z in heads), start=zero)
        aggregate_ce = sum((F.cross_entropy(z, labels) for z in aggregates), start=zero)
        distill = sum(
            (self._distill(own[-1], other) for own in logits for other in aggregates), start=zero
        )
        terms = self._contrastive(features, embeddings, labels)
        loss = ce + aggregate_ce + distill + terms.weighted_sum(*self.method.weights())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

        values = {"loss": loss, "ce": ce, "aggregate_ce": aggregate_ce, "distill": distill}
        shown = {name: v.detach().item() for name, v in (values | terms._asdict()).items()}
        for i, z in enumerate([*heads, *aggregates]):
            shown[f"accuracy{i}"] = 100 * (z.argmax(1) == labels).float().mean().item()
        return shown

    def bilevel(self, images: Tensor, labels: Tensor) -> None:
        """One SGD step of the matcher, on the batch of the ordinary step before."""
        grads = self._bilevel_gradient(images, labels)
        for parameter, grad in zip(self.method.meta_parameters(), grads, strict=True):
            parameter.grad = grad
        self.meta_optimizer.step()

    def _forward(self, images: Tensor) -> tuple[list[Sequence[Tensor]], list[Sequence[Tensor]]]:
        """Features and logits, networks of stages of [B, D] and [B, classes]."""
        outputs = [peer(images) for peer in self.cohort.peers]
        return [out.features for out in outputs], [out.logits for out in outputs]

    def _distill(self, student: Tensor, teacher: Tensor) -> Tensor:
        t = self.method.options.distill_temperature
        log_student = F.log_softmax(student / t, dim=1)
        prob_teacher = F.softmax(teacher.detach() / t, dim=1)
        return t**2 * F.kl_div(log_student, prob_teacher, reduction="batchmean")

    def _contrastive(
        self,
        features: Sequence[Sequence[Tensor]],
        embeddings: Sequence[Sequence[Tensor]],
        labels: Tensor,
    ) -> MCLTerms:
        """Pair by pair: all stages of all ordered pairs of different networks."""
        o = self.method.options
        total = [torch.zeros((), device=labels.device) for _ in range(4)]
        for a, own in enumerate(embeddings):
            for b, other in enumerate(embeddings):
                if a == b:
                    continue
                for k, x in enumerate(own):
                    for z, y in enumerate(other):
                        with torch.no_grad():
                            weights = self._pair_weight(features, (a, k), (b, z))
                        terms = pair_terms(x, y, labels, weights, o.temperature, o.kl_temperature)
                        total = [sum_ + term for sum_, term in zip(total, terms, strict=True)]
        return MCLTerms(*total)

    def _pair_weight(
        self, features: Sequence[Sequence[Tensor]], one: tuple[int, int], two: tuple[int, int]
    ) -> Tensor:
        """Weight [B] of a pair of nodes, each given as (network, stage)."""
        projected = [
            F.normalize(self.method.matcher.proj[m][k](features[m][k]))  # type: ignore[index]
            for m, k in (one, two)
        ]
        return torch.sigmoid((projected[0] * projected[1]).sum(1))
