"""Batches for training and evaluation from any `ImageSource`, and the two clocks of a run.

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
from mclfast.data.dataset import Dataset
from mclfast.data.source import ImageSource, LoaderTimes, Views


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
        self._loader = LoaderTimes()
        self._steps = StepClock(device)

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
        self._loader, self._steps = LoaderTimes(), StepClock(self._device)
        asked = None
        if self._augmented:
            asked = Views(self._seeds[0], first_step, tuple(self._seeds[1:]))
            if self._contrastive is not None:
                asked = asked._replace(min_area=self._contrastive.min_area)
        # One pass over the set, with the views of a step one after the other.
        repeated = rows.repeat_interleave(len(self._seeds), dim=0)
        arriving = train.pixels(repeated, self._device, views=asked, times=self._loader)
        on_device = rows.to(self._device)
        for step, index in enumerate(on_device, first_step):
            views = [self._augment(next(arriving), seed, step) for seed in self._seeds]
            images = views[0] if len(views) == 1 else views
            self._steps.start()
            try:
                yield images, train.labels[index], index
            finally:
                self._steps.stop()

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
        """What the last pass over streamed images took; empty for images in memory.

        Waits for the device.

        Returns:
            data_images_per_s: images/s that the workers deliver when nobody makes them wait,
                see `LoaderTimes.images_per_s`.
            step_images_per_s: images/s of the steps alone, without waiting for data.
            data_wait_seconds: seconds in which the training loop waited for a batch. On a GPU
                the loop runs ahead of the device, so that the device may have been at work.
            step_seconds: seconds of the steps; on a GPU those of the device.
        """
        loader = self._loader
        if loader.images == 0:
            return {}
        seconds = self._steps.seconds()
        return {
            "data_images_per_s": loader.images_per_s,
            "step_images_per_s": loader.images / seconds if seconds > 0 else 0.0,
            "data_wait_seconds": loader.wait,
            "step_seconds": seconds,
        }


class StepClock:
    """Seconds between `start` and `stop`, summed; on a GPU those of the device's own clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._sum = 0.0
        self._started = 0.0

    def start(self) -> None:
        """A step begins: its batch is there."""
        if self._is_cuda:
            self._spans.append((self._event(), torch.cuda.Event(enable_timing=True)))
        else:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """The step ends."""
        if self._is_cuda:
            self._spans[-1][1].record(torch.cuda.current_stream(self._device))
        else:
            self._sum += time.perf_counter() - self._started

    def seconds(self) -> float:
        """The sum; waits for the device."""
        if self._spans:
            torch.cuda.synchronize(self._device)
        return self._sum + sum(a.elapsed_time(b) for a, b in self._spans) / 1000

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


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
