"""The losses as modules, with the defaults of their functional twins."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mclfast import functional
from mclfast._checks import check_positive
from mclfast.types import MCLTerms


class _Loss(nn.Module):
    """Keeps the settings that a functional twin takes as keywords."""

    def __init__(self, backend: str = "auto", **temperatures: float) -> None:
        super().__init__()
        self.settings: dict[str, float] = {
            name: check_positive(name, value) for name, value in temperatures.items()
        }
        self.backend = backend

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in {**self.settings, "backend": self.backend}.items())


class MCLLoss(_Loss):
    """Module twin of :func:`mclfast.mcl_loss`.

    Examples:
        >>> loss = MCLLoss(temperature=0.1)
        >>> terms = loss(embeddings, labels)                       # [M, B, D], [B]
        >>> terms.weighted_sum(vcl=0.1, soft_vcl=1.0, icl=0.1, soft_icl=1.0).backward()
    """

    def __init__(
        self, temperature: float = 0.1, kl_temperature: float = 3.0, backend: str = "auto"
    ) -> None:
        super().__init__(backend, temperature=temperature, kl_temperature=kl_temperature)

    def forward(self, embeddings: Tensor | Sequence[Tensor], labels: Tensor) -> MCLTerms:
        return functional.mcl_loss(embeddings, labels, backend=self.backend, **self.settings)


class LayerwiseMCLLoss(_Loss):
    """Module twin of :func:`mclfast.layerwise_mcl_loss`.

    Examples:
        >>> loss = LayerwiseMCLLoss()
        >>> terms = loss(embeddings, labels, matcher(features))    # [M, L, B, D], [B], [N, N, B]
        >>> terms.weighted_sum(vcl=0.1, soft_vcl=1.0, icl=0.1, soft_icl=1.0).backward()
    """

    def __init__(
        self, temperature: float = 0.1, kl_temperature: float = 3.0, backend: str = "auto"
    ) -> None:
        super().__init__(backend, temperature=temperature, kl_temperature=kl_temperature)

    def forward(
        self,
        embeddings: Tensor | Sequence[Sequence[Tensor]],
        labels: Tensor,
        pair_weights: Tensor | None = None,
    ) -> MCLTerms:
        return functional.layerwise_mcl_loss(
            embeddings, labels, pair_weights, backend=self.backend, **self.settings
        )


class SupConLoss(_Loss):
    """Module twin of :func:`mclfast.supcon_loss`.

    Examples:
        >>> SupConLoss(temperature=0.1)(normalize(features), labels).backward()  # [B, D], [B]
    """

    def __init__(self, temperature: float = 0.1, backend: str = "auto") -> None:
        super().__init__(backend, temperature=temperature)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return functional.supcon_loss(embeddings, labels, backend=self.backend, **self.settings)


class InfoNCELoss(_Loss):
    """Module twin of :func:`mclfast.info_nce_loss`.

    Examples:
        >>> InfoNCELoss(temperature=0.07)(images, texts).backward()       # [B, D] each
    """

    def __init__(self, temperature: float = 0.1, backend: str = "auto") -> None:
        super().__init__(backend, temperature=temperature)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return functional.info_nce_loss(a, b, backend=self.backend, **self.settings)


class SimilarityKLLoss(_Loss):
    """Module twin of :func:`mclfast.similarity_kl_loss`.

    Examples:
        >>> SimilarityKLLoss()(student_embeddings, teacher_embeddings).backward()  # [B, D], [B, D']
    """

    def __init__(
        self, temperature: float = 0.1, kl_temperature: float = 3.0, backend: str = "auto"
    ) -> None:
        super().__init__(backend, temperature=temperature, kl_temperature=kl_temperature)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return functional.similarity_kl_loss(
            student, teacher, backend=self.backend, **self.settings
        )
