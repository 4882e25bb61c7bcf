"""What a set of images must offer so that training and evaluation need not know where it lies.

`ImageSet` holds its images in memory, `StreamedSet` reads them from files; a source of your own
needs the members of `ImageSource` to be the train or test part of a `Dataset`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

Source = TypeVar("Source", bound="ImageSource")


class Views(NamedTuple):
    """Asks for random views of the images: row i of a pass is step `first_step + i`.

    With more seeds a pass holds as many rows for each step, one for each seed, next to each other.

    Attributes:
        seed: seed of the run.
        first_step: number of the first row's step, counted over the whole run.
        more_seeds: seeds of further views.
        min_area: smallest share of an image's area in a crop.
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
        """Channels, height and width (C, H, W) of what `pixels` yields."""

    @property
    def makes_views(self) -> bool:
        """Whether `views` makes `pixels` yield random crops, mirrored half of the time."""

    @property
    def fingerprint(self) -> str | None:
        """Tells one numbering of the images from another; None where nothing is known of it."""

    def __len__(self) -> int:
        """Number of images N."""

    def to(self: Source, device: torch.device | str) -> Source:
        """The same set with its labels, and images that are in memory, on `device`."""

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
            rows: the numbers of each batch, int64 [B].
            device: where the batches shall be.
            views: random crops and flips, where it is the source that makes them: a pure
                function of (seed, step, image number). None for the view of evaluation.

        Yields:
            uint8 [B, C, H, W].
        """
