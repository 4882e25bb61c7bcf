"""Large sets of image files in one folder per class, like ImageNet, read when they are needed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mclfast.data.dataset import Dataset
from mclfast.data.listing import class_folders, image_names, split_folders, training_classes
from mclfast.data.picture import read_file
from mclfast.data.stream.streamed import StreamedSet

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SIZE = 224


def load_imagefolder(
    root: str | os.PathLike[str], image_size: int | None = None, workers: int | None = None
) -> Dataset:
    """Lists root/train/<class>/*.jpg and root/val/<class>/*.jpg (or root/test); reads no image.

    Worker processes decode the files when they are needed, so the set need not fit in memory. A
    training image is a random crop of 8 to 100 % of the area, resized and mirrored half of the
    time; for evaluation the shorter side is resized to ``image_size`` * 256 / 224 and the centre is
    kept. Classes are numbered in the order of their names, and so are the files of a class. Folders
    inside a class folder belong to the class. Files without the suffix of an image are left out,
    and so are those whose names start with a dot.

    Args:
        root: folder that holds train, and val or test.
        image_size: side of the images in pixels; by default 224.
        workers: number of processes that read and decode; None for one per core, 0 to decode in
            this process.

    Returns:
        A ``Dataset`` of two ``StreamedSet``; mean and std are those of ImageNet.

    Raises:
        FileNotFoundError: there is no folder train, or neither val nor test.
        ValueError: a class folder has no images, a test class is not in train, a named pipe is
            among the images, or a number is out of range.
        ImportError: Pillow is not installed.
    """
    train_root, test_root = split_folders(Path(root), ("val", "test"))
    class_names = training_classes(train_root, test_root)
    size = IMAGE_SIZE if image_size is None else image_size

    def streamed(split: Path) -> StreamedSet:
        files, labels = list_files(split, class_names)
        return StreamedSet(files, labels, size=size, workers=workers)

    return Dataset(
        name="imagefolder",
        train=streamed(train_root),
        test=streamed(test_root),
        num_classes=len(class_names),
        class_names=tuple(class_names),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


class Files:
    """Files read by number; all names lie in tensors, which worker processes share.

    Args:
        root: folder that the names are relative to.
        names: all names as bytes in one piece, uint8.
        starts: position of the first byte of each name, int64 [N].
        ends: position after the last byte of each name, int64 [N].
    """

    def __init__(self, root: Path, names: Tensor, starts: Tensor, ends: Tensor) -> None:
        self._root = os.fsencode(root)
        self._names = names
        self._starts = starts
        self._ends = ends

    def __len__(self) -> int:
        """Number of files N."""
        return len(self._starts)

    @property
    def fingerprint(self) -> str:
        """A digest of the names in their order, without the root."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (self._names, self._starts, self._ends):
            digest.update(tensor.numpy().data)
        return digest.hexdigest()

    def path(self, index: int) -> bytes:
        """Path of a file."""
        start, end = int(self._starts[index]), int(self._ends[index])
        return os.path.join(self._root, self._names[start:end].numpy().tobytes())

    def read(self, index: int) -> bytes:
        """Content of a file."""
        return read_file(self.path(index))

    def describe(self, index: int) -> str:
        """Path of a file, as text."""
        return os.fsdecode(self.path(index))

    def subset(self, index: Tensor) -> Files:
        """The files with these numbers, int64 [n], in that order."""
        root = Path(os.fsdecode(self._root))
        return Files(root, self._names, self._starts[index], self._ends[index])


def list_files(split: Path, class_names: Sequence[str]) -> tuple[Files, Tensor]:
    """The image files of a split, class by class in the order of their names.

    Args:
        split: folder with one folder per class.
        class_names: names of the classes 0 to C - 1; a class without a folder has no file.

    Returns:
        The files, and their class numbers int64 [N].

    Raises:
        ValueError: a class folder without images.
    """
    numbers = {name: number for number, name in enumerate(class_names)}
    names = bytearray()
    lengths: list[Tensor] = []
    labels: list[Tensor] = []
    for name in class_folders(split):
        found = image_names(split / name)
        encoded = [os.fsencode(f"{name}/{file}") for file in found]
        names += b"".join(encoded)
        lengths.append(torch.tensor([len(file) for file in encoded]))
        labels.append(torch.full((len(found),), numbers[name], dtype=torch.int64))
    ends = torch.cat(lengths).cumsum(0)
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    return Files(split, torch.frombuffer(names, dtype=torch.uint8), starts, ends), torch.cat(labels)
