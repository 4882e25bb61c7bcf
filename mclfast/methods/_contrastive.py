"""Base class of the mutual contrastive methods: the four terms, in the batch or against banks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from mclfast._base.checks import check_integer, check_temperature
from mclfast._base.settings import setting
from mclfast.cohort.outputs import Batch, PeerOutputs
from mclfast.losses import banks as bank_functional
from mclfast.losses import in_batch
from mclfast.losses.results import MCLObjective, MCLTerms
from mclfast.methods._banked import BankMethod
from mclfast.methods._options import check_term_weights, term_weights


class ContrastiveMethod(BankMethod):
    """A method with the four mutual contrastive terms among its losses.

    With ``loss="batch"`` anchors are contrasted with the batch, with ``loss="bank"`` with samples
    drawn from a memory bank of each network's last embeddings, for data sets whose classes are too
    many to meet in a batch.

    As in the published code, the same image in another network is a positive in the banks, and
    neither positive nor negative in the batch. An anchor without a positive adds nothing to vcl and
    icl, where the published code gives NaN; means are over all anchors. The default temperature and
    weights are those published for the batch; the recipes for ImageNet hold those for banks.
    """

    @dataclass
    class Options(BankMethod.Options):
        loss: Literal["batch", "bank"] = setting(
            "batch", "what anchors are contrasted with: the batch, or memory banks"
        )
        kl_temperature: float = setting(3.0, "softens the similarity distributions compared")
        vcl_weight: float = setting(0.1, "weight of the term inside networks")
        soft_vcl_weight: float = setting(1.0, "weight of the KL between intra-network similarities")
        icl_weight: float = setting(0.1, "weight of the term between networks")
        soft_icl_weight: float = setting(1.0, "weight of the KL between inter-network similarities")
        num_positives: int = setting(1, "bank entries of the anchor's class per anchor")
        shared_negatives: bool = setting(
            False, "one set of negatives for the whole batch, of classes not in it"
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature("kl_temperature", self.kl_temperature)
            check_term_weights(self)
            check_integer("num_positives", self.num_positives, 1)

    @property
    def uses_banks(self) -> bool:
        return bool(self.options.loss == "bank")

    @property
    def repeatable(self) -> bool:
        return not self.uses_banks

    def sampling(self) -> dict[str, Any]:
        o = self.options
        return {"num_positives": o.num_positives, "shared_negatives": o.shared_negatives}

    def contrastive_terms(
        self, outputs: PeerOutputs, batch: Batch, pair_weights: Tensor | None = None
    ) -> MCLTerms:
        """The four terms, each differentiable; layer-wise with pair weights."""
        terms = self._call(outputs, batch, pair_weights, None)
        assert isinstance(terms, MCLTerms)
        return terms

    def contrastive_objective(
        self, outputs: PeerOutputs, batch: Batch, pair_weights: Tensor | None = None
    ) -> MCLObjective:
        """The weighted sum of the four terms, in the fastest form; layer-wise with pair weights."""
        objective = self._call(outputs, batch, pair_weights, self.coefficients())
        assert isinstance(objective, MCLObjective)
        return objective

    def coefficients(self) -> tuple[float, float, float, float]:
        """The weights of vcl, soft_vcl, icl, soft_icl, in this order."""
        return term_weights(self.options)

    def _call(
        self,
        outputs: PeerOutputs,
        batch: Batch,
        pair_weights: Tensor | None,
        coefficients: Sequence[float] | None,
    ) -> MCLTerms | MCLObjective:
        o = self.options
        settings: dict[str, Any] = {
            "temperature": o.temperature,
            "kl_temperature": o.kl_temperature,
            "backend": o.backend,
            "coefficients": coefficients,
        }
        layerwise = pair_weights is not None
        embeddings: Any = outputs.embeddings
        if not layerwise:
            embeddings = [stages[-1] for stages in outputs.embeddings]
        weights = [pair_weights] if layerwise else []
        if o.loss == "batch":
            loss = in_batch.layerwise_mcl_loss if layerwise else in_batch.mcl_loss
            return loss(embeddings, batch.labels, *weights, **settings)
        banks, indices = self.contrast(batch)
        bank_loss = (
            bank_functional.layerwise_bank_mcl_loss if layerwise else bank_functional.bank_mcl_loss
        )
        return bank_loss(embeddings, banks, *indices, *weights, **settings)
