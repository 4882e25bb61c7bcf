"""L-MCL: layer-wise mutual contrastive learning with learned layer matching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mclfast._base.checks import check_temperature, check_width
from mclfast._base.settings import setting
from mclfast._base.tensors import wide
from mclfast.cohort.heads import LayerMatcher, LogitAggregator
from mclfast.cohort.outputs import Batch, PeerOutputs
from mclfast.losses.distillation import kd_loss
from mclfast.methods._contrastive import ContrastiveMethod
from mclfast.methods.baseline import sum_cross_entropy


class LayerwiseMCL(ContrastiveMethod):
    """The loss of arXiv 2207.11518 (section 3) for any number of networks.

    ``sum CE(all heads) + sum_a CE(aggregate_a) + sum_a sum_b KD(final_a <- aggregate_b) + MCL``,
    with MCL the four layer-wise terms weighted by the matcher. The matcher is trained by the
    bilevel step only: its weights are constants in the ordinary step, and in the inner objective
    they have a gradient, through the features too.

    The terms are sums over ordered pairs of networks and all pairs of their stages, each in both
    directions, as in the published code: a direction counts twice. Against banks, vcl and soft_vcl
    contrast every network with its own bank, where that code takes one bank for both of a pair.
    """

    auxiliary_heads = True

    @dataclass
    class Options(ContrastiveMethod.Options):
        distill_temperature: float = setting(3.0, "softens the logits in logit distillation")
        matcher_dim: int = setting(128, "width of the space the matcher compares stages in")

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature("distill_temperature", self.distill_temperature)
            check_width("matcher_dim", self.matcher_dim)

    def __init__(
        self, feature_dims: Sequence[Sequence[int]], options: Options | None = None
    ) -> None:
        super().__init__(feature_dims, options)
        self.matcher = LayerMatcher(feature_dims, self.options.matcher_dim)
        self.aggregator = LogitAggregator(
            [stages[-1] for stages in feature_dims], [len(stages) for stages in feature_dims]
        )

    def loss(self, outputs: PeerOutputs, batch: Batch) -> dict[str, Tensor]:
        aggregates = self.aggregator(outputs.features, outputs.logits)
        with torch.no_grad():
            pair_weights = self.matcher(outputs.features)
        contrastive = self.contrastive_objective(outputs, batch, pair_weights)
        parts = {
            "ce": sum_cross_entropy(outputs, batch.labels),
            "aggregate_ce": torch.stack(
                [cross_entropy(wide(z), batch.labels) for z in aggregates]
            ).sum(),
            "distill": torch.stack(
                [
                    kd_loss(student, teacher, self.options.distill_temperature)
                    for student in outputs.final_logits
                    for teacher in aggregates
                ]
            ).sum(),
        }
        total = torch.stack(list(parts.values())).sum() + contrastive.loss
        return {"loss": total, **parts, **contrastive.terms._asdict()}

    def meta_parameters(self) -> list[nn.Parameter]:
        return list(self.matcher.parameters())

    def inner_loss(self, outputs: PeerOutputs, batch: Batch) -> Tensor:
        terms = self.contrastive_terms(outputs, batch, self.matcher(outputs.features))
        return terms.weighted_sum(*self.weights())

    def outer_loss(self, outputs: PeerOutputs, batch: Batch) -> Tensor:
        return sum_cross_entropy(outputs, batch.labels)
