"""Images sorted into one folder per class, read into memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from mclfast._base.optional import optional_import
from mclfast.data.augment import Augmentation
from mclfast.data.dataset import Dataset, ImageSet, channel_stats

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm"})


def load_folder(root: str | os.PathLike[str], image_size: int | None = None) -> Dataset:
    """Reads root/train/<class>/*.png and root/test/<class>/*.png (or root/val) into memory.

    An image takes 3 * image_size**2 bytes of memory: 100,000 images of 64 pixels take 1.2 GB.
    Images are read as RGB, their shorter side is resized to ``image_size``, and the centre is kept.
    Classes are numbered in the order of their names. Only files png, jpg, jpeg, bmp, webp and ppm
    are read, and only those whose names do not start with a dot.

    Args:
        root: folder that holds train, and test or val.
        image_size: side of the images in pixels; by default 32.

    Returns:
        The data set, with images uint8 [N, 3, image_size, image_size]; mean and std are those of
        the training images.

    Raises:
        FileNotFoundError: there is no folder train, or neither test nor val.
        ValueError: an image cannot be read, a class folder has no images, a test class is not in
            train, or image_size is not positive.
        ImportError: Pillow is not installed.
    """
    size = 32 if image_size is None else image_size
    if size < 1:
        raise ValueError(f"image_size: expected at least 1, got {size}")
    train_root, test_root = split_folders(Path(root), ("test", "val"))
    class_names = training_classes(train_root, test_root)
    numbers = {name: number for number, name in enumerate(class_names)}
    train = _read_split(train_root, numbers, size)
    mean, std = channel_stats(train.images)
    return Dataset(
        name="folder",
        train=train,
        test=_read_split(test_root, numbers, size),
        num_classes=len(class_names),
        class_names=tuple(class_names),
        mean=mean,
        std=std,
        augmentation=Augmentation(pad=size // 8, flip=True),
    )


def split_folders(root: Path, tests_named: tuple[str, ...]) -> tuple[Path, Path]:
    """Folders of the training and of the test images.

    Args:
        root: folder that holds both.
        tests_named: names that the folder of the test images may have; the first that exists is
            taken.
    """
    train = root / "train"
    tests = [root / name for name in tests_named if (root / name).is_dir()]
    if not train.is_dir() or not tests:
        raise FileNotFoundError(
            "root: expected a folder holding train and test (or val) with one folder per class, "
            f"got {root}"
        )
    return train, tests[0]


def training_classes(train_root: Path, test_root: Path) -> list[str]:
    """Names of the classes in order; raises ValueError if the test images have others."""
    class_names = class_folders(train_root)
    unknown = sorted(set(class_folders(test_root)) - set(class_names))
    if unknown:
        raise ValueError(
            f"{test_root}: expected the classes of train, got also {', '.join(unknown)}"
        )
    return class_names


def class_folders(split: Path) -> list[str]:
    """Names of the class folders of a split, in order."""
    names = sorted(d.name for d in split.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not names:
        raise ValueError(f"{split}: expected one folder per class, got none")
    return names


def _read_split(split: Path, numbers: dict[str, int], size: int) -> ImageSet:
    files: list[tuple[Path, int]] = []
    for name in class_folders(split):
        found = sorted(
            file
            for file in (split / name).iterdir()
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
        )
        if not found:
            raise ValueError(f"{split / name}: expected at least one image, got none")
        files.extend((file, numbers[name]) for file in found)
    # Filled in place, as stacking a list would need the memory twice.
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for i, (file, _) in enumerate(files):
        images[i] = _read_image(file, size)
    return ImageSet(images, torch.tensor([number for _, number in files], dtype=torch.int64))


def _read_image(file: Path, size: int) -> Tensor:
    """The centre of an image as RGB, uint8 [3, size, size]."""
    pillow = optional_import("PIL.Image", extra="train")
    try:
        with pillow.open(file) as opened:
            image = opened.convert("RGB")
    # Decoders raise many types of errors on damaged files, some of them their own.
    except Exception as error:
        raise ValueError(f"{file}: expected a readable image, got {error!r}") from error
    shorter = min(image.size)
    width, height = (max(size, round(side * size / shorter)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), pillow.Resampling.BILINEAR)
    image = image.crop((left, top, left + size, top + size))
    # A bytearray, as torch warns about read-only memory.
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(size, size, 3).permute(2, 0, 1)
