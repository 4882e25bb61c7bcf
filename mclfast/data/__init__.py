"""Labelled image sets, in memory or streamed from files, their augmentation and batch samplers.

``load`` reads a set by name; a set of your own is a ``Dataset`` built from four tensors (see its
docstring). "imagefolder" and "webdataset" are read from files batch by batch
(``mclfast.data.stream.streamed``), all other sets are held in memory. Nothing here needs
torchvision, and nothing is downloaded.
"""

from __future__ import annotations

import os
from dataclasses import replace

from mclfast._base.checks import unknown_name
from mclfast.data.augment import Augmentation
from mclfast.data.dataset import Dataset, ImageSet, channel_stats
from mclfast.data.sampler import BalancedSampler, ShuffleSampler
from mclfast.data.source import ImageSource
from mclfast.data.subsets import limit_per_class

__all__ = [
    "Augmentation",
    "BalancedSampler",
    "Dataset",
    "ImageSet",
    "ImageSource",
    "ShuffleSampler",
    "available",
    "channel_stats",
    "limit_per_class",
    "load",
]

_IN_MEMORY = ("digits", "digits-full", "cifar10", "cifar100", "glyphs100", "folder")
_STREAMED = ("imagefolder", "webdataset")
_NAMES = (*_IN_MEMORY, *_STREAMED)


def has_image_size(name: str) -> bool:
    """Whether the images of a set can be resized to any ``image_size``.

    Args:
        name: one of ``available()``.
    """
    return name == "folder" or name in _STREAMED


def available() -> list[str]:
    """Names that ``load`` accepts."""
    return list(_NAMES)


def load(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    train_per_class: int | None = None,
    seed: int = 0,
    image_size: int | None = None,
    workers: int | None = None,
) -> Dataset:
    """Reads a labelled image set by name.

    Args:
        name: one of ``available()``. "digits" trains on few labels and tests on all the rest,
            "digits-full" is an 80 / 20 split of the same images. "glyphs100" is drawn: 100
            classes in families of look-alikes (``mclfast.data.sets.glyphs``).
        root: folder that holds the CIFAR archive or its extracted files, or the folders train and
            test of "folder", or train and val of "imagefolder" and "webdataset"; ~ stands for
            the home folder. "digits", "digits-full" and "glyphs100" need no folder and ignore it.
        train_per_class: number of training images kept of every class; all test images are kept.
            "digits" has 10 by default, and all other images become its test set. "glyphs100" has
            50 by default and draws as many as are asked for. The other sets keep all by default.
        seed: seed that decides which images ``train_per_class`` keeps. It is not the seed of a
            training run: leave it alone to compare runs on the same images. "digits" has only one
            split and ignores it, "glyphs100" draws other training images for another seed.
        image_size: side in pixels of the square images of "folder" (default 32), "imagefolder"
            and "webdataset" (default 224). The other sets have a fixed size.
        workers: number of processes that read and decode the images of "imagefolder" and
            "webdataset"; None for one per core, 0 to decode in this process. The other sets are
            in memory and ignore it.

    Returns:
        The ``Dataset``. Its images uint8 [N, C, H, W] stay in files for "imagefolder" and
        "webdataset" and are in CPU memory for all other sets; labels are int64 [N].

    Raises:
        ValueError: the name is unknown, an argument is unusable, or the data are damaged.
        FileNotFoundError: the files are not under ``root``.
        ImportError: the package that reads the set (scikit-learn, Pillow) is not installed.
    """
    if name not in _NAMES:
        raise unknown_name("name", name, _NAMES)

    integers = {"train_per_class": train_per_class, "image_size": image_size, "workers": workers}
    for argument, value in integers.items():
        if value is not None and not isinstance(value, int):
            raise ValueError(f"{argument}: expected an integer or None, got {value!r}")

    if name == "folder":
        from mclfast.data.sets.folder import load_folder

        dataset = load_folder(_required(root, "train/<class> and test/<class>"), image_size)
    elif name == "imagefolder":
        from mclfast.data.stream.imagefolder import load_imagefolder

        folder = _required(root, "train/<class> and val/<class>")
        dataset = load_imagefolder(folder, image_size, workers)
    elif name == "webdataset":
        from mclfast.data.stream.shards import load_shards

        folder = _required(root, "train/*.tar and val/*.tar")
        dataset = load_shards(folder, image_size, workers)
    elif name in ("cifar10", "cifar100"):
        from mclfast.data.sets.cifar import CIFAR10, CIFAR100, load_cifar

        source = CIFAR10 if name == "cifar10" else CIFAR100
        _only_size(name, image_size, 32)
        dataset = load_cifar(_required(root, source.archive), source)
    elif name == "glyphs100":
        from mclfast.data.sets import glyphs

        _only_size(name, image_size, glyphs.IMAGE_SIZE)
        per_class = glyphs.TRAIN_PER_CLASS if train_per_class is None else train_per_class
        return glyphs.load_glyphs(per_class, seed=seed)
    else:
        from mclfast.data.sets import digits

        _only_size(name, image_size, digits.IMAGE_SIZE)
        if name == "digits":
            return digits.load_few(10 if train_per_class is None else train_per_class)
        dataset = digits.load_full()

    if train_per_class is None:
        return dataset
    train = limit_per_class(dataset.train, train_per_class, dataset.num_classes, seed)
    return replace(dataset, train=train)


def _required(root: str | os.PathLike[str] | None, content: str) -> str | os.PathLike[str]:
    if root is None:
        raise ValueError(
            f"root: expected the folder holding {content}, got none; "
            "name it by data_root (--data-root) for a run"
        )
    return os.path.expanduser(root)


def _only_size(name: str, image_size: int | None, expected: int) -> None:
    if image_size not in (None, expected):
        raise ValueError(f"image_size: expected {expected} or None for {name!r}, got {image_size}")
