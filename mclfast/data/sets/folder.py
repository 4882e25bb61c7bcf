"""Images sorted into one folder per class, read into memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from mclfast._base.optional import optional_import
from mclfast.data import picture
from mclfast.data.augment import Augmentation
from mclfast.data.dataset import Dataset, ImageSet, channel_stats
from mclfast.data.listing import class_folders, image_names, split_folders, training_classes


def load_folder(root: str | os.PathLike[str], image_size: int | None = None) -> Dataset:
    """Reads root/train/<class>/*.png and root/test/<class>/*.png (or root/val) into memory.

    An image takes 3 * image_size**2 bytes of memory: 100,000 images of 64 pixels take 1.2 GB.
    Images are read as RGB, their shorter side is resized to ``image_size``, and the centre is kept.
    Classes are numbered in the order of their names. Folders inside a class folder belong to the
    class. Files without the suffix of an image are left out, and so are those whose names start
    with a dot; ``mclfast.data.listing`` and ``mclfast.data.picture`` say what is read and refused.

    Args:
        root: folder that holds train, and test or val.
        image_size: side of the images in pixels; by default 32.

    Returns:
        The data set, with images uint8 [N, 3, image_size, image_size]; mean and std are those of
        the training images.

    Raises:
        FileNotFoundError: there is no folder train, or neither test nor val.
        ValueError: an image cannot be read or exceeds a limit, a class folder has no images, a
            test class is not in train, or image_size is out of range.
        ImportError: Pillow is not installed.
    """
    size = 32 if image_size is None else image_size
    picture.check_side(size)
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


def _read_split(split: Path, numbers: dict[str, int], size: int) -> ImageSet:
    files: list[tuple[Path, int]] = []
    for name in class_folders(split):
        folder = split / name
        files.extend((folder / file, numbers[name]) for file in image_names(folder))
    # Filled in place, as stacking a list would need the memory twice.
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for i, (file, _) in enumerate(files):
        images[i] = _read_image(file, size)
    return ImageSet(images, torch.tensor([number for _, number in files], dtype=torch.int64))


def _read_image(file: Path, size: int) -> Tensor:
    """The centre of an image as RGB, uint8 [3, size, size]."""
    pillow = optional_import("PIL.Image", extra="train")
    try:
        with picture.open_picture(picture.read_file(file)) as opened:
            shorter = min(opened.size)
            width, height = (max(size, round(side * size / shorter)) for side in opened.size)
            picture.check_resized(width, height)
            found = picture.decoded(opened)
    # Decoders raise many types of errors on damaged files, some of them their own.
    except Exception as error:
        raise ValueError(f"{file}: expected a readable image, got {error!r}") from error
    image = found.upright(found.image.resize((width, height), pillow.Resampling.BILINEAR))
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return picture.as_tensor(image.crop((left, top, left + size, top + size)))
