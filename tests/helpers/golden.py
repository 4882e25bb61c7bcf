"""Values recorded from the published implementations, in the shapes this package uses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[1] / "data" / "golden"
TERMS = ("vcl", "soft_vcl", "icl", "soft_icl")


def load(path: Path) -> dict[str, Tensor]:
    """All arrays of a file as tensors, float64 as they are."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(np.asarray(value)) for name, value in arrays.items()}


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float((got.detach() - want).norm() / want.norm())


def by_prefix(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose name starts with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def pair_weights(weights: Tensor) -> Tensor:
    """Recorded weights [i, j, k, z, b] (networks, stages) as [N, N, B], network-major."""
    m, _, stages, _, batch = weights.shape
    return weights.permute(0, 2, 1, 3, 4).reshape(m * stages, m * stages, batch)
