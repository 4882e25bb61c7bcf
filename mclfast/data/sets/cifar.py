"""CIFAR-10 and CIFAR-100 from the archives their authors publish.

The archives hold pickles. Every file is compared with its published MD5 sum before it is parsed,
and the parser rebuilds NumPy arrays and plain values only. Nothing is written to disk.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mclfast.data import restricted_pickle
from mclfast.data.augment import Augmentation
from mclfast.data.dataset import Dataset, ImageSet

_HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"


@dataclass(frozen=True)
class CifarSource:
    """The files of one CIFAR set with their checksums, and the statistics of its images.

    Attributes:
        name: name of the set.
        archive: file name of the archive.
        archive_md5: MD5 sum of the archive.
        folder: folder inside the archive.
        train_files: files with training images, in order.
        test_files: files with test images.
        meta_file: file with the class names.
        md5: MD5 sum of every file, by its name.
        labels_key: key of the labels in the image files.
        names_key: key of the class names in the meta file.
        mean: mean of each channel, of pixels scaled to [0, 1].
        std: standard deviation of each channel.
    """

    name: str
    archive: str
    archive_md5: str
    folder: str
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    meta_file: str
    md5: Mapping[str, str]
    labels_key: bytes
    names_key: bytes
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def files(self) -> tuple[str, ...]:
        """All files that are read."""
        return (*self.train_files, *self.test_files, self.meta_file)


CIFAR10 = CifarSource(
    name="cifar10",
    archive="cifar-10-python.tar.gz",
    archive_md5="c58f30108f718f92721af3b95e74349a",
    folder="cifar-10-batches-py",
    train_files=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test_files=("test_batch",),
    meta_file="batches.meta",
    md5={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
        "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
    labels_key=b"labels",
    names_key=b"label_names",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)

CIFAR100 = CifarSource(
    name="cifar100",
    archive="cifar-100-python.tar.gz",
    archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
    folder="cifar-100-python",
    train_files=("train",),
    test_files=("test",),
    meta_file="meta",
    md5={
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    },
    labels_key=b"fine_labels",
    names_key=b"fine_label_names",
    mean=(0.5071, 0.4867, 0.4408),
    std=(0.2675, 0.2565, 0.2761),
)


def load_cifar(root: str | os.PathLike[str], source: CifarSource = CIFAR100) -> Dataset:
    """Reads CIFAR-10 or CIFAR-100 (fine labels).

    Args:
        root: folder that holds the extracted folder, or else the archive. The archive is read if
            the extracted folder is not complete.
        source: ``CIFAR10``, ``CIFAR100``, or another set with the same layout.

    Returns:
        The data set, with images uint8 [N, 3, 32, 32].

    Raises:
        FileNotFoundError: there is neither a complete extracted folder nor an archive.
        ValueError: a file differs from its MD5 sum, or its content is not that of a CIFAR file.
    """
    origin, contents = _read_files(Path(root), source)
    parsed = {}
    for file, data in contents.items():
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        _check_md5(f"{origin}/{file}", digest, source.md5[file])
        try:
            parsed[file] = restricted_pickle.loads(data)
        # A pickle is a program, and the errors of damaged ones have no common type.
        except Exception as error:
            raise ValueError(
                f"{origin}/{file}: expected a readable part of {source.name}, got {error!r}"
            ) from error

    names = _entry(parsed[source.meta_file], source.names_key, source.meta_file)
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise ValueError(f"{source.meta_file}: expected a list of class names")
    return Dataset(
        name=source.name,
        train=_image_set(parsed, source.train_files, source.labels_key),
        test=_image_set(parsed, source.test_files, source.labels_key),
        num_classes=len(names),
        class_names=tuple(name.decode() for name in names),
        mean=source.mean,
        std=source.std,
        augmentation=Augmentation(pad=4, flip=True),
    )


def _read_files(root: Path, source: CifarSource) -> tuple[Path, dict[str, bytes]]:
    """The folder or archive that was read, and the content of each file of the source."""
    folder, archive = root / source.folder, root / source.archive
    missing = [file for file in source.files if not (folder / file).is_file()]
    if not missing:
        return folder, {file: (folder / file).read_bytes() for file in source.files}
    if archive.is_file():
        return archive, _read_archive(archive, source)
    partial = f" with {source.folder} lacking {', '.join(missing)}" if folder.is_dir() else ""
    raise FileNotFoundError(
        f"root: expected a folder holding {source.archive} or a complete {source.folder}, "
        f"got {root}{partial}; the archive is published at {_HOME}"
    )


def _read_archive(archive: Path, source: CifarSource) -> dict[str, bytes]:
    digest = hashlib.md5(usedforsecurity=False)
    with archive.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    _check_md5(str(archive), digest.hexdigest(), source.archive_md5)

    wanted = {f"{source.folder}/{file}": file for file in source.files}
    contents = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                file = wanted.get(member.name)
                stream_in = tar.extractfile(member) if file and member.isfile() else None
                if file and stream_in:
                    contents[file] = stream_in.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{archive}: expected a readable archive, got {error!r}") from error
    missing = [path for path, file in wanted.items() if file not in contents]
    if missing:
        raise ValueError(f"{archive}: expected it to hold {', '.join(missing)}")
    return contents


def _check_md5(file: str, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(
            f"{file}: damaged or another version, expected MD5 {expected}, got {found}"
        )


def _image_set(parsed: dict[str, Any], files: tuple[str, ...], labels_key: bytes) -> ImageSet:
    pixels, labels = [], []
    for file in files:
        data = _entry(parsed[file], b"data", file)
        if not (isinstance(data, np.ndarray) and data.dtype == np.uint8):
            raise ValueError(f"data of {file}: expected a uint8 array")
        if data.ndim != 2 or data.shape[1] != 3 * 32 * 32:
            raise ValueError(f"data of {file}: expected [N, 3072], got {list(data.shape)}")
        targets = _entry(parsed[file], labels_key, file)
        if not isinstance(targets, list) or not all(isinstance(t, int) for t in targets):
            raise ValueError(f"{labels_key.decode()} of {file}: expected a list of integers")
        pixels.append(data.reshape(-1, 3, 32, 32))
        labels.extend(targets)
    return ImageSet(
        torch.from_numpy(np.concatenate(pixels)), torch.tensor(labels, dtype=torch.int64)
    )


def _entry(parsed: Any, key: bytes, file: str) -> Any:
    if not isinstance(parsed, dict) or key not in parsed:
        raise ValueError(f"{file}: expected a dictionary with the key {key.decode()!r}")
    return parsed[key]
