"""How fast the images of a streamed set arrive when nobody trains on them, and what limits it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from mclfast.data.source import Views
from mclfast.data.stream import decode
from mclfast.data.stream.streamed import StreamedSet, core_count

# Workers fill their queues while nobody looks, so the first batches come faster than they last.
_WARM_UP_PER_WORKER = 2
# Images that arrive slower than this share of what the workers can make are held up elsewhere.
_LAG = 0.8
_MOST_IMAGES_ALONE = 200


@dataclass(frozen=True)
class LoaderRate:
    """Speed of a loader.

    Attributes:
        images: images that arrived after the warm-up.
        seconds: time from the end of the warm-up to the last image.
        read: seconds to read the file of one image, alone in this process.
        view: seconds to decode, crop and resize one image, alone in this process.
        workers: worker processes, 0 for none.
        cores: processor cores that this process may use.
    """

    images: int
    seconds: float
    read: float
    view: float
    workers: int
    cores: int

    @property
    def images_per_s(self) -> float:
        """Images/s that arrived."""
        return self.images / self.seconds

    @property
    def possible_images_per_s(self) -> float:
        """Images/s of workers that each have a core and work at the pace of one process alone."""
        return min(max(1, self.workers), self.cores) / (self.read + self.view)

    @property
    def bound(self) -> str:
        """The part of the machine that keeps more images from arriving."""
        if self.read > self.view:
            share = self.read / (self.read + self.view)
            return f"storage: {share:.0%} of an image's time is reading"
        had = f"{self.workers} workers on {self.cores} cores"
        if self.images_per_s < _LAG * self.possible_images_per_s:
            return (
                f"sharing: {had} could make {self.possible_images_per_s:.0f} images/s, if they "
                "shared neither cores nor storage and handed batches over at once"
            )
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
        budget: seconds of measuring the loader, after a warm-up of two batches per worker. A
            tenth of it is spent on single images before.
        seed: seed of order and crops.

    Raises:
        ValueError: a batch_size that is not in [1, N], or a file that cannot be read.
    """
    if not 1 <= batch_size <= len(source):
        raise ValueError(f"batch_size: expected a value in [1, {len(source)}], got {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    # First, before the loader has brought the files into the memory of the system.
    read, view = _one_image_alone(source, budget / 10, generator)
    warm_up = _WARM_UP_PER_WORKER * max(1, source.workers)
    counted, step = 0, 0
    started = last = time.perf_counter()
    while last - started < budget or counted == 0:
        rows = torch.randperm(len(source), generator=generator)
        rows = rows[: len(rows) // batch_size * batch_size].view(-1, batch_size)
        for _ in source.pixels(rows, "cpu", views=Views(seed, step)):
            step += 1
            last = time.perf_counter()
            if step == warm_up:
                started, counted = last, 0
            elif step > warm_up:
                counted += batch_size
                if last - started >= budget:
                    break
    return LoaderRate(counted, last - started, read, view, source.workers, core_count())


def _one_image_alone(
    source: StreamedSet, budget: float, generator: torch.Generator
) -> tuple[float, float]:
    """Mean seconds to read the file of an image, and to make a training view of it.

    Args:
        source: the training images.
        budget: seconds to spend; at least one image is measured.
        generator: draws the images.
    """
    order = torch.randperm(len(source), generator=generator)[:_MOST_IMAGES_ALONE].tolist()
    read, view, count = 0.0, 0.0, 0
    for index in order:
        before = time.perf_counter()
        data = source.reader.read(index)
        between = time.perf_counter()
        try:
            decode.training_view(data, source.image_shape[1], decode.view_generator(0, 0, index))
        # Pillow raises many types on damaged files.
        except Exception as error:
            where = source.reader.describe(index)
            raise ValueError(f"{where}: expected a readable image, got {error!r}") from error
        read += between - before
        view += time.perf_counter() - between
        count += 1
        if read + view >= budget:
            break
    return read / count, view / count
