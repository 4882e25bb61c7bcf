"""Batches for training and evaluation, made of the images of any ``ImageSource``.

    feed = TrainingFeed(data, device=device, seed=0)
    for images, labels, index in feed.batches(sampler.epoch(0), first_step=0):
        ...

A batch is a pure function of the seed and the step, so that a run can be resumed at any step.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mclfast.data.augment import Augmentation, augment, prepare
from mclfast.data.augment_contrastive import ContrastiveAugmentation, augment_contrastive
from mclfast.data.dataset import Dataset, ImageSet
from mclfast.data.source import ImageSource, Views


class TrainingFeed:
    """Augmented training batches.

    Args:
        data: its labels are on `device`.
        device: where the batches shall be.
        seed: seed of the augmentation.
        augmented: whether to draw random crops and flips.
        views: how many augmented forms of each image a batch holds, each drawn by itself.
        contrastive: what is done to the images in place of the data set's own augmentation.
    """

    def __init__(
        self,
        data: Dataset,
        *,
        device: torch.device,
        seed: int,
        augmented: bool = True,
        views: int = 1,
        contrastive: ContrastiveAugmentation | None = None,
    ) -> None:
        self._data = data
        self._device = device
        self._seeds = [seed, *(_view_seed(seed, v) for v in range(1, views))]
        self._augmented = augmented
        self._contrastive = contrastive if augmented else None
        self._started = 0.0
        self._waited = 0.0
        self._delivered = 0

    def batches(
        self, rows: Tensor, *, first_step: int
    ) -> Iterator[tuple[Tensor | list[Tensor], Tensor, Tensor]]:
        """The batches of the rows, one a step.

        Args:
            rows: image numbers int64 [steps, B], on any device.
            first_step: number of the first row's step, counted over the whole run.

        Yields:
            Normalised images float32 [B, C, H, W] (a list of them, one for each view, where there
            are several), their labels int64 [B] and their numbers in
            the training set int64 [B], on the device.

        Raises:
            ValueError: an image that cannot be read; the text names its file.
        """
        train = self._data.train
        self._started, self._waited, self._delivered = time.perf_counter(), 0.0, 0
        asked = None
        if self._augmented:
            asked = Views(self._seeds[0], first_step, tuple(self._seeds[1:]))
            if self._contrastive is not None:
                asked = asked._replace(min_area=self._contrastive.min_area)
        # One pass over the set, with the views of a step one after the other.
        repeated = rows.repeat_interleave(len(self._seeds), dim=0)
        arriving = train.pixels(repeated, self._device, views=asked)
        on_device = rows.to(self._device)
        for step, index in enumerate(on_device, first_step):
            views = [self._augment(self._next(arriving), seed, step) for seed in self._seeds]
            self._delivered += len(index)
            yield views[0] if len(views) == 1 else views, train.labels[index], index

    def _next(self, arriving: Iterator[Tensor]) -> Tensor:
        """The next pixels; the time until they arrive counts as waiting."""
        asked = time.perf_counter()
        pixels = next(arriving)
        self._waited += time.perf_counter() - asked
        return pixels

    def _augment(self, pixels: Tensor, seed: int, step: int) -> Tensor:
        data, number = self._data, _step_seed(seed, step)
        if self._contrastive is not None:
            # What the source or the data set says of crops and flips stays true.
            own = data.train.makes_views
            return augment_contrastive(
                pixels,
                replace(self._contrastive, crop=not own, flip=data.augmentation.flip),
                mean=data.mean,
                std=data.std,
                seed=number,
            )
        return augment(
            pixels,
            data.augmentation if self._augmented else Augmentation(),
            mean=data.mean,
            std=data.std,
            generator=torch.Generator(self._device).manual_seed(number),
        )

    def throughput(self) -> dict[str, float]:
        """How long the last pass over streamed images waited for them; empty for images in memory.

        Call it at the end of the pass, after waiting for the device: what has passed since the
        pass began, and was not waiting for images, counts as time of the steps.

        Returns:
            step_images_per_s: images/s of the steps alone, without waiting for data.
            data_wait_seconds: seconds in which the training loop waited for images. On a GPU the
                loop runs ahead of the device, which may have been at work meanwhile.
            step_seconds: all other seconds of the pass.
        """
        if self._delivered == 0 or isinstance(self._data.train, ImageSet):
            return {}
        steps = time.perf_counter() - self._started - self._waited
        return {
            "step_images_per_s": self._delivered / steps,
            "data_wait_seconds": self._waited,
            "step_seconds": steps,
        }


def evaluation_batches(
    source: ImageSource,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    device: torch.device | str,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images float32 [b, C, H, W] and labels int64 [b] in order, on `device`."""
    rows = torch.arange(len(source), device=source.labels.device).split(batch_size)
    arriving = source.pixels(rows, device)
    for pixels, labels in zip(arriving, source.labels.split(batch_size), strict=True):
        yield prepare(pixels, mean, std), labels.to(device)


def _view_seed(seed: int, view: int) -> int:
    digest = hashlib.blake2b(f"view {seed} {view}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def _step_seed(seed: int, step: int) -> int:
    digest = hashlib.blake2b(f"augment {seed} {step}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
