"""Decodes an image file to the square uint8 view that a network is fed."""

from __future__ import annotations

import hashlib
import math
import random
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mclfast._base.optional import optional_import
from mclfast.data import picture

if TYPE_CHECKING:
    from PIL import Image

SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
# Evaluation resizes the shorter side to this multiple of the view before it takes the centre.
EVALUATION_MARGIN = 256 / 224

_ATTEMPTS = 10

Box = tuple[int, int, int, int]


def view_generator(seed: int, step: int, index: int) -> random.Random:
    """Random numbers for image ``index`` at ``step`` of a run.

    The seed is a hash, so that neighbouring steps and images share nothing. Python promises that
    the stream of a seed never changes.
    """
    digest = hashlib.blake2b(f"view {seed} {step} {index}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "little"))


def random_box(
    width: int, height: int, generator: random.Random, min_area: float = SCALE[0]
) -> Box:
    """A random crop of an image, as (left, top, right, bottom) in whole pixels.

    The crop's share of the image's area is uniform in [``min_area``, 1], and the logarithm of its
    width / height is uniform within the logarithms of ``RATIO`` (Szegedy et al. 2015,
    https://arxiv.org/abs/1409.4842). If ten draws do not fit into the image, the crop is the
    largest centred one of an allowed ratio.
    """
    for _ in range(_ATTEMPTS):
        area = width * height * _uniform(generator, min_area, SCALE[1])
        ratio = math.exp(_uniform(generator, math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(generator.random() * (width - w + 1))
            top = int(generator.random() * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * RATIO[1])))
    h = min(height, max(1, round(width / RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def training_view(
    data: bytes, size: int, generator: random.Random, min_area: float = SCALE[0]
) -> Tensor:
    """A random crop resized to [3, size, size], mirrored with probability 1/2.

    Args:
        data: content of an image file.
        size: side of the result in pixels.
        generator: the only source of randomness.
        min_area: smallest share of the image's area that the crop covers.

    Returns:
        uint8 [3, size, size].

    Raises:
        ValueError: the file is one that ``mclfast.data.picture`` refuses.
        Exception: any type that Pillow raises for a file that it cannot read.
    """
    with picture.open_picture(data) as image:
        is_mirrored = generator.random() < 0.5
        width, height = image.size
        # Drawn from the picture as it is stored: shapes and places of crops are as likely upright.
        left, top, right, bottom = random_box(width, height, generator, min_area)
        shrink = _draft(image, (right - left) // size, (bottom - top) // size)
        found = picture.decoded(image)
    box = (left / shrink, top / shrink, right / shrink, bottom / shrink)
    view = found.upright(found.image.resize((size, size), _bilinear(), box=box))
    return _tensor(view, is_mirrored)


def evaluation_view(data: bytes, size: int) -> Tensor:
    """The centre of the image, after its shorter side has been resized to ``size`` * 256 / 224.

    Args:
        data: content of an image file.
        size: side of the result in pixels.

    Returns:
        uint8 [3, size, size].

    Raises:
        ValueError: the file is one that ``mclfast.data.picture`` refuses.
        Exception: any type that Pillow raises for a file that it cannot read.
    """
    with picture.open_picture(data) as image:
        full = image.size
        target = round(size * EVALUATION_MARGIN)
        width, height = (target * side // min(full) for side in full)
        picture.check_resized(width, height)
        shrink = _draft(image, full[0] // width, full[1] // height)
        found = picture.decoded(image)
    # A part of the draft, whose sides are rounded up.
    box = (0, 0, full[0] / shrink, full[1] / shrink)
    resized = found.upright(found.image.resize((width, height), _bilinear(), box=box))
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    return _tensor(resized.crop((left, top, left + size, top + size)), False)


def require_pillow() -> None:
    """Raises ImportError with the pip line where Pillow is missing."""
    _pillow()


def _pillow() -> Any:
    return optional_import("PIL.Image", extra="train")


def _uniform(generator: random.Random, low: float, high: float) -> float:
    return low + (high - low) * generator.random()


def _bilinear() -> Any:
    return _pillow().Resampling.BILINEAR


def _draft(image: Image.Image, *shrinks: int) -> int:
    """Lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its size, which is faster.

    Args:
        image: an image that is not decoded yet.
        shrinks: factors, none of which may be exceeded.

    Returns:
        The factor by which the image will be smaller: 1, 2, 4 or 8.
    """
    shrink = max((s for s in (8, 4, 2) if s <= min(shrinks)), default=1)
    if shrink == 1:
        return 1
    is_done = image.draft(None, (image.width // shrink, image.height // shrink))
    return shrink if is_done else 1


def _tensor(image: Image.Image, is_mirrored: bool) -> Tensor:
    """The image as uint8 [3, H, W]."""
    view = picture.as_tensor(image)
    return view.flip(-1) if is_mirrored else view
