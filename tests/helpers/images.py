"""Small image files for the tests of streamed sets."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (50, 40)) -> Image.Image:
    """Smooth colours, no two seeds alike."""
    noise = np.random.RandomState(seed).randint(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(seed: int, size: tuple[int, int] = (50, 40), format: str = "JPEG") -> bytes:
    """The picture as the content of a file."""
    file = io.BytesIO()
    picture(seed, size).save(file, format, quality=95)
    return file.getvalue()


def make_folder(root: Path, *, classes: int = 3, train: int = 8, test: int = 4) -> Path:
    """root/train/c<k>/<i>.JPEG and root/val/..., sides and content all different."""
    for split, count in (("train", train), ("val", test)):
        for label in range(classes):
            folder = root / split / f"c{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                seed = (1000 if split == "val" else 0) + 100 * label + i
                (folder / f"{i:02}.JPEG").write_bytes(encoded(seed, (40 + 3 * i, 36 + 5 * label)))
    return root


def write_shard(path: Path, files: Iterable[tuple[str, bytes]], format: int | None = None) -> Path:
    """A tar file with these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def make_shards(root: Path, folder: Path, per_shard: int = 5) -> Path:
    """The images of a folder in shards, in the same order."""
    for split in ("train", "val"):
        files = sorted((folder / split).glob("*/*"))
        for shard, first in enumerate(range(0, len(files), per_shard)):
            members = []
            for number, file in enumerate(files[first : first + per_shard], first):
                label = file.parent.name.removeprefix("c").encode()
                members += [
                    (f"x/{number:04}.jpg", file.read_bytes()),
                    (f"x/{number:04}.json", b"{}"),
                    (f"x/{number:04}.cls", label + b"\n"),
                ]
            write_shard(root / split / f"set-{shard:03}.tar", members)
    return root
