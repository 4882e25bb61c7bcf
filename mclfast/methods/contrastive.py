"""What the mutual contrastive methods share: the four terms, in the batch or against banks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mclfast import _backend, bank_functional, functional
from mclfast._checks import check_integer, check_not_negative, check_temperature
from mclfast.cohort import PeerOutputs
from mclfast.contrast_sampler import ContrastIndices, ContrastSampler
from mclfast.memory_bank import DTYPES, MemoryBank
from mclfast.methods.base import Method
from mclfast.types import Batch, MCLObjective, MCLTerms, Setup


class ContrastiveMethod(Method):
    """A method with the four mutual contrastive terms among its losses.

    With ``loss="batch"`` anchors are contrasted with the batch, with ``loss="bank"`` with samples
    drawn from a memory bank of each network's last embeddings, for data sets whose classes are too
    many to meet in a batch.
    """

    projections = True

    @dataclass
    class Options(Method.Options):
        loss: Literal["batch", "bank"] = field(
            default="batch",
            metadata={"help": "what anchors are contrasted with: the batch, or memory banks"},
        )
        temperature: float = field(
            default=0.1, metadata={"help": "divides the cosine similarities"}
        )
        kl_temperature: float = field(
            default=3.0, metadata={"help": "softens the similarity distributions compared"}
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
        num_positives: int = field(
            default=1, metadata={"help": "bank entries of the anchor's class per anchor"}
        )
        num_negatives: int = field(
            default=8192, metadata={"help": "bank entries of other classes per anchor"}
        )
        shared_negatives: bool = field(
            default=False,
            metadata={"help": "one set of negatives for the whole batch, of classes not in it"},
        )
        bank_momentum: float = field(
            default=0.5, metadata={"help": "share of the old entry when a bank is updated"}
        )
        bank_dtype: Literal["float32", "bfloat16", "float16"] = field(
            default="float32", metadata={"help": "storage of the banks"}
        )
        bank_storage: Literal["device", "pinned"] = field(
            default="device",
            metadata={"help": "banks on the device of the run, or in pinned host memory"},
        )
        backend: str = field(
            default="auto", metadata={"help": "backend of the contrastive losses, see mclfast env"}
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("temperature", "kl_temperature"):
                check_temperature(name, getattr(self, name))
            for name in ("vcl_weight", "soft_vcl_weight", "icl_weight", "soft_icl_weight"):
                check_not_negative(name, getattr(self, name))
            for name in ("num_positives", "num_negatives"):
                check_integer(name, getattr(self, name), 1)
            if not 0 <= self.bank_momentum < 1:
                raise ValueError(
                    f"bank_momentum: expected a value in [0, 1), got {self.bank_momentum}"
                )
            _backend.check_name(self.backend)

    def __init__(
        self, feature_dims: Sequence[Sequence[int]], options: Options | None = None
    ) -> None:
        super().__init__(feature_dims, options)
        self.num_networks = len(feature_dims)
        self.bank: MemoryBank | None = None
        self.sampler: ContrastSampler | None = None
        self._drawn: tuple[Batch, ContrastIndices] | None = None

    def prepare(self, setup: Setup) -> None:
        if self.options.loss != "bank":
            return
        o = self.options
        labels, projection_dim, seed = setup.labels, setup.projection_dim, setup.seed
        if projection_dim is None:
            raise ValueError("projection_dim: expected a width for a method with banks, got None")
        self.bank = MemoryBank(
            self.num_networks,
            len(labels),
            projection_dim,
            momentum=o.bank_momentum,
            dtype=DTYPES[o.bank_dtype],
            device="pinned" if o.bank_storage == "pinned" else labels.device,
            seed=seed,
        )
        self.sampler = ContrastSampler(
            labels,
            o.num_negatives,
            num_positives=o.num_positives,
            shared_negatives=o.shared_negatives,
            seed=seed,
        )

    def check_device(self, device: torch.device) -> None:
        _backend.resolve(self.options.backend, device.type, banks=self.options.loss == "bank")
        if self.options.bank_storage == "pinned" and device.type != "cuda":
            raise ValueError(
                f"bank_storage: expected device on a {device.type} device, got pinned, which is "
                "for GPUs"
            )

    def after_step(self, outputs: PeerOutputs, batch: Batch) -> None:
        if self.bank is not None:
            last = torch.stack([stages[-1].detach() for stages in outputs.embeddings])
            self.bank.update(batch.index, last, backend=self.options.backend)

    def contrastive_terms(
        self, outputs: PeerOutputs, batch: Batch, pair_weights: Tensor | None = None
    ) -> MCLTerms:
        """The four terms, each differentiable; layer-wise where pair weights are given."""
        terms = self._call(outputs, batch, pair_weights, None)
        assert isinstance(terms, MCLTerms)
        return terms

    def contrastive_objective(
        self, outputs: PeerOutputs, batch: Batch, pair_weights: Tensor | None = None
    ) -> MCLObjective:
        """Their weighted sum, in the fastest form; layer-wise where pair weights are given."""
        objective = self._call(outputs, batch, pair_weights, self.coefficients())
        assert isinstance(objective, MCLObjective)
        return objective

    def coefficients(self) -> tuple[float, float, float, float]:
        """Weights of vcl, soft_vcl, icl, soft_icl."""
        o = self.options
        return o.vcl_weight, o.soft_vcl_weight, o.icl_weight, o.soft_icl_weight

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
            loss = functional.layerwise_mcl_loss if layerwise else functional.mcl_loss
            return loss(embeddings, batch.labels, *weights, **settings)
        if self.bank is None:
            raise RuntimeError("loss: expected prepare() to be called before a loss with banks")
        keys = (self.bank.banks, *self._indices(batch))
        bank_loss = (
            bank_functional.layerwise_bank_mcl_loss if layerwise else bank_functional.bank_mcl_loss
        )
        return bank_loss(embeddings, *keys, *weights, **settings)

    def _indices(self, batch: Batch) -> ContrastIndices:
        """Drawn once for a batch, whose bilevel step needs them again and again."""
        if self._drawn is None or self._drawn[0] is not batch:
            assert self.sampler is not None
            drawn = self.sampler.sample(batch.index, batch.step, backend=self.options.backend)
            self._drawn = (batch, drawn)
        return self._drawn[1]
