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

import torch
from torch import Tensor

from mclfast.data.augment import Augmentation, augment, prepare
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
    """

    def __init__(
        self,
        data: Dataset,
        *,
        device: torch.device,
        seed: int,
        augmented: bool = True,
        views: int = 1,
    ) -> None:
        self._data = data
        self._device = device
        self._seeds = [seed, *(_view_seed(seed, v) for v in range(1, views))]
        self._augmented = augmented
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
        data, train = self._data, self._data.train
        self._loader, self._steps = LoaderTimes(), StepClock(self._device)
        augmentation = data.augmentation if self._augmented else Augmentation()
        arriving = zip(
            *(
                train.pixels(
                    rows,
                    self._device,
                    views=Views(seed, first_step) if self._augmented else None,
                    times=self._loader,
                )
                for seed in self._seeds
            ),
            strict=True,
        )
        on_device = rows.to(self._device)
        for step, (index, pixels) in enumerate(zip(on_device, arriving, strict=True), first_step):
            views = [
                augment(
                    view,
                    augmentation,
                    mean=data.mean,
                    std=data.std,
                    generator=_step_generator(seed, step, self._device),
                )
                for seed, view in zip(self._seeds, pixels, strict=True)
            ]
            images = views[0] if len(views) == 1 else views
            self._steps.start()
            try:
                yield images, train.labels[index], index
            finally:
                self._steps.stop()

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


def _step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    digest = hashlib.blake2b(f"augment {seed} {step}".encode(), digest_size=4).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
