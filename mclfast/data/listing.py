"""Image files in one folder per class: which folders and which files count."""

from __future__ import annotations

import os
from pathlib import Path

from mclfast.data.picture import kind_of_file

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff"}
)
# Leaving such files out would train on a part of the images without a word.
_UNREAD = frozenset(
    {".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".psd", ".tga", ".exr", ".hdr", ".dng"}
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
    """Names of the class folders of a split, in order.

    Raises:
        ValueError: there is none, or there are images beside them, which have no class.
    """
    names = []
    with os.scandir(split) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                names.append(entry.name)
            elif _is_image(entry):
                raise ValueError(f"{entry.path}: expected images in one folder per class")
    if not names:
        raise ValueError(f"{split}: expected one folder per class, got none")
    return sorted(names)


def image_names(folder: Path) -> list[str]:
    """Paths of the images in a class folder and in its own folders, in order.

    Args:
        folder: folder of a class; hidden files and folders in it are left out.

    Returns:
        Paths relative to ``folder``, with / between their parts.

    Raises:
        ValueError: there are no images, one of them is a named pipe or another thing that is no
            file, one has a format that is not read, or a link leads to a folder a second time.
    """
    found: list[str] = []
    # Plain strings; a Path for each of a million files takes minutes.
    pending, seen = [""], set()
    while pending:
        inner = pending.pop()
        place = os.path.join(folder, inner)
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            raise ValueError(f"{place}: expected a folder once, got a link to it as well")
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending.append(f"{inner}{entry.name}/")
                elif _is_image(entry):
                    if not entry.is_file():
                        raise ValueError(f"{entry.path}: expected a file, got {_kind(entry)}")
                    found.append(inner + entry.name)
    if not found:
        raise ValueError(f"{folder}: expected at least one image, got none")
    return sorted(found)


def _is_image(entry: os.DirEntry[str]) -> bool:
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix in _UNREAD:
        raise ValueError(
            f"{entry.path}: expected images with a suffix of {', '.join(sorted(SUFFIXES))}, "
            f"got {suffix}; convert them, or take them out"
        )
    return suffix in SUFFIXES


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        return kind_of_file(entry.stat().st_mode)
    except FileNotFoundError:
        return "a link to nothing"
