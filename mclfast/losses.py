"""The losses as modules, with the defaults of their functional twins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mclfast import functional
from mclfast._checks import check_temperature
from mclfast.types import MCLObjective, MCLTerms


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


class MCLLoss(_KLLoss):
    """Module twin of :func:`mclfast.mcl_loss`.

    Examples:
        >>> loss = MCLLoss(temperature=0.1)
        >>> terms = loss(embeddings, labels)                       # [M, B, D], [B]
        >>> terms.weighted_sum(vcl=0.1, soft_vcl=1.0, icl=0.1, soft_icl=1.0).backward()
    """

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

    def forward(
        self, embeddings: Tensor | Sequence[Tensor], labels: Tensor
    ) -> MCLTerms | MCLObjective:
        return functional.mcl_loss(
            embeddings,
            labels,
            temperature=self.temperature,
            kl_temperature=self.kl_temperature,
            backend=self.backend,
            coefficients=self.coefficients,
        )


class LayerwiseMCLLoss(_KLLoss):
    """Module twin of :func:`mclfast.layerwise_mcl_loss`.

    Examples:
        >>> loss = LayerwiseMCLLoss(coefficients=(0.1, 1.0, 0.1, 1.0))
        >>> loss(embeddings, labels, weights).loss.backward()      # [M, L, B, D], [B], [N, N, B]
    """

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

    def forward(
        self,
        embeddings: Tensor | Sequence[Sequence[Tensor]],
        labels: Tensor,
        pair_weights: Tensor | None = None,
    ) -> MCLTerms | MCLObjective:
        return functional.layerwise_mcl_loss(
            embeddings,
            labels,
            pair_weights,
            temperature=self.temperature,
            kl_temperature=self.kl_temperature,
            backend=self.backend,
            coefficients=self.coefficients,
        )


class SupConLoss(_Loss):
    """Module twin of :func:`mclfast.supcon_loss`.

    Examples:
        >>> SupConLoss(temperature=0.1)(embeddings, labels).backward()  # [B, D], [B]
    """

    def __init__(self, temperature: float = 0.1, backend: str = "auto") -> None:
        super().__init__(temperature, backend)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return functional.supcon_loss(
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
        return functional.info_nce_loss(
            a, b, temperature=self.temperature, backend=self.backend
        )


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
        return functional.similarity_kl_loss(
            student,
            teacher,
            temperature=self.temperature,
            kl_temperature=self.kl_temperature,
            backend=self.backend,
        )
