"""Base class of the mutual contrastive methods: the four terms, in the batch or against banks."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from torch import Tensor

from mclfast._base.checks import check_keys, check_temperature
from mclfast._base.settings import setting
from mclfast.cohort.outputs import Batch, PeerOutputs
from mclfast.losses import banks, in_batch
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
            check_keys("num_positives", self.num_positives)

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
        terms: MCLTerms = self._call("terms", outputs, batch, pair_weights)
        return terms

    def contrastive_objective(
        self, outputs: PeerOutputs, batch: Batch, pair_weights: Tensor | None = None
    ) -> MCLObjective:
        """The weighted sum of the four terms, in the fastest form; layer-wise with pair weights."""
        weights = self.weights()
        objective: MCLObjective = self._call(
            "objective", outputs, batch, pair_weights, weights=weights
        )
        return objective

    def weights(self) -> tuple[float, float, float, float]:
        """The weights of vcl, soft_vcl, icl, soft_icl, in this order."""
        return term_weights(self.options)

    def _call(
        self,
        form: Literal["terms", "objective"],
        outputs: PeerOutputs,
        batch: Batch,
        pair_weights: Tensor | None,
        **settings: Any,
    ) -> Any:
        """A form of the loss of the options: in the batch or with banks, layer-wise or not."""
        o = self.options
        embeddings: Any = outputs.embeddings
        module: ModuleType
        if o.loss == "batch":
            module, name, arguments = in_batch, "mcl", [batch.labels]
        else:
            stored, indices = self.contrast(batch)
            module, name, arguments = banks, "bank_mcl", [stored, *indices]
        if pair_weights is None:
            embeddings = [stages[-1] for stages in outputs.embeddings]
        else:
            arguments.append(pair_weights)
            name = f"layerwise_{name}"
        return getattr(module, f"{name}_{form}")(
            embeddings,
            *arguments,
            temperature=o.temperature,
            kl_temperature=o.kl_temperature,
            backend=o.backend,
            **settings,
        )
