"""From the bytes of an image file to the square uint8 view that a network is fed."""

from __future__ import annotations

import hashlib
import io
import math
import random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mclfast._base.optional import optional_import

if TYPE_CHECKING:
    from PIL import Image

SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
# 256 of 224: what evaluation resizes the shorter side to before it takes the centre.
EVALUATION_MARGIN = 256 / 224

_ATTEMPTS = 10

Box = tuple[int, int, int, int]


def view_generator(seed: int, step: int, index: int) -> random.Random:
    """The randomness of image `index` at `step` of a run.

    Hashed, so that neighbouring steps and images share nothing; Python promises that the stream
    of a seed never changes.
    """
    digest = hashlib.blake2b(f"view {seed} {step} {index}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "little"))


def random_box(
    width: int, height: int, generator: random.Random, min_area: float = SCALE[0]
) -> Box:
    """A random crop of an image, as (left, top, right, bottom) in whole pixels.

    Its area is a uniform share in [`min_area`, 1] of the image's, the logarithm of width / height
    uniform in that of `RATIO` (Szegedy et al. 2015, https://arxiv.org/abs/1409.4842). Where ten
    draws do not fit into the image, the largest centred crop of an allowed ratio.
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
        min_area: see `random_box`.

    Returns:
        uint8 [3, size, size].

    Raises:
        Exception: whatever Pillow raises for a file that it cannot read.
    """
    with _opened(data) as image:
        is_mirrored = generator.random() < 0.5
        width, height = image.size
        left, top, right, bottom = random_box(width, height, generator, min_area)
        shrink = _draft(image, (right - left) // size, (bottom - top) // size)
        rgb = _rgb(image)
    box = (left / shrink, top / shrink, right / shrink, bottom / shrink)
    return _tensor(rgb.resize((size, size), _bilinear(), box=box), is_mirrored)


def evaluation_view(data: bytes, size: int) -> Tensor:
    """The centre of the image, after its shorter side became `size` * 256 / 224.

    Args:
        data: content of an image file.
        size: side of the result in pixels.

    Returns:
        uint8 [3, size, size].

    Raises:
        Exception: whatever Pillow raises for a file that it cannot read.
    """
    with _opened(data) as image:
        full = image.size
        target = round(size * EVALUATION_MARGIN)
        width, height = (target * side // min(full) for side in full)
        shrink = _draft(image, full[0] // width, full[1] // height)
        rgb = _rgb(image)
    # Not the whole draft: its sides are rounded up.
    box = (0, 0, full[0] / shrink, full[1] / shrink)
    resized = rgb.resize((width, height), _bilinear(), box=box)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return _tensor(resized.crop((left, top, left + size, top + size)), False)


def require_pillow() -> None:
    """Raises ImportError with the pip line where Pillow is missing."""
    _pillow()


def _pillow() -> Any:
    return optional_import("PIL.Image", extra="train")


def _uniform(generator: random.Random, low: float, high: float) -> float:
    return low + (high - low) * generator.random()


def _opened(data: bytes) -> Image.Image:
    pillow = _pillow()
    try:
        opened: Image.Image = pillow.open(io.BytesIO(data))
    except pillow.UnidentifiedImageError:
        # Its own text names the buffer.
        raise ValueError(f"{len(data)} bytes of no known image format") from None
    return opened


def _bilinear() -> Any:
    return _pillow().Resampling.BILINEAR


def _draft(image: Image.Image, *shrinks: int) -> int:
    """Lets a JPEG be decoded at 1/2, 1/4 or 1/8, but no smaller than all the shrinks allow.

    Returns:
        By what the image is smaller now: 1, 2, 4 or 8.
    """
    shrink = max((s for s in (8, 4, 2) if s <= min(shrinks)), default=1)
    if shrink == 1:
        return 1
    is_done = image.draft(None, (image.width // shrink, image.height // shrink))
    return shrink if is_done else 1


def _rgb(image: Image.Image) -> Image.Image:
    """Decoded, as RGB."""
    if image.mode != "RGB":
        return image.convert("RGB")
    # Not convert, which would copy.
    image.load()
    return image


def _tensor(image: Image.Image, is_mirrored: bool) -> Tensor:
    """uint8 [3, H, W]."""
    # A bytearray because torch warns about read-only memory.
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    view = flat.view(image.height, image.width, 3).permute(2, 0, 1)
    return view.flip(-1) if is_mirrored else view
