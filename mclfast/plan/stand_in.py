"""A trainer to rehearse with that holds nothing large: no images, unwritten weights, small banks.

Weights are real tensors that nobody has written to: the system gives them no memory before that.
Banks and tables are real too, for a set of few images; what grows with the number of images is
scaled to the true one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mclfast.config import TrainConfig
from mclfast.data.dataset import Dataset, ImageSet
from mclfast.data.sets.cifar import CIFAR10, CIFAR100
from mclfast.data.source import LoaderTimes, Views
from mclfast.data.stream.imagefolder import IMAGE_SIZE

if TYPE_CHECKING:
    from mclfast.train.trainer import Trainer


@dataclass(frozen=True)
class DataFacts:
    """What memory depends on in a data set.

    Attributes:
        name: of the set.
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
    """Those of a data set that is there."""
    return DataFacts(
        data.name,
        len(data.train),
        len(data.test),
        data.num_classes,
        data.train.image_shape,
        isinstance(data.train, ImageSet),
    )


def facts(config: TrainConfig) -> DataFacts:
    """Those of the set that a config names, which is read only where nothing is known of it.

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
        from mclfast.execution.parts import load_images

        return facts_of(load_images(config))
    if per_class is not None:
        known = dataclasses.replace(known, train=per_class * known.num_classes)
    return known


@dataclass(frozen=True)
class StandInImages:
    """An `ImageSource` with labels and a shape, and no images."""

    labels: Tensor
    image_shape: tuple[int, int, int]
    makes_views: bool = False
    fingerprint: None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> StandInImages:
        return dataclasses.replace(self, labels=self.labels.to(device))

    def subset(self, index: Tensor) -> StandInImages:
        return dataclasses.replace(self, labels=self.labels[index])

    def pixels(
        self,
        rows: Sequence[Tensor] | Tensor,
        device: torch.device | str,
        *,
        views: Views | None = None,
        times: LoaderTimes | None = None,
    ) -> Iterator[Tensor]:
        """Raises: there is nothing to see."""
        raise RuntimeError("pixels: expected images, got a stand-in for them")


def stand_in_data(known: DataFacts, batch_size: int) -> Dataset:
    """A set with enough images of every class to train on, in number a prime."""
    count = _prime_from(max(4 * known.num_classes, 2 * batch_size, 1000))
    labels = torch.arange(count) % known.num_classes
    images = StandInImages(labels, known.image_shape)
    channels = known.image_shape[0]
    return Dataset(
        name=known.name,
        train=images,
        test=images,
        num_classes=known.num_classes,
        class_names=tuple(map(str, range(known.num_classes))),
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
    )


def stand_in_trainer(config: TrainConfig, known: DataFacts) -> Trainer:
    """A trainer of a config on the CPU, whatever the device of the run; its weights mean nothing.

    Raises:
        ValueError: a config that no trainer could be built from.
    """
    from mclfast.execution.parts import make_parts
    from mclfast.train.trainer import Trainer

    config = dataclasses.replace(
        config,
        device="cpu",
        memory="ordinary",
        offload="none",
        # Only a GPU has graphs and streams, and nothing is run.
        cuda_graphs=False,
        compile_peers=False,
        peers_parallel="auto" if config.peers_parallel == "streams" else config.peers_parallel,
        # Batches are not drawn, and how does not matter for their size.
        sampler="shuffle",
        options=_for_cpu(config.options),
    )
    data = stand_in_data(known, config.batch_size)
    rng = torch.get_rng_state()
    try:
        with Unwritten():
            cohort, method = make_parts(config, data)
        return Trainer(cohort, method, data, config, network_names=config.cohort)
    finally:
        torch.set_rng_state(rng)


class Unwritten(TorchDispatchMode):
    """Within it, nothing is written into tensors by operations that draw or fill."""

    _SKIPPED = {"aten::uniform_", "aten::normal_", "aten::fill_", "aten::zero_"}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func._schema.name in self._SKIPPED:
            return args[0]
        return func(*args, **(kwargs or {}))


def _for_cpu(options: Any) -> Any:
    """Options of a method without what only a GPU has; none of it changes the size of a tensor."""
    portable = {}
    if getattr(options, "backend", "reference") != "reference":
        portable["backend"] = "auto"
    if getattr(options, "bank_storage", "device") != "device":
        portable["bank_storage"] = "device"
    return dataclasses.replace(options, **portable)


def scaled_bytes(tensors: Sequence[Tensor], stand_in: int, true: int) -> int:
    """Bytes of tensors, with a dimension as long as the stand-in set as long as the true one."""
    # No other dimension is that prime.
    return sum(t.nbytes * true // stand_in if stand_in in t.shape else t.nbytes for t in tensors)


def _prime_from(least: int) -> int:
    number = least
    while any(number % factor == 0 for factor in range(2, math.isqrt(number) + 1)):
        number += 1
    return number
