"""L-MCL: layer-wise mutual contrastive learning with learned layer matching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mclfast import _backend, functional
from mclfast._checks import check_integer, check_not_negative, check_temperature
from mclfast.aggregation import LogitAggregator
from mclfast.cohort import PeerOutputs
from mclfast.distillation import kd_loss
from mclfast.matching import LayerMatcher
from mclfast.methods.base import Method
from mclfast.methods.baseline import sum_cross_entropy
from mclfast.reference import wide


class LayerwiseMCL(Method):
    """The loss of arXiv 2207.11518 (section 3) for any number of networks.

    ``sum CE(all heads) + sum_a CE(aggregate_a) + sum_a sum_b KD(final_a <- aggregate_b) + MCL``,
    with MCL the four layer-wise terms weighted by the matcher. The matcher is trained by the
    bilevel step only: in the ordinary step its weights are constants, in the inner objective they
    are live, through the features too.
    """

    auxiliary_heads = True
    projections = True

    @dataclass
    class Options(Method.Options):
        temperature: float = field(
            default=0.1, metadata={"help": "divides the cosine similarities"}
        )
        kl_temperature: float = field(
            default=3.0, metadata={"help": "softens the similarity distributions compared"}
        )
        distill_temperature: float = field(
            default=3.0, metadata={"help": "softens the logits in logit distillation"}
        )
        vcl_weight: float = field(
            default=0.1, metadata={"help": "weight of the term inside networks"}
        )
        soft_vcl_weight: float = field(
            default=1.0, metadata={"help": "weight of the KL between intra-network similarities"}
        )
        icl_weight: float = field(
            default=0.1, metadata={"help": "weight of the term between networks"}
        )
        soft_icl_weight: float = field(
            default=1.0, metadata={"help": "weight of the KL between inter-network similarities"}
        )
        matcher_dim: int = field(
            default=128, metadata={"help": "width of the space the matcher compares stages in"}
        )
        backend: str = field(
            default="auto", metadata={"help": "backend of the contrastive losses, see mclfast env"}
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("temperature", "kl_temperature", "distill_temperature"):
                check_temperature(name, getattr(self, name))
            for name in ("vcl_weight", "soft_vcl_weight", "icl_weight", "soft_icl_weight"):
                check_not_negative(name, getattr(self, name))
            check_integer("matcher_dim", self.matcher_dim, 1)
            _backend.check_name(self.backend)

    def __init__(
        self, feature_dims: Sequence[Sequence[int]], options: Options | None = None
    ) -> None:
        super().__init__(feature_dims, options)
        self.matcher = LayerMatcher(feature_dims, self.options.matcher_dim)
        self.aggregator = LogitAggregator(
            [stages[-1] for stages in feature_dims], [len(stages) for stages in feature_dims]
        )

    def check_device(self, device: torch.device) -> None:
        _backend.resolve(self.options.backend, device.type)

    def loss(self, outputs: PeerOutputs, labels: Tensor) -> dict[str, Tensor]:
        aggregates = self.aggregator(outputs.features, outputs.logits)
        with torch.no_grad():
            pair_weights = self.matcher(outputs.features)
        contrastive = functional.layerwise_mcl_loss(
            outputs.embeddings,
            labels,
            pair_weights,
            coefficients=self._coefficients(),
            **self._settings(),
        )
        parts = {
            "ce": sum_cross_entropy(outputs, labels),
            "aggregate_ce": torch.stack(
                [cross_entropy(wide(z), labels) for z in aggregates]
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

    def inner_loss(self, outputs: PeerOutputs, labels: Tensor) -> Tensor:
        terms = functional.layerwise_mcl_loss(
            outputs.embeddings, labels, self.matcher(outputs.features), **self._settings()
        )
        return terms.weighted_sum(*self._coefficients())

    def outer_loss(self, outputs: PeerOutputs, labels: Tensor) -> Tensor:
        return sum_cross_entropy(outputs, labels)

    def _coefficients(self) -> tuple[float, float, float, float]:
        """Weights of vcl, soft_vcl, icl, soft_icl."""
        o = self.options
        return o.vcl_weight, o.soft_vcl_weight, o.icl_weight, o.soft_icl_weight

    def _settings(self) -> dict[str, Any]:
        o = self.options
        return {
            "temperature": o.temperature,
            "kl_temperature": o.kl_temperature,
            "backend": o.backend,
        }
