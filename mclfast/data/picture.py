"""The one decoder of image files: limits, kinds of pixels, transparency, orientation.

Every loader of image files reads them by :func:`read_file`, :func:`open_picture` and
:func:`decoded`, so that a file has the same pixels in each of them or is refused by each of them.
"""

from __future__ import annotations

import io
import os
import stat
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mclfast._base.optional import optional_import

if TYPE_CHECKING:
    from PIL import Image

#: Largest file in bytes.
MAX_BYTES = 2**28
#: Largest number of pixels, which take 240 MB when they are decoded.
MAX_PIXELS = 80_000_000
#: Largest ratio of the sides.
MAX_RATIO = 100
#: Largest side of the square images that are made of the files.
MAX_SIDE = 4096

# Others are left out of what Pillow tries: some of them start programs, such as EPS.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
_OPAQUE = frozenset({"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"})
_TRANSPARENT = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
_SIXTEEN_BITS = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
_GREY_OF_FEW_BITS = {"1": 1, "L;2": 2, "L;4": 4}
# Tags of TIFF and EXIF.
_BITS, _PHOTOMETRIC, _ORIENTATION = 258, 262, 274


class Decoded(NamedTuple):
    """A decoded picture, as the file stores it.

    Attributes:
        image: pixels as RGB.
        turn: how Pillow's ``transpose`` brings them upright; None if they are.
    """

    image: Image.Image
    turn: Any

    def upright(self, image: Image.Image) -> Image.Image:
        """The picture or a part of it, brought upright."""
        return image if self.turn is None else image.transpose(self.turn)


def read_file(path: str | bytes | os.PathLike[str]) -> bytes:
    """The content of a file, which is neither waited for nor larger than ``MAX_BYTES``.

    Raises:
        ValueError: it is no regular file, or too large; the text does not name it.
        OSError: it cannot be opened.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{kind_of_file(status.st_mode)} in place of a file")
        _check_bytes(status.st_size)
        return file.read()


def kind_of_file(mode: int) -> str:
    """What a path leads to, in words, by the mode that ``stat`` gives."""
    kinds = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "no file")


def open_picture(data: bytes) -> Image.Image:
    """A picture whose header was read and found to be within the limits; it is not decoded yet.

    Args:
        data: content of an image file.

    Raises:
        ValueError: the format or the kind of pixels is none of those that are read, or the picture
            is too large or too narrow.
        Exception: any type that Pillow raises for a header that it cannot read.
    """
    _check_bytes(len(data))
    pillow = optional_import("PIL.Image", extra="train")
    try:
        image: Image.Image = pillow.open(io.BytesIO(data), formats=_FORMATS)
    except pillow.UnidentifiedImageError:
        # Replaced, as its text names the buffer.
        raise ValueError(
            f"{len(data)} bytes of no known image format (known are {', '.join(_FORMATS)})"
        ) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels where {MAX_PIXELS:,} are the most")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"{width} x {height} pixels where sides of 1 : {MAX_RATIO} are the limit")
    if image.format == "TIFF" and getattr(image, "is_animated", False):
        # Pages may be channels or slices; nothing says that the first stands for all.
        raise ValueError("a TIFF file of several pages")
    _levels(image)
    return image


def decoded(image: Image.Image) -> Decoded:
    """Decodes a picture of :func:`open_picture` to RGB.

    Transparent pixels are laid over white. Of an animation the first frame is taken. Colour
    profiles are not applied.

    Raises:
        ValueError: colours have 16 bits and one of them stands for transparent, or the size is not
            that of the header.
        Exception: any type that Pillow raises for a file that it cannot decode.
    """
    levels, stored, size = _levels(image), _stored_mode(image), image.size
    image.load()
    # Crops and limits went by the size of the header.
    if image.size != size:
        raise ValueError(f"{image.size} pixels where the header says {size}")
    turn = _turn(image)
    if levels is not None:
        return Decoded(_eight_bits(image, levels).convert("RGB"), turn)
    transparency = image.info.get("transparency")
    # Pillow makes eight bits of the pixels, but not of the value that stands for transparent.
    if transparency is not None and stored == "RGB;16B":
        raise ValueError("colours of 16 bits of which one is transparent; save them with 8 bits")
    if isinstance(transparency, int) and stored in _GREY_OF_FEW_BITS:
        image.info["transparency"] = transparency * 255 // (2 ** _GREY_OF_FEW_BITS[stored] - 1)
        image = image.convert("L")
    if image.mode in _TRANSPARENT or transparency is not None:
        return Decoded(_over_white(image), turn)
    return Decoded(image if image.mode == "RGB" else image.convert("RGB"), turn)


def check_side(image_size: int) -> None:
    """Raises ValueError unless images of this side are made."""
    if image_size < 1:
        raise ValueError(f"image_size: expected at least 1, got {image_size}")
    if image_size > MAX_SIDE:
        raise ValueError(f"image_size: expected at most {MAX_SIDE}, got {image_size}")


def check_resized(width: int, height: int) -> None:
    """Raises ValueError if a resized picture is too large: a narrow one may be."""
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels after resizing where {MAX_PIXELS:,} are the most"
        )


def as_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as uint8 [3, H, W]."""
    # A bytearray because torch warns about read-only memory.
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1)


def _without_waiting(path: Any, flags: int) -> int:
    # A named pipe would be waited for when it is opened.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_bytes(count: int) -> None:
    if count > MAX_BYTES:
        raise ValueError(f"{count:,} bytes where {MAX_BYTES:,} are the most")


def _levels(image: Image.Image) -> int | None:
    """The value of white of grey pixels with more than eight bits, None for all other pixels."""
    mode = image.mode
    if mode in _OPAQUE or mode in _TRANSPARENT:
        return None
    if mode == "I" and image.format in ("PNG", "PPM"):
        return 65535
    if mode in _SIXTEEN_BITS:
        tags = getattr(image, "tag_v2", {})
        bits = tags.get(_BITS, (16,))[0]
        # Pillow inverts such pixels only if they have eight bits.
        if tags.get(_PHOTOMETRIC, 1) == 0:
            raise ValueError(f"{bits}-bit grey pixels of which 0 is white")
        return int(2**bits - 1)
    words = {"I": "32-bit or signed integers", "F": "floating-point numbers", "LAB": "Lab colours"}
    what = words.get(mode, f"of mode {mode}")
    raise ValueError(f"pixels {what}, whose range is not known; save it with 8 or 16 bits")


def _stored_mode(image: Image.Image) -> str:
    """Pillow's name of the pixels that a PNG file stores; empty for other files."""
    tiles = getattr(image, "tile", [])
    is_named = image.format == "PNG" and tiles and isinstance(tiles[0][3], str)
    return tiles[0][3] if is_named else ""


def _turn(image: Image.Image) -> Any:
    transpose = optional_import("PIL.Image", extra="train").Transpose
    turns = {
        2: transpose.FLIP_LEFT_RIGHT,
        3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE,
        6: transpose.ROTATE_270,
        7: transpose.TRANSVERSE,
        8: transpose.ROTATE_90,
    }
    try:
        return turns.get(image.getexif().get(_ORIENTATION, 1))
    # Damaged metadata, for which Pillow has many errors, hold no orientation; the pixels are whole.
    except Exception:
        return None


def _eight_bits(image: Image.Image, levels: int) -> Image.Image:
    """Grey pixels from 0 to ``levels``, rounded to 0 to 255."""
    pillow = optional_import("PIL.Image", extra="train")
    table = ((np.arange(levels + 1) * 255 + levels // 2) // levels).astype(np.uint8)
    pixels, transparent = np.asarray(image), image.info.get("transparency")
    grey = np.empty(pixels.shape, np.uint8)
    # Row by row, as positions in the table take eight bytes a pixel.
    for row, line in zip(grey, pixels, strict=True):
        row[:] = table[line]
        if transparent is not None:
            row[line == transparent] = 255
    result: Image.Image = pillow.fromarray(grey)
    return result


def _over_white(image: Image.Image) -> Image.Image:
    pillow = optional_import("PIL.Image", extra="train")
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    canvas: Image.Image = pillow.new("RGB", image.size, "white")
    canvas.paste(rgba, mask=rgba)
    return canvas
