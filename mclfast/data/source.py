"""The interface between image sets and training: ``ImageSource`` reads labelled images by number.

``ImageSet`` holds its images in memory, ``StreamedSet`` reads them from files. Any class with the
members of ``ImageSource`` can be the train or test part of a ``Dataset``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

Source = TypeVar("Source", bound="ImageSource")


class Views(NamedTuple):
    """A request for random views: row i of a pass is made for step ``first_step + i``.

    With ``more_seeds``, every step takes one row for each seed, and these rows follow one another.

    Attributes:
        seed: seed of the run, used for the first view of a step.
        first_step: step of the first row, counted over the whole run.
        more_seeds: seeds of the further views of a step.
        min_area: smallest share of an image's area that a crop covers.
    """

    seed: int
    first_step: int
    more_seeds: tuple[int, ...] = ()
    min_area: float = 0.08

    def of_row(self, row: int) -> tuple[int, int]:
        """Seed and step of a row of the pass."""
        seeds = (self.seed, *self.more_seeds)
        return seeds[row % len(seeds)], self.first_step + row // len(seeds)


class ImageSource(Protocol):
    """Labelled images with fixed numbers 0 to N - 1, read by number."""

    @property
    def labels(self) -> Tensor:
        """int64 [N]."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width (C, H, W) of the images that ``pixels`` yields."""

    @property
    def makes_views(self) -> bool:
        """Whether ``pixels`` crops and mirrors at random if it is given ``views``."""

    @property
    def fingerprint(self) -> str | None:
        """Text that differs if the images are numbered otherwise; None if it cannot be told."""

    def __len__(self) -> int:
        """Number of images N."""

    def to(self: Source, device: torch.device | str) -> Source:
        """The same set with its labels, and images that are in memory, on ``device``."""

    def subset(self: Source, index: Tensor) -> Source:
        """The images with these numbers, int64 [n], in that order."""

    def pixels(
        self,
        rows: Sequence[Tensor] | Tensor,
        device: torch.device | str,
        *,
        views: Views | None = None,
    ) -> Iterator[Tensor]:
        """Yields the images of each row of numbers.

        Args:
            rows: image numbers int64 [B] of each batch.
            device: device that the batches are moved to.
            views: asks for random crops and flips, which must be a pure function of (seed, step,
                image number); ignored by a source that makes no views. None for the one view of
                evaluation.

        Yields:
            uint8 [B, C, H, W].
        """
