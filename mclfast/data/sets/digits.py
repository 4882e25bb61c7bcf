"""The handwritten digits that come with scikit-learn, so that nothing is downloaded."""

from __future__ import annotations

import torch
from torch import Tensor

from mclfast._base.optional import optional_import
from mclfast.data.augment import Augmentation
from mclfast.data.dataset import Dataset, ImageSet, channel_stats
from mclfast.data.subsets import class_ranks, select

IMAGE_SIZE = 16
_NUM_CLASSES = 10
# The split is the same for all runs, whatever their seed.
_SPLIT_SEED = 20210427


def load_few(train_per_class: int = 10) -> Dataset:
    """The set "digits": few labels for training, all other images for testing.

    Args:
        train_per_class: number of training images of each class. The images have one fixed order,
            so that a smaller training set is a part of a larger one.

    Returns:
        The data set, with images uint8 [N, 1, 16, 16], 1797 in both splits together.

    Raises:
        ValueError: train_per_class leaves no training image or no test image of some class.
        ImportError: scikit-learn is not installed.
    """
    everything = _read()
    largest = int(torch.bincount(everything.labels).min()) - 1
    if not 1 <= train_per_class <= largest:
        raise ValueError(
            f"train_per_class: expected a value in [1, {largest}], got {train_per_class}"
        )
    ranks = class_ranks(everything.labels, _NUM_CLASSES, _SPLIT_SEED)
    return _split("digits", everything, ranks < train_per_class)


def load_full() -> Dataset:
    """The set "digits-full": 80 % of every class for training, 20 % for testing, in a fixed split.

    Returns:
        The data set, with images uint8 [N, 1, 16, 16], 1797 in both splits together.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    everything = _read()
    tested = (torch.bincount(everything.labels) + 2) // 5  # [10], a fifth, rounded
    ranks = class_ranks(everything.labels, _NUM_CLASSES, _SPLIT_SEED)
    return _split("digits-full", everything, ranks >= tested[everything.labels])


def _split(name: str, everything: ImageSet, in_train: Tensor) -> Dataset:
    # Statistics of all images, so that they do not depend on the split.
    mean, std = channel_stats(everything.images)
    return Dataset(
        name=name,
        train=select(everything, in_train),
        test=select(everything, ~in_train),
        num_classes=_NUM_CLASSES,
        class_names=tuple(str(digit) for digit in range(_NUM_CLASSES)),
        mean=tuple(round(value, 4) for value in mean),
        std=tuple(round(value, 4) for value in std),
        # No flips: a mirrored digit is no digit.
        augmentation=Augmentation(pad=2),
    )


def _read() -> ImageSet:
    raw = optional_import("sklearn.datasets", extra="train").load_digits()
    levels = torch.from_numpy(raw.images).to(torch.int64)  # [N, 8, 8], 0..16
    return ImageSet(_upsample(levels), torch.from_numpy(raw.target).to(torch.int64))


def _upsample(levels: Tensor) -> Tensor:
    """Doubles the side of images bilinearly, in integers: every machine gets the same bytes.

    Args:
        levels: int64 [N, 8, 8], in 0..16.

    Returns:
        uint8 [N, 1, 16, 16].
    """
    doubled = _double(_double(levels, 1), 2)  # weights sum to 4 * 4, so 0..256
    return ((doubled * 255 + 128) // 256).to(torch.uint8).unsqueeze(1)


def _double(x: Tensor, dim: int) -> Tensor:
    """Doubles ``dim`` by linear interpolation at its quarter points, repeating edges; times 4."""
    size = x.shape[dim]
    before = x.index_select(dim, (torch.arange(size) - 1).clamp(min=0))
    after = x.index_select(dim, (torch.arange(size) + 1).clamp(max=size - 1))
    return torch.stack((3 * x + before, 3 * x + after), dim + 1).flatten(dim, dim + 1)
