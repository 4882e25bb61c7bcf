"""Labels of every integer kind and of any size give the same loss; others are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mclfast import layerwise_mcl_loss, mcl_loss, supcon_loss, unit_norm

pytestmark = pytest.mark.usefixtures("backend")

LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 4])
LOSSES: dict[str, Callable[..., Any]] = {
    "supcon": lambda z, y, **o: supcon_loss(z[0, 0], y, **o),
    "mcl": lambda z, y, **o: mcl_loss(z[:, 0], y, **o),
    "layerwise mcl": layerwise_mcl_loss,
}


def embeddings() -> Tensor:
    return unit_norm(torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("loss", LOSSES)
def test_kinds_and_sizes_of_labels(loss, backend):
    z, find = embeddings(), LOSSES[loss]
    want = find(z, LABELS, backend=backend)
    kinds = {
        torch.uint8: 60,
        torch.int16: -8000,
        torch.uint16: 16_000,
        torch.int32: 5 * 10**8,
        torch.uint32: 10**9,
        torch.int64: 2**60,
        torch.uint64: 2**60,
    }
    for kind, stretch in kinds.items():
        assert torch.equal(find(z, (LABELS * stretch).to(kind), backend=backend), want), kind


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (LABELS[:, None], ValueError, r"^labels: expected shape \[8\], got \[8, 1\]$"),
        (LABELS.float(), TypeError, r"^labels: expected an integer tensor \[8\], got float32"),
        (LABELS.bool(), TypeError, r"^labels: expected an integer tensor \[8\], got bool"),
        (LABELS.tolist(), TypeError, r"^labels: expected an integer tensor \[8\], got list$"),
    ],
)
def test_other_labels_are_refused(loss, labels, error, message):
    with pytest.raises(error, match=message):
        LOSSES[loss](embeddings(), labels)
