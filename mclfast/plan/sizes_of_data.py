"""The sizes of a data set that a run's memory depends on, known without reading the images."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from mclfast.config import TrainConfig
from mclfast.data.dataset import Dataset, ImageSet
from mclfast.data.sets.cifar import CIFAR10, CIFAR100
from mclfast.data.stream.imagefolder import IMAGE_SIZE
from mclfast.execution.parts import load_images


@dataclass(frozen=True)
class DataFacts:
    """The sizes of a data set that memory depends on.

    Attributes:
        name: name of the data set.
        train, test: numbers of images.
        num_classes: number of classes.
        image_shape: channels, height and width.
        in_memory: whether the images lie on the device of the run; if not, they are streamed.
        assumed: whether numbers are those of the published set, as no files were named.
    """

    name: str
    train: int
    test: int
    num_classes: int
    image_shape: tuple[int, int, int]
    in_memory: bool
    assumed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of images and labels on the device."""
        images = math.prod(self.image_shape) if self.in_memory else 0
        return (self.train + self.test) * (images + torch.int64.itemsize)


def facts_of(data: Dataset) -> DataFacts:
    """Sizes and dtypes of a data set that is already loaded."""
    return DataFacts(
        data.name,
        len(data.train),
        len(data.test),
        data.num_classes,
        data.train.image_shape,
        isinstance(data.train, ImageSet),
    )


def facts(config: TrainConfig) -> DataFacts:
    """Sizes of the set that a config names, which is read only where nothing is known of it.

    Raises:
        ValueError, OSError, ImportError: as :func:`mclfast.data.load`.
    """
    per_class, known = config.train_per_class, None
    if config.data_root is None and config.data in ("cifar10", "cifar100"):
        source = CIFAR10 if config.data == "cifar10" else CIFAR100
        count = 10 if source is CIFAR10 else 100
        known = DataFacts(source.name, 50_000, 10_000, count, (3, 32, 32), True, assumed=True)
    elif config.data_root is None and config.data in ("imagefolder", "webdataset"):
        side = config.image_size or IMAGE_SIZE
        known = DataFacts("ImageNet", 1_281_167, 50_000, 1000, (3, side, side), False, assumed=True)
    if known is None:
        return facts_of(load_images(config))
    if per_class is not None:
        known = dataclasses.replace(known, train=per_class * known.num_classes)
    return known
