"""How fast the images of a streamed set arrive when nobody trains on them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from mclfast.data.source import LoaderTimes, Views
from mclfast.data.stream.streamed import StreamedSet, core_count

# Workers fill their queues while nobody looks, so the first batches come faster than they last.
_WARM_UP_PER_WORKER = 2
# What is handed over may lag behind what is decoded by this share before it counts as the limit.
_LAG = 0.8


@dataclass(frozen=True)
class LoaderRate:
    """What was measured.

    Attributes:
        images: images counted, those of the warm-up left out.
        seconds: from the end of the warm-up to the last image.
        times: where the time of the workers went, see `LoaderTimes`.
        workers: worker processes, 0 for none.
        cores: processor cores that this process may use.
    """

    images: int
    seconds: float
    times: LoaderTimes
    workers: int
    cores: int

    @property
    def images_per_s(self) -> float:
        """Images/s that arrived."""
        return self.images / self.seconds

    @property
    def bound(self) -> str:
        """What kept more from arriving."""
        t = self.times
        busy = t.read + t.decode + t.transform
        if t.read > busy / 2:
            return f"storage: {t.read / busy:.0%} of the workers' time is reading"
        if self.images_per_s < _LAG * t.images_per_s:
            return (
                f"handing over: the workers could deliver {t.images_per_s:.0f} images/s, "
                "the training process takes less"
            )
        computing = busy - t.read
        had = f"{self.workers} workers on {self.cores} cores"
        if t.cpu < _LAG * computing:
            return f"cores: {had}, which gave them {t.cpu / computing:.0%} of what they asked for"
        if self.workers >= self.cores:
            return f"cores: {had}, all at work"
        return f"workers: {had}, more of them help"


def measure_loader(
    source: StreamedSet, *, batch_size: int, budget: float, seed: int = 0
) -> LoaderRate:
    """Reads, decodes and augments training images, in random order, for some time.

    The batches end in this process's memory: there is no copy to a device.

    Args:
        source: the training images.
        batch_size: images per batch.
        budget: seconds of measuring, after a warm-up of two batches per worker.
        seed: seed of order and crops.

    Raises:
        ValueError: a batch_size that is not in [1, N], or a file that cannot be read.
    """
    if not 1 <= batch_size <= len(source):
        raise ValueError(f"batch_size: expected a value in [1, {len(source)}], got {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    warm_up = _WARM_UP_PER_WORKER * max(1, source.workers)
    times, counted, step = LoaderTimes(), 0, 0
    started = last = time.perf_counter()
    while last - started < budget or counted == 0:
        rows = torch.randperm(len(source), generator=generator)
        rows = rows[: len(rows) // batch_size * batch_size].view(-1, batch_size)
        for _ in source.pixels(rows, "cpu", views=Views(seed, step), times=times):
            step += 1
            last = time.perf_counter()
            if step == warm_up:
                started, counted = last, 0
            elif step > warm_up:
                counted += batch_size
                if last - started >= budget:
                    break
    return LoaderRate(counted, last - started, times, source.workers, core_count())
