"""``Dataset``, which every loader returns, and ``ImageSet``, labelled images in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mclfast.data.augment import Augmentation
from mclfast.data.source import ImageSource, Views


# eq=False: two sets are equal only if they are the same object, as a comparison of tensors has no
# truth value.
@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in memory with their labels.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], on the device of the images.

    Raises:
        TypeError: an argument is no tensor, or has the wrong dtype.
        ValueError: an argument has the wrong rank, lengths or devices differ, or there is no image.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        _check_tensor("images", self.images, torch.uint8, 4, "[N, C, H, W]")
        _check_tensor("labels", self.labels, torch.int64, 1, "[N]")
        if len(self.images) != len(self.labels):
            raise ValueError(
                "images and labels: expected the same length, "
                f"got {len(self.images)} and {len(self.labels)}"
            )
        if self.images.numel() == 0:
            raise ValueError(
                f"images: expected at least one pixel, got shape {list(self.images.shape)}"
            )
        if self.images.device != self.labels.device:
            raise ValueError(
                "images and labels: expected the same device, "
                f"got {self.images.device} and {self.labels.device}"
            )

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width (C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def makes_views(self) -> bool:
        """False: pixels are always whole images."""
        return False

    @property
    def fingerprint(self) -> None:
        """None: an order of images in memory cannot be told from another."""
        return None

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set on ``device``."""
        return ImageSet(self.images.to(device), self.labels.to(device))

    def subset(self, index: Tensor) -> ImageSet:
        """The images with these numbers, int64 [n], in that order."""
        index = index.to(self.labels.device)
        return ImageSet(self.images[index], self.labels[index])

    def pixels(
        self,
        rows: Sequence[Tensor] | Tensor,
        device: torch.device | str,
        *,
        views: Views | None = None,
    ) -> Iterator[Tensor]:
        """Yields uint8 [B, C, H, W] for each row of numbers, see ``ImageSource.pixels``.

        ``views`` stays unused, as an image in memory has only one view.
        """
        if isinstance(rows, Tensor):
            # Moved at once: a copy to a GPU in every step would make the host wait for it.
            rows = rows.to(self.images.device)
        for row in rows:
            yield self.images[row.to(self.images.device)].to(device)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test set, with the statistics and names needed to train on them.

    A set of your own is built like this:

        mean, std = channel_stats(train_images)
        dataset = Dataset(
            name="mine",
            train=ImageSet(train_images, train_labels),
            test=ImageSet(test_images, test_labels),
            num_classes=10,
            class_names=tuple(str(i) for i in range(10)),
            mean=mean,
            std=std,
            augmentation=Augmentation(pad=4, flip=True),
        )

    Attributes:
        name: free text, shown in logs.
        train: training images uint8 [N, C, S, S] with labels int64 [N]: an ``ImageSet``, or another
            ``ImageSource`` such as the ``StreamedSet`` of images that do not fit in memory.
        test: test images uint8 [N', C, S, S] with labels int64 [N'], in the same form.
        num_classes: number of classes; labels lie in [0, num_classes).
        class_names: one name for each class.
        mean: mean of each channel, of pixels scaled to [0, 1]; C values.
        std: standard deviation of each channel, on the same scale; C positive values.
        augmentation: random shifts and flips of training images on the device. The images of a
            ``StreamedSet`` are cropped and flipped when they are decoded and need none.

    Raises:
        ValueError: a label is outside [0, num_classes), images differ in shape or are not square,
            a tuple has the wrong length, or a mean or std is not finite.
    """

    name: str
    train: ImageSource
    test: ImageSource
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation = Augmentation()

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {self.num_classes}")
        shapes = [list(split.image_shape) for split in (self.train, self.test)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"test.images: expected [N, *{shapes[0]}] as train, got {shapes[1]}")
        if shapes[0][1] != shapes[0][2]:
            raise ValueError(f"images: expected square images, got [C, H, W]={shapes[0]}")
        lengths = {
            "class_names": (len(self.class_names), self.num_classes),
            "mean": (len(self.mean), self.in_channels),
            "std": (len(self.std), self.in_channels),
        }
        for field, (got, expected) in lengths.items():
            if got != expected:
                raise ValueError(f"{field}: expected {expected} entries, got {got}")
        if not all(math.isfinite(value) for value in self.mean):
            raise ValueError(f"mean: expected finite values, got {self.mean}")
        if not all(math.isfinite(value) and value > 0 for value in self.std):
            raise ValueError(f"std: expected positive finite values, got {self.std}")
        check_labels("train.labels", self.train.labels, self.num_classes)
        check_labels("test.labels", self.test.labels, self.num_classes)

    @property
    def in_channels(self) -> int:
        """Channels C of every image."""
        return self.train.image_shape[0]

    @property
    def image_size(self) -> int:
        """Side S of the square images, in pixels."""
        return self.train.image_shape[1]

    def to(self, device: torch.device | str) -> Dataset:
        """The same set with both splits on ``device``."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def channel_stats(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels scaled to [0, 1].

    Args:
        images: uint8 [N, C, H, W], not empty.

    Returns:
        The means and the standard deviations, C values each. The standard deviation of a constant
        channel is given as 1, so that dividing by it is harmless.

    Raises:
        TypeError: images are not uint8.
        ValueError: images are not of rank 4, or empty.
    """
    _check_tensor("images", images, torch.uint8, 4, "[N, C, H, W]")
    if images.numel() == 0:
        raise ValueError(f"images: expected at least one pixel, got shape {list(images.shape)}")
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        # A histogram gives the exact moments without a float copy of the whole set.
        counts = torch.bincount(channel.reshape(-1), minlength=256).cpu()
        share = counts.to(torch.float64) / channel.numel()
        mean = (share * levels).sum()
        std = (share * (levels - mean) ** 2).sum().sqrt()
        means.append(float(mean))
        stds.append(float(std) if (counts > 0).sum() > 1 else 1.0)
    return tuple(means), tuple(stds)


def _check_tensor(name: str, value: Tensor, dtype: torch.dtype, rank: int, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a {dtype} tensor, got {type(value).__name__}")
    if value.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {value.dtype}")
    if value.ndim != rank:
        raise ValueError(f"{name}: expected {shape}, got shape {list(value.shape)}")


def check_labels(name: str, labels: Tensor, num_classes: int) -> None:
    """Raises TypeError or ValueError unless labels are int64 [N] in [0, num_classes)."""
    _check_tensor(name, labels, torch.int64, 1, "[N]")
    wrong = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(wrong):
        position = int(wrong[0])
        raise ValueError(
            f"{name}: expected values in [0, {num_classes}), "
            f"got {int(labels[position])} at position {position}"
        )


def with_channels(data: Dataset, channels: int) -> Dataset:
    """The data set with as many channels as a backbone takes: grey images are repeated.

    Args:
        data: data set, returned unchanged if its images have ``channels`` channels.
        channels: number of channels of the backbone's input.

    Raises:
        ValueError: the images have another number of channels and are not grey images in memory.
    """
    if data.in_channels == channels:
        return data
    if data.in_channels != 1 or not all(isinstance(s, ImageSet) for s in (data.train, data.test)):
        raise ValueError(
            f"data: expected in_channels={channels} as the backbone has, or grey images in memory, "
            f"got in_channels={data.in_channels} of {data.name!r}"
        )
    train, test = (
        ImageSet(s.images.repeat(1, channels, 1, 1), s.labels)
        for s in (data.train, data.test)
        if isinstance(s, ImageSet)
    )
    mean, std = data.mean * channels, data.std * channels
    return replace(data, train=train, test=test, mean=mean, std=std)
