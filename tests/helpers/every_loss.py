"""Every loss as a function of its embeddings, with small inputs in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mclfast
from mclfast import unit_norm

LABELS = torch.tensor([0, 1, 0, 2, 1, 1])
BATCH, WIDTH, SAMPLES = len(LABELS), 5, 30


@dataclass(frozen=True)
class LossCase:
    """A loss, and the embeddings and other arguments to call it with.

    Attributes:
        embeddings: tensor of the shape that the loss takes; two views or student and teacher are
            stacked.
        call: (embeddings, settings) -> the loss; terms and rows are added up with fixed weights.
    """

    name: str
    embeddings: Tensor
    call: Callable[..., Tensor]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _added(values: Any) -> Tensor:
    """A weighted sum of the values of a loss."""
    tensors = [values] if isinstance(values, Tensor) else list(values)[:4]
    return sum((0.3 + 0.2 * i) * x.sum() for i, x in enumerate(tensors))  # type: ignore[return-value]


def _on_rows(function: Callable[..., Any], *arguments: Any) -> Callable[..., Tensor]:
    return lambda e, **settings: _added(function(e, *arguments, **settings))


def _on_pair(function: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda e, **settings: function(e[0], e[1], **settings)


def every_loss(dtype: torch.dtype = torch.float64) -> list[LossCase]:
    """A case for each public loss, for its rows and terms too."""

    def e(*shape: int) -> Tensor:
        return unit_norm(torch.randn(*shape, generator=_generator(), dtype=torch.float64)).to(dtype)

    plain, layers = e(2, BATCH, WIDTH), e(2, 2, BATCH, WIDTH)
    pairs = torch.rand(4, 4, BATCH, generator=_generator(1), dtype=dtype)
    banks = e(2, SAMPLES, WIDTH)
    pos, neg = (torch.randint(SAMPLES, (BATCH, k), generator=_generator(k)) for k in (2, 7))
    keys = banks, pos, neg
    contrast = torch.cat([pos[:, :1], neg], 1)
    log_z = torch.full((2, 2), 3.0, dtype=dtype)

    def supcon(x: Tensor, **settings: Any) -> Tensor:
        return mclfast.supcon_loss(x[0], LABELS, **settings)

    def nce(x: Tensor, **settings: Any) -> Tensor:
        return mclfast.bank_nce_loss(x, banks, contrast, log_normalizer=log_z, **settings)

    return [
        LossCase("mcl_rows", layers, _on_rows(mclfast.mcl_rows, LABELS)),
        LossCase("mcl_terms", plain, _on_rows(mclfast.mcl_terms, LABELS)),
        LossCase("mcl_loss", plain, _on_rows(mclfast.mcl_loss, LABELS)),
        LossCase("layerwise_mcl_terms", layers, _on_rows(mclfast.layerwise_mcl_terms, LABELS)),
        LossCase("layerwise_mcl_loss", layers, _on_rows(mclfast.layerwise_mcl_loss, LABELS, pairs)),
        LossCase("supcon_loss", plain, supcon),
        LossCase("info_nce_loss", plain, _on_pair(mclfast.info_nce_loss)),
        LossCase("similarity_kl_loss", plain, _on_pair(mclfast.similarity_kl_loss)),
        LossCase("bank_mcl_rows", layers, _on_rows(mclfast.bank_mcl_rows, *keys)),
        LossCase("bank_mcl_terms", plain, _on_rows(mclfast.bank_mcl_terms, *keys)),
        LossCase("bank_mcl_loss", plain, _on_rows(mclfast.bank_mcl_loss, *keys)),
        LossCase(
            "layerwise_bank_mcl_terms", layers, _on_rows(mclfast.layerwise_bank_mcl_terms, *keys)
        ),
        LossCase(
            "layerwise_bank_mcl_loss",
            layers,
            _on_rows(mclfast.layerwise_bank_mcl_loss, *keys, pairs),
        ),
        LossCase("bank_nce_loss", plain, nce),
    ]
