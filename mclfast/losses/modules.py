"""The losses as modules, with the defaults of the functions of the same name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mclfast._base.checks import check_temperature, check_weights
from mclfast.losses import banks as bank_losses
from mclfast.losses import in_batch
from mclfast.losses.results import PUBLISHED_WEIGHTS, MCLTerms, Temperature, Weights


class _Loss(nn.Module):
    """A loss that keeps the settings of its function; tensors among them are trained or moved."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        for name, value in settings.items():
            if name.endswith("temperature"):
                value = check_temperature(name, value)
            self._keep(name, value)
        self._settings = tuple(settings)

    def _keep(self, name: str, value: Any) -> None:
        # Parameters and buffers follow ``.to()``, and optimisers find the parameters.
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(name, value)
        else:
            setattr(self, name, value)

    def __prepare_scriptable__(self) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__}: torch.jit.script cannot read the losses, which choose a "
            "backend when they are called; torch.compile and torch.export can"
        )

    def settings(self) -> dict[str, Any]:
        """The arguments that the module passes to its function."""
        return {name: getattr(self, name) for name in self._settings}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())


class _WeightedLoss(_Loss):
    """A weighted sum of the four mutual contrastive terms; trained weights are its parameters."""

    def __init__(
        self,
        weights: Weights = PUBLISHED_WEIGHTS,
        temperature: Temperature = 0.1,
        kl_temperature: Temperature = 3.0,
        backend: str = "auto",
        normalize: bool = False,
    ) -> None:
        super().__init__(
            temperature=temperature,
            kl_temperature=kl_temperature,
            backend=backend,
            normalize=normalize,
        )
        entries = check_weights(weights)
        if isinstance(weights, Tensor):
            self._keep("weights", weights)
        else:
            for term, weight in zip(MCLTerms._fields, entries, strict=True):
                self._keep(f"{term}_weight", weight)

    def settings(self) -> dict[str, Any]:
        if hasattr(self, "weights"):
            return {"weights": self.weights, **super().settings()}
        weights = tuple(getattr(self, f"{term}_weight") for term in MCLTerms._fields)
        return {"weights": weights, **super().settings()}


class MCLLoss(_WeightedLoss):
    """Module form of :func:`mclfast.mcl_loss`.

    Args:
        weights: weights of vcl, soft_vcl, icl and soft_icl: numbers or 0-dim tensors, or one tensor
            [4]. An ``nn.Parameter`` among them is a parameter of the module and is trained.
        temperature: divides the cosine similarities: a number in [1e-6, 1e6], or a 0-dim tensor; an
            ``nn.Parameter`` is a parameter of the module and is trained.
        kl_temperature: softens the distributions that are compared, as ``temperature`` in kind. One
            that is trained takes the plain form.
        backend: "auto" or a name that ``mclfast env`` lists.
        normalize: whether to divide every embedding by its norm first.

    Examples:
        >>> import torch
        >>> from mclfast import MCLLoss, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> loss = MCLLoss(weights=(0.1, 1.0, 0.1, 1.0))
        >>> loss(unit_norm(torch.randn(2, 8, 16)), torch.arange(8) % 4).shape
        torch.Size([])
    """

    def forward(self, embeddings: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss, 0-dim, for embeddings [M, B, D] and labels [B]."""
        return in_batch.mcl_loss(embeddings, labels, **self.settings())


class LayerwiseMCLLoss(_WeightedLoss):
    """Module form of :func:`mclfast.layerwise_mcl_loss`.

    Args:
        weights: weights of vcl, soft_vcl, icl and soft_icl: numbers or 0-dim tensors, or one tensor
            [4]. An ``nn.Parameter`` among them is a parameter of the module and is trained.
        temperature: divides the cosine similarities: a number in [1e-6, 1e6], or a 0-dim tensor; an
            ``nn.Parameter`` is a parameter of the module and is trained.
        kl_temperature: softens the distributions that are compared, as ``temperature`` in kind. One
            that is trained takes the plain form.
        backend: "auto" or a name that ``mclfast env`` lists.
        normalize: whether to divide every embedding by its norm first.

    Examples:
        >>> import torch
        >>> from mclfast import LayerwiseMCLLoss, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> loss = LayerwiseMCLLoss(weights=torch.nn.Parameter(torch.ones(4)))
        >>> loss(unit_norm(torch.randn(2, 3, 8, 16)), torch.arange(8) % 4).backward()
        >>> loss.weights.grad.shape
        torch.Size([4])
    """

    def forward(
        self,
        embeddings: Tensor | Sequence[Sequence[Tensor]],
        labels: Tensor,
        pair_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss, 0-dim, for embeddings [M, L, B, D], labels [B], pair weights [N, N, B]."""
        return in_batch.layerwise_mcl_loss(embeddings, labels, pair_weights, **self.settings())


class SupConLoss(_Loss):
    """Module form of :func:`mclfast.supcon_loss`.

    Args:
        temperature: divides the cosine similarities: a number in [1e-6, 1e6], or a 0-dim tensor; an
            ``nn.Parameter`` is a parameter of the module and is trained.
        backend: "auto" or a name that ``mclfast env`` lists.
        normalize: whether to divide every embedding by its norm first.

    Examples:
        >>> import torch
        >>> from mclfast import SupConLoss, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> SupConLoss(temperature=0.1)(unit_norm(torch.randn(8, 16)), torch.arange(8) % 4).shape
        torch.Size([])
    """

    def __init__(
        self, temperature: Temperature = 0.1, backend: str = "auto", normalize: bool = False
    ) -> None:
        super().__init__(temperature=temperature, backend=backend, normalize=normalize)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss, 0-dim, for embeddings [B, D] and labels [B]."""
        return in_batch.supcon_loss(embeddings, labels, **self.settings())


class InfoNCELoss(_Loss):
    """Module form of :func:`mclfast.info_nce_loss`.

    Args:
        temperature: divides the cosine similarities: a number in [1e-6, 1e6], or a 0-dim tensor; an
            ``nn.Parameter`` is a parameter of the module and is trained.
        backend: "auto" or a name that ``mclfast env`` lists.
        normalize: whether to divide every embedding by its norm first.

    Examples:
        >>> import torch
        >>> from mclfast import InfoNCELoss, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> images, texts = unit_norm(torch.randn(2, 8, 16))
        >>> InfoNCELoss(temperature=0.07)(images, texts).shape
        torch.Size([])
    """

    def __init__(
        self, temperature: Temperature = 0.1, backend: str = "auto", normalize: bool = False
    ) -> None:
        super().__init__(temperature=temperature, backend=backend, normalize=normalize)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The loss, 0-dim, for two views [B, D] of the same samples."""
        return in_batch.info_nce_loss(a, b, **self.settings())


class SimilarityKLLoss(_Loss):
    """Module form of :func:`mclfast.similarity_kl_loss`.

    Args:
        temperature: divides the cosine similarities: a number in [1e-6, 1e6], or a 0-dim tensor; an
            ``nn.Parameter`` is a parameter of the module and is trained.
        kl_temperature: softens the distributions that are compared, as ``temperature`` in kind. One
            that is trained takes the plain form.
        backend: "auto" or a name that ``mclfast env`` lists.
        normalize: whether to divide every embedding by its norm first.

    Examples:
        >>> import torch
        >>> from mclfast import SimilarityKLLoss, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> student, teacher = unit_norm(torch.randn(8, 16)), unit_norm(torch.randn(8, 32))
        >>> SimilarityKLLoss()(student, teacher).shape
        torch.Size([])
    """

    def __init__(
        self,
        temperature: Temperature = 0.1,
        kl_temperature: Temperature = 3.0,
        backend: str = "auto",
        normalize: bool = False,
    ) -> None:
        super().__init__(
            temperature=temperature,
            kl_temperature=kl_temperature,
            backend=backend,
            normalize=normalize,
        )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss, 0-dim, for a student [B, D] and a teacher [B, D'] of the same samples."""
        return in_batch.similarity_kl_loss(student, teacher, **self.settings())


class BankMCLLoss(_WeightedLoss):
    """Module form of :func:`mclfast.bank_mcl_loss`.

    Args:
        weights: weights of vcl, soft_vcl, icl and soft_icl: numbers or 0-dim tensors, or one tensor
            [4]. An ``nn.Parameter`` among them is a parameter of the module and is trained.
        temperature: divides the cosine similarities: a number in [1e-6, 1e6], or a 0-dim tensor; an
            ``nn.Parameter`` is a parameter of the module and is trained.
        kl_temperature: softens the distributions that are compared, as ``temperature`` in kind. One
            that is trained takes the plain form.
        backend: "auto" or a name that ``mclfast env`` lists.
        normalize: whether to divide every embedding by its norm first.

    Examples:
        >>> import torch
        >>> from mclfast import BankMCLLoss, ContrastSampler, MemoryBank, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> bank = MemoryBank(num_networks=2, num_samples=40, dim=16)
        >>> sampler = ContrastSampler(torch.arange(40) % 4, num_negatives=8)
        >>> indices = sampler.sample(torch.arange(6), step=0)
        >>> loss = BankMCLLoss(temperature=0.07)
        >>> loss(unit_norm(torch.randn(2, 6, 16)), bank.banks, *indices).shape
        torch.Size([])
    """

    def forward(
        self, embeddings: Tensor | Sequence[Tensor], banks: Tensor, pos_idx: Tensor, neg_idx: Tensor
    ) -> Tensor:
        """The loss, 0-dim, for embeddings [M, B, D], banks [M, n, D] and drawn sample numbers."""
        return bank_losses.bank_mcl_loss(embeddings, banks, pos_idx, neg_idx, **self.settings())


class LayerwiseBankMCLLoss(_WeightedLoss):
    """Module form of :func:`mclfast.layerwise_bank_mcl_loss`.

    Args:
        weights: weights of vcl, soft_vcl, icl and soft_icl: numbers or 0-dim tensors, or one tensor
            [4]. An ``nn.Parameter`` among them is a parameter of the module and is trained.
        temperature: divides the cosine similarities: a number in [1e-6, 1e6], or a 0-dim tensor; an
            ``nn.Parameter`` is a parameter of the module and is trained.
        kl_temperature: softens the distributions that are compared, as ``temperature`` in kind. One
            that is trained takes the plain form.
        backend: "auto" or a name that ``mclfast env`` lists.
        normalize: whether to divide every embedding by its norm first.

    Examples:
        >>> import torch
        >>> from mclfast import LayerwiseBankMCLLoss, ContrastSampler, MemoryBank, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> bank = MemoryBank(num_networks=2, num_samples=40, dim=16)
        >>> sampler = ContrastSampler(torch.arange(40) % 4, num_negatives=8)
        >>> indices = sampler.sample(torch.arange(6), step=0)
        >>> loss = LayerwiseBankMCLLoss(weights=(0.01, 1.0, 0.01, 1.0), temperature=0.07)
        >>> loss(unit_norm(torch.randn(2, 3, 6, 16)), bank.banks, *indices).shape
        torch.Size([])
    """

    def forward(
        self,
        embeddings: Tensor | Sequence[Sequence[Tensor]],
        banks: Tensor,
        pos_idx: Tensor,
        neg_idx: Tensor,
        pair_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss, 0-dim, for embeddings [M, L, B, D], banks [M, n, D], pair weights [N, N, B]."""
        return bank_losses.layerwise_bank_mcl_loss(
            embeddings, banks, pos_idx, neg_idx, pair_weights, **self.settings()
        )


class BankNCELoss(_Loss):
    """Module form of :func:`mclfast.bank_nce_loss`.

    Args:
        temperature: divides the cosine similarities: a number in [1e-6, 1e6], or a 0-dim tensor; an
            ``nn.Parameter`` is a parameter of the module and is trained.
        backend: "auto" or a name that ``mclfast env`` lists.
        freeze_normalizer: keep the normalising constants of the first batch, as contrastive
            representation distillation does, instead of estimating them from every batch.
        normalize: whether to divide every embedding by its norm first.

    Attributes:
        log_normalizer: [M, M] buffer once they are frozen, part of ``state_dict`` then.

    Examples:
        >>> import torch
        >>> from mclfast import BankNCELoss, ContrastSampler, MemoryBank, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> bank = MemoryBank(num_networks=2, num_samples=40, dim=16)
        >>> sampler = ContrastSampler(torch.arange(40) % 4, num_negatives=8, num_positives=0)
        >>> indices = sampler.sample(torch.arange(6), step=0)
        >>> loss = BankNCELoss(temperature=0.07, freeze_normalizer=True)
        >>> student_and_teacher = unit_norm(torch.randn(2, 6, 16))
        >>> loss(student_and_teacher, bank.banks, torch.cat(indices, 1)).shape
        torch.Size([])
    """

    log_normalizer: Tensor | None

    def __init__(
        self,
        temperature: Temperature = 0.1,
        backend: str = "auto",
        freeze_normalizer: bool = False,
        normalize: bool = False,
    ) -> None:
        super().__init__(temperature=temperature, backend=backend, normalize=normalize)
        self.freeze_normalizer = freeze_normalizer
        self.register_buffer("log_normalizer", None)

    def forward(
        self, embeddings: Tensor | Sequence[Tensor], banks: Tensor, contrast_idx: Tensor
    ) -> Tensor:
        """The loss, 0-dim, for embeddings [M, B, D], banks [M, n, D], sample numbers [B, 1 + K]."""
        settings = self.settings()
        if self.freeze_normalizer and self.log_normalizer is None:
            found = bank_losses.bank_nce_log_normalizer(embeddings, banks, contrast_idx, **settings)
            # The first batch may be one of evaluation, those after it train.
            with torch.inference_mode(False):
                self.log_normalizer = found.clone()
        return bank_losses.bank_nce_loss(
            embeddings, banks, contrast_idx, log_normalizer=self.log_normalizer, **settings
        )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # A buffer that is None takes nothing from a state.
        if f"{prefix}log_normalizer" in state_dict and self.log_normalizer is None:
            self.log_normalizer = torch.empty_like(state_dict[f"{prefix}log_normalizer"])
        super()._load_from_state_dict(state_dict, prefix, *rest)
