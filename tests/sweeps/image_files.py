"""Image files of many kinds, whole and damaged: every loader reads the same or names the file.

Lost is a file that one loader reads and another refuses, that ends in an error which does not name
it in one line, that is read from a part of its pixels, or that is whole and read as other colours.
"""

from __future__ import annotations

import io
import os
import random
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from helpers.images import picture, write_shard
from mclfast import data
from sweeps import tally

LOADERS = ("folder", "imagefolder", "webdataset")
#: Format, mode and how far colours may be from those of the picture.
KINDS = [
    ("PNG", "RGB", 0),
    ("PNG", "RGBA", 0),
    ("PNG", "P", 0),
    ("PNG", "L", 0),
    ("PNG", "LA", 0),
    ("PNG", "1", 0),
    ("PNG", "I;16", 0),
    ("JPEG", "RGB", 40),
    ("JPEG", "L", 40),
    ("JPEG", "CMYK", 40),
    ("BMP", "RGB", 0),
    ("GIF", "P", 0),
    ("WEBP", "RGB", 0),
    ("WEBP", "RGBA", 0),
    ("PPM", "RGB", 0),
    ("PPM", "L", 0),
    ("TIFF", "RGB", 0),
    ("TIFF", "CMYK", 1),
    ("TIFF", "I;16", 0),
    ("TIFF", "F", 0),
]


def sweep(count: int, seed: int) -> dict[str, int]:
    """Writes image files and reads them by every loader.

    Args:
        count: number of files.
        seed: seed that kinds and damages are drawn by.

    Returns:
        Numbers of files: tried, survived (read alike by all), refused (by all), lost.
    """
    draw, found = random.Random(seed), Counter(tried=0, survived=0, refused=0, lost=0)
    with (
        tempfile.TemporaryDirectory() as name,
        mock.patch.dict(os.environ, XDG_CACHE_HOME=name),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for number in range(count):
            format, mode, slack = draw.choice(KINDS)
            image = picture(number, (40, 40))
            image = image if mode == "RGB" else image.convert("L" if mode == "I;16" else mode)
            whole = _content(image, format, mode)
            make = draw.choice([_nothing, _cut, _flip, _zeros, _size])
            file = make(draw, whole)
            outcome = _try(Path(name), file, whole if make is _cut else None)
            if outcome == "survived" and make is _nothing and not _is_like(name, image, slack):
                outcome = "other colours"
            if outcome == "refused" and make is _nothing and mode != "F":
                outcome = "a whole file is refused"
            case = f"file {number}, {format} {mode} by {make.__name__} (seed {seed})"
            tally(found, outcome, case)
    return dict(found)


def _content(image: Image.Image, format: str, mode: str) -> bytes:
    file = io.BytesIO()
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}
    image.save(file, format, **options.get(format, {}))
    return file.getvalue()


def _try(root: Path, file: bytes, whole: bytes | None) -> str:
    """Reads a file by every loader; one that was cut must be read as the whole file is."""
    found = [_read(root, loader, file) for loader in LOADERS]
    texts = [text for text in found if isinstance(text, str)]
    if texts:
        wrong = [text for text in texts if text != "refused"]
        return wrong[0] if wrong else "refused" if len(texts) == 3 else "read by some loaders"
    if not torch.equal(found[1], found[2]):
        return "read differently from a shard"
    if whole is not None and not torch.equal(found[0], _read(root, "folder", whole)):
        return "read in part"
    return "survived"


def _read(root: Path, loader: str, file: bytes) -> Any:
    """The test image of a set that holds a file, or what became of it."""
    place = root / loader
    for split in ("train", "val"):
        if loader == "webdataset":
            write_shard(place / split / "a.tar", [("x.png", file), ("x.cls", b"0")])
        else:
            (place / split / "a").mkdir(parents=True, exist_ok=True)
            (place / split / "a" / "x.png").write_bytes(file)
    try:
        split = data.load(loader, root=place, image_size=35, workers=0)
        return next(iter(split.test.pixels(torch.tensor([[0]]), "cpu")))[0]
    except ValueError as error:
        text = str(error)
        return text if "\n" in text or "x.png: expected " not in text else "refused"
    # A traceback for the user; the sweep has to go on.
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _is_like(root: str, image: Image.Image, slack: int) -> bool:
    """Whether a file that was just read by the folder loader has the colours of its picture."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG")
    got = _read(Path(root), "folder", (Path(root) / "folder/val/a/x.png").read_bytes())
    want = _read(Path(root), "folder", file.getvalue())
    return bool((got.int() - want.int()).abs().max() <= slack)


def _nothing(_: random.Random, file: bytes) -> bytes:
    return file


def _cut(draw: random.Random, file: bytes) -> bytes:
    return file[: draw.randrange(len(file))]


def _flip(draw: random.Random, file: bytes) -> bytes:
    changed = bytearray(file)
    # Most of them in the header, where they lie most.
    place = draw.randrange(min(len(file), 80) if draw.random() < 0.7 else len(file))
    changed[place] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _zeros(draw: random.Random, file: bytes) -> bytes:
    start = draw.randrange(len(file))
    length = min(draw.randrange(1, 64), len(file) - start)
    return file[:start] + bytes(length) + file[start + length :]


def _size(draw: random.Random, file: bytes) -> bytes:
    """Another width or height where the header holds one: all sides are 40."""
    places = [i for i in range(min(len(file), 200)) if file[i] == 40]
    if not places:
        return file[:20] + draw.randbytes(4) + file[24:]
    place = draw.choice(places)
    return file[:place] + draw.choice([b"\0", b"\x01", b"\x7f", b"\xff"]) + file[place + 1 :]
