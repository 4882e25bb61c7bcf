"""Large image sets in tar shards with the layout of WebDataset, read at random.

A sample consists of the files of a shard that share a key, the name up to its first dot:
``key.jpg`` (or another suffix of an image) and ``key.cls`` with its class number; other files are
left out. Samples
are numbered shard by shard in the order of the shards' names, and within a shard in its own order.
An index, made once and kept, says where each sample lies, so that a sample takes one read.

The package webdataset is not used, as it reads shards as streams. Its former random access, wids,
looked through every shard again in every worker process and did not know the long names of the tar
formats pax and GNU.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from mclfast._base.archives import damage_of, seal
from mclfast._base.files import replacing
from mclfast._base.optional import optional_import
from mclfast.data.dataset import Dataset
from mclfast.data.listing import SUFFIXES
from mclfast.data.picture import MAX_BYTES, kind_of_file
from mclfast.data.stream.imagefolder import IMAGE_SIZE, IMAGENET_MEAN, IMAGENET_STD
from mclfast.data.stream.streamed import StreamedSet

INDEX = ".mclfast-index.npz"
_IMAGES = frozenset(suffix.removeprefix(".") for suffix in SUFFIXES)
# A label above both this and the number of images belongs to no class of the set: the memory of a
# set goes by the largest label.
_CLASSES = 100_000
# An index of an older version may lack samples that are read now.
_VERSION = 2
# Far below the usual limit of 1024 open files, as other files are open too.
_OPEN_SHARDS = 128


def load_shards(
    root: str | os.PathLike[str], image_size: int | None = None, workers: int | None = None
) -> Dataset:
    """Indexes root/train/*.tar and root/val/*.tar (or root/test); reads no image.

    Images are cropped and resized as by ``load_imagefolder``. The index is written into the folder
    of the shards or, if that is read-only, into ~/.cache/mclfast (or $XDG_CACHE_HOME/mclfast). It
    is made anew if the size or the time of change of a shard differs.

    Args:
        root: folder that holds train, and val or test.
        image_size: side of the images in pixels; by default 224.
        workers: number of processes that read and decode; None for one per core, 0 to decode in
            this process.

    Returns:
        A ``Dataset`` of two ``StreamedSet``; mean and std are those of ImageNet, and the classes
        are named by their numbers.

    Raises:
        FileNotFoundError: there are no shards in train, or neither in val nor in test.
        ValueError: a shard is damaged or no file, a sample lacks its image or its class, a class
            number is above 100,000 and the number of images, or a test class is not in train.
        ImportError: Pillow is not installed.
    """
    size = IMAGE_SIZE if image_size is None else image_size
    train_shards = _shards(Path(root) / "train")
    test_shards = _shards(Path(root) / "val") or _shards(Path(root) / "test")
    if not train_shards or not test_shards:
        raise FileNotFoundError(
            f"root: expected a folder holding train/*.tar and val/*.tar (or test/*.tar), got {root}"
        )
    train, train_labels = open_shards(train_shards)
    test, test_labels = open_shards(test_shards)
    classes = _class_count(train, train_labels)
    return Dataset(
        name="webdataset",
        train=StreamedSet(train, train_labels, size=size, workers=workers),
        test=StreamedSet(test, test_labels, size=size, workers=workers),
        num_classes=classes,
        class_names=tuple(map(str, range(classes))),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


class Shards:
    """Images in tar files, read by number.

    Args:
        paths: paths of the shards.
        shard: index in ``paths`` of the shard that holds each image, int32 [N].
        offset: position of the first byte of each image in its shard, int64 [N].
        size: number of bytes of each image, int64 [N].
    """

    def __init__(self, paths: Sequence[Path], shard: Tensor, offset: Tensor, size: Tensor) -> None:
        self._paths = tuple(paths)
        self._shard = shard
        self._offset = offset
        self._size = size
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()

    def __len__(self) -> int:
        """Number of images N."""
        return len(self._shard)

    def __getstate__(self) -> dict[str, Any]:
        # Not the open files: every process opens its own.
        return self.__dict__ | {"_open": OrderedDict()}

    @property
    def fingerprint(self) -> str:
        """A digest of the shards' names and of the places in them."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update("/".join(path.name for path in self._paths).encode(errors="surrogateescape"))
        for tensor in (self._shard, self._offset, self._size):
            digest.update(tensor.numpy().data)
        return digest.hexdigest()

    def read(self, index: int) -> bytes:
        """Content of an image file."""
        file = self._file(int(self._shard[index]))
        file.seek(int(self._offset[index]))
        return file.read(int(self._size[index]))

    def describe(self, index: int) -> str:
        """Shard and name of an image file."""
        path, offset = self._paths[int(self._shard[index])], int(self._offset[index])
        with suppress(OSError, tarfile.TarError), tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.offset_data == offset:
                    return f"{path}: {member.name}"
        return f"{path}: byte {offset}"

    def subset(self, index: Tensor) -> Shards:
        """The images with these numbers, int64 [n], in that order."""
        return Shards(self._paths, self._shard[index], self._offset[index], self._size[index])

    def _file(self, shard: int) -> BinaryIO:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= _OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        self._open[shard] = open(self._paths[shard], "rb")
        return self._open[shard]


def open_shards(paths: Sequence[Path]) -> tuple[Shards, Tensor]:
    """The images of some shards in their order, and their class numbers int64 [N].

    Args:
        paths: shards of one folder.

    Raises:
        ValueError: a damaged shard, no samples, or a sample without image or class.
    """
    stamps = _stamps(paths)
    places = _index_places(paths[0].parent)
    found = next((index for place in places if (index := _load(place, stamps))), None)
    if found is None:
        found = _scan(paths)
        for place in places:
            # Two runs that start at once, or a full disk: the index is a convenience.
            with suppress(OSError):
                _save(place, stamps, found)
                break
    tensors = {name: torch.from_numpy(array) for name, array in found.items()}
    labels = tensors.pop("label")
    return Shards(paths, **tensors), labels


def _shards(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    for path in found:
        # A named pipe would be waited for.
        if path.exists() and not path.is_file():
            kind = kind_of_file(path.stat().st_mode)
            raise ValueError(f"{path}: expected an uncompressed tar file, got {kind}")
    return found


def _class_count(shards: Shards, labels: Tensor) -> int:
    most, position = (int(value) for value in labels.max(0))
    limit = max(_CLASSES, len(labels))
    if most >= limit:
        raise ValueError(
            f"{shards.describe(position)}: expected a class number below {limit}, got {most}"
        )
    return most + 1


def _scan(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Columns of the index: shard int32 [N]; offset, size and label int64 [N]."""
    # The bar is shown on a terminal only; a million files take a minute or two.
    bar = optional_import("tqdm", extra="train").tqdm(
        paths, "indexing shards", leave=False, disable=None
    )
    shards: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    for number, path in enumerate(bar):
        try:
            samples = np.array(list(_samples(path)), dtype=np.int64).reshape(-1, 3)
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{path}: expected an uncompressed tar file, got {error!r}") from error
        shards.append(np.full(len(samples), number, dtype=np.int32))
        rows.append(samples)
    table = np.concatenate(rows)
    if not len(table):
        raise ValueError(f"{paths[0].parent}: expected at least one sample in the shards, got none")
    columns = {name: np.ascontiguousarray(table[:, i]) for i, name in enumerate(_COLUMNS)}
    return {"shard": np.concatenate(shards), **columns}


_COLUMNS = ("offset", "size", "label")


def _samples(path: Path) -> Iterator[tuple[int, int, int]]:
    """Yields offset, size and label of each image of a shard."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            key, suffix = f"{folder}/{stem}", suffix.lower()
            if not member.isreg() or not stem:
                continue
            if suffix in _IMAGES:
                if key in images:
                    raise ValueError(f"{path}: expected one image of {stem}, got {member.name} too")
                if member.size > MAX_BYTES:
                    raise ValueError(
                        f"{path}: expected at most {MAX_BYTES:,} bytes of an image, "
                        f"got {member.size:,} of {member.name}"
                    )
                images[key] = (member.offset_data, member.size)
            elif suffix == "cls":
                if key in labels:
                    raise ValueError(f"{path}: expected one class of {stem}, got {member.name} too")
                labels[key] = _label(tar, member, path)
    if unpaired := images.keys() ^ labels.keys():
        key = min(unpaired)
        has = "an image" if key in images else "a class"
        raise ValueError(
            f"{path}: expected an image (such as jpg) and a class (cls) of every sample, "
            f"got only {has} of {key.removeprefix('/')}"
        )
    for key, place in images.items():
        yield *place, labels[key]


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> int:
    file = tar.extractfile(member)
    text = b"" if file is None else file.read(33)
    # int() takes underscores and signs, which no class number has.
    if not text.strip().isdigit() or len(text) > 32 or int(text) >= 2**31:
        raise ValueError(f"{path}: expected a class number in {member.name}, got {text!r}")
    return int(text)


def _stamps(paths: Sequence[Path]) -> np.ndarray:
    """Name, size and time of change of each shard; an index with other stamps is out of date."""
    stats = [(path.name, path.stat()) for path in paths]
    return np.array([f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats])


def _index_places(folder: Path) -> list[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mclfast"
    name = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=8).hexdigest()
    return [folder / INDEX, cache / f"{name}.npz"]


def _load(place: Path, stamps: np.ndarray) -> dict[str, np.ndarray] | None:
    """Reads the index; None if it is absent, damaged or out of date."""
    try:
        if not place.is_file() or damage_of(place) is not None:
            return None
        with np.load(place, allow_pickle=False) as stored:
            if int(stored["version"]) != _VERSION or not np.array_equal(stored["stamps"], stamps):
                return None
            columns = {name: stored[name] for name in ("shard", *_COLUMNS)}
    except (OSError, ValueError, TypeError, KeyError, EOFError):
        return None
    return columns if _is_index(columns, len(stamps)) else None


def _is_index(columns: dict[str, np.ndarray], shards: int) -> bool:
    """Whether columns are such as :func:`_scan` gives for that many shards."""
    count = columns["shard"].size
    if not all(c.shape == (count,) and c.dtype.kind == "i" for c in columns.values()) or not count:
        return False
    return bool(columns["shard"].max() < shards) and all(c.min() >= 0 for c in columns.values())


def _save(place: Path, stamps: np.ndarray, columns: dict[str, np.ndarray]) -> None:
    with replacing(place) as partial:
        with partial.open("wb") as file:
            np.savez(file, version=np.array(_VERSION), stamps=stamps, **columns)  # type: ignore[arg-type]
        seal(partial)
