"""The losses as modules, with the defaults of their functional twins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mclfast._base.checks import check_temperature
from mclfast.losses import banks as bank_functional
from mclfast.losses import in_batch
from mclfast.losses.results import MCLObjective, MCLTerms


class _Loss(nn.Module):
    """What all losses keep."""

    def __init__(self, temperature: float, backend: str) -> None:
        super().__init__()
        self.temperature = check_temperature("temperature", temperature)
        self.backend = backend

    def extra_repr(self) -> str:
        names = ("temperature", "kl_temperature", "backend", "coefficients")
        return ", ".join(f"{n}={getattr(self, n)!r}" for n in names if hasattr(self, n))


class _KLLoss(_Loss):
    """A loss that compares distributions."""

    def __init__(self, temperature: float, kl_temperature: float, backend: str) -> None:
        super().__init__(temperature, backend)
        self.kl_temperature = check_temperature("kl_temperature", kl_temperature)


class _ObjectiveLoss(_KLLoss):
    """The four terms, or with coefficients their weighted sum."""

    def __init__(
        self,
        temperature: float = 0.1,
        kl_temperature: float = 3.0,
        backend: str = "auto",
        coefficients: Sequence[float] | None = None,
    ) -> None:
        super().__init__(temperature, kl_temperature, backend)
        # Any: whether there are coefficients decides what the function returns.
        self.coefficients: Any = coefficients

    def _settings(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "kl_temperature": self.kl_temperature,
            "backend": self.backend,
            "coefficients": self.coefficients,
        }


class MCLLoss(_ObjectiveLoss):
    """Module twin of :func:`mclfast.mcl_loss`.

    Examples:
        >>> loss = MCLLoss(temperature=0.1)
        >>> terms = loss(embeddings, labels)                       # [M, B, D], [B]
        >>> terms.weighted_sum(vcl=0.1, soft_vcl=1.0, icl=0.1, soft_icl=1.0).backward()
    """

    def forward(
        self, embeddings: Tensor | Sequence[Tensor], labels: Tensor
    ) -> MCLTerms | MCLObjective:
        return in_batch.mcl_loss(embeddings, labels, **self._settings())


class LayerwiseMCLLoss(_ObjectiveLoss):
    """Module twin of :func:`mclfast.layerwise_mcl_loss`.

    Examples:
        >>> loss = LayerwiseMCLLoss(coefficients=(0.1, 1.0, 0.1, 1.0))
        >>> loss(embeddings, labels, weights).loss.backward()      # [M, L, B, D], [B], [N, N, B]
    """

    def forward(
        self,
        embeddings: Tensor | Sequence[Sequence[Tensor]],
        labels: Tensor,
        pair_weights: Tensor | None = None,
    ) -> MCLTerms | MCLObjective:
        return in_batch.layerwise_mcl_loss(embeddings, labels, pair_weights, **self._settings())


class SupConLoss(_Loss):
    """Module twin of :func:`mclfast.supcon_loss`.

    Examples:
        >>> SupConLoss(temperature=0.1)(embeddings, labels).backward()  # [B, D], [B]
    """

    def __init__(self, temperature: float = 0.1, backend: str = "auto") -> None:
        super().__init__(temperature, backend)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return in_batch.supcon_loss(
            embeddings, labels, temperature=self.temperature, backend=self.backend
        )


class InfoNCELoss(_Loss):
    """Module twin of :func:`mclfast.info_nce_loss`.

    Examples:
        >>> InfoNCELoss(temperature=0.07)(images, texts).backward()     # [B, D] each
    """

    def __init__(self, temperature: float = 0.1, backend: str = "auto") -> None:
        super().__init__(temperature, backend)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return in_batch.info_nce_loss(a, b, temperature=self.temperature, backend=self.backend)


class SimilarityKLLoss(_KLLoss):
    """Module twin of :func:`mclfast.similarity_kl_loss`.

    Examples:
        >>> SimilarityKLLoss()(student, teacher).backward()             # [B, D], [B, D']
    """

    def __init__(
        self, temperature: float = 0.1, kl_temperature: float = 3.0, backend: str = "auto"
    ) -> None:
        super().__init__(temperature, kl_temperature, backend)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return in_batch.similarity_kl_loss(
            student,
            teacher,
            temperature=self.temperature,
            kl_temperature=self.kl_temperature,
            backend=self.backend,
        )


class BankMCLLoss(_ObjectiveLoss):
    """Module twin of :func:`mclfast.bank_mcl_loss`.

    Examples:
        >>> bank = MemoryBank(2, len(labels), 128)
        >>> sampler = ContrastSampler(labels, 8192)
        >>> loss = BankMCLLoss(temperature=0.07, coefficients=(0.1, 1.0, 0.1, 1.0))
        >>> loss(embeddings, bank.banks, *sampler.sample(index, step)).loss.backward()
        >>> bank.update(index, embeddings.detach())                # [M, B, D]
    """

    def forward(
        self, embeddings: Tensor | Sequence[Tensor], banks: Tensor, pos_idx: Tensor, neg_idx: Tensor
    ) -> MCLTerms | MCLObjective:
        return bank_functional.bank_mcl_loss(
            embeddings, banks, pos_idx, neg_idx, **self._settings()
        )


class LayerwiseBankMCLLoss(_ObjectiveLoss):
    """Module twin of :func:`mclfast.layerwise_bank_mcl_loss`.

    Examples:
        >>> loss = LayerwiseBankMCLLoss(temperature=0.07, coefficients=(0.01, 1.0, 0.01, 1.0))
        >>> indices = sampler.sample(index, step)
        >>> loss(embeddings, bank.banks, *indices, weights).loss.backward()  # [M, L, B, D]
    """

    def forward(
        self,
        embeddings: Tensor | Sequence[Sequence[Tensor]],
        banks: Tensor,
        pos_idx: Tensor,
        neg_idx: Tensor,
        pair_weights: Tensor | None = None,
    ) -> MCLTerms | MCLObjective:
        return bank_functional.layerwise_bank_mcl_loss(
            embeddings, banks, pos_idx, neg_idx, pair_weights, **self._settings()
        )


class BankNCELoss(_Loss):
    """Module twin of :func:`mclfast.bank_nce_loss`.

    Args:
        temperature: divides the cosine similarities.
        backend: "auto" or a name that ``mclfast env`` lists.
        freeze_normalizer: keep the normalising constants of the first batch, as contrastive
            representation distillation does, instead of estimating them from every batch.

    Attributes:
        log_normalizer: [M, M] buffer once they are frozen, part of ``state_dict`` then.

    Examples:
        >>> loss = BankNCELoss(temperature=0.07, freeze_normalizer=True)
        >>> contrast_idx = torch.cat(sampler.sample(index, step), 1)   # of num_positives=0
        >>> loss(torch.stack([student, teacher]), bank.banks, contrast_idx).backward()
    """

    log_normalizer: Tensor | None

    def __init__(
        self, temperature: float = 0.1, backend: str = "auto", freeze_normalizer: bool = False
    ) -> None:
        super().__init__(temperature, backend)
        self.freeze_normalizer = freeze_normalizer
        self.register_buffer("log_normalizer", None)

    def forward(
        self, embeddings: Tensor | Sequence[Tensor], banks: Tensor, contrast_idx: Tensor
    ) -> Tensor:
        settings: dict[str, Any] = {"temperature": self.temperature, "backend": self.backend}
        if self.freeze_normalizer and self.log_normalizer is None:
            found = bank_functional.bank_nce_log_normalizer(
                embeddings, banks, contrast_idx, **settings
            )
            # The first batch may be one of evaluation, those after it train.
            with torch.inference_mode(False):
                self.log_normalizer = found.clone()
        return bank_functional.bank_nce_loss(
            embeddings, banks, contrast_idx, log_normalizer=self.log_normalizer, **settings
        )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # A buffer that is None takes nothing from a state.
        if f"{prefix}log_normalizer" in state_dict and self.log_normalizer is None:
            self.log_normalizer = torch.empty_like(state_dict[f"{prefix}log_normalizer"])
        super()._load_from_state_dict(state_dict, prefix, *rest)
