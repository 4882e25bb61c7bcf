"""Kinds of image files: each has the right pixels in every loader, or is refused by every one."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sweeps.image_files import sweep
from torch import Tensor

from helpers.images import encoded, picture, write_shard
from mclfast import data
from mclfast.data.picture import MAX_BYTES, MAX_PIXELS, decoded, open_picture

LOADERS = ("folder", "imagefolder", "webdataset")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    """Nothing is written into the cache of whoever runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def content(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def grey(level: int, bits: int = 16, side: int = 8) -> Image.Image:
    dtype = {8: np.uint8, 16: np.uint16, 32: np.int32}[bits]
    return Image.fromarray(np.full((side, side), level, dtype))


def png(pixels: bytes, width: int, height: int, bits: int, kind: int, *more: Any) -> bytes:
    """A PNG file from its parts: filtered rows, and chunks of a type and content each."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, body) for name, body in parts)


def tiff(pixels: bytes, width: int, height: int, **tags: int) -> bytes:
    """A TIFF file of one strip, from its tags."""
    numbers = {"bits": 258, "photometric": 262, "format": 339, "per_pixel": 277}
    fields = {256: width, 257: height, 259: 1, 273: 0, 278: height, 279: len(pixels)}
    fields |= {numbers[name]: value for name, value in tags.items()}
    offset = 8 + 2 + 12 * len(fields) + 4
    fields[273] = offset
    entries = b"".join(struct.pack("<HHII", k, 4, 1, v) for k, v in sorted(fields.items()))
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(fields))
    return head + entries + bytes(4) + pixels


def root_of(folder: Path, loader: str, file: bytes, suffix: str = "png") -> Path:
    """A set whose only training image is the file, once in each of two classes."""
    for split in ("train", "val"):
        if loader == "webdataset":
            members = [
                (f"{i}.{e}", c) for i in range(2) for e, c in ((suffix, file), ("cls", b"%d" % i))
            ]
            write_shard(folder / split / "a.tar", members)
        else:
            for name in "ab":
                (folder / split / name).mkdir(parents=True, exist_ok=True)
                (folder / split / name / f"x.{suffix}").write_bytes(file)
    return folder


def loaded(root: Path, loader: str, size: int = 8) -> Tensor:
    """The first test image."""
    split = data.load(loader, root=root, image_size=size, workers=0)
    return next(iter(split.test.pixels(torch.tensor([[0]]), "cpu")))[0]


def rgb(file: bytes) -> list[int]:
    """The pixel in the middle of the upright picture."""
    with open_picture(file) as image:
        found = decoded(image)
    upright = found.upright(found.image)
    assert upright.mode == "RGB"
    return list(upright.getpixel((upright.width // 2, upright.height // 2)))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(("level", "want"), [(0, 0), (16384, 64), (49152, 191), (65535, 255)])
def test_sixteen_bit_grey_is_scaled(loader, level, want, tmp_path):
    root = root_of(tmp_path, loader, content(grey(level)))
    assert loaded(root, loader).eq(want).all()


@pytest.mark.parametrize("level", [0, 100, 16384, 32768, 49152, 65535])
def test_every_sixteen_bit_grey_file_is_scaled(level):
    pixels = [level] * 64
    files = {
        "png": content(grey(level)),
        "tiff": content(grey(level), "TIFF"),
        "big tiff": content(Image.frombytes("I;16B", (8, 8), struct.pack(">64H", *pixels)), "TIFF"),
        "pgm": b"P5 8 8 65535\n" + struct.pack(">64H", *pixels),
        "twelve bits": tiff(
            b"".join((level >> 4 << 12 | level >> 4).to_bytes(3, "big") for _ in range(32)),
            8,
            8,
            bits=12,
            photometric=1,
        ),
        "colour png": png((b"\0" + struct.pack(">H", level) * 24) * 8, 8, 8, 16, 2),
    }
    for name, file in files.items():
        top = 255 * (level >> 4) / 4095 if name == "twelve bits" else 255 * level / 65535
        # Colours of 16 bits are cut to their upper eight.
        slack = 1 if name == "colour png" else 0.5
        assert abs(rgb(file)[0] - top) <= slack, name
        assert len(set(rgb(file))) == 1


def test_netpbm_files_of_other_ranges_are_scaled():
    assert rgb(b"P2 2 2 1000\n500 500 500 500\n") == [128] * 3
    assert rgb(b"P6 2 2 100\n" + bytes([50, 100, 25] * 4)) == [128, 255, 64]
    assert rgb(b"P6 2 2 65535\n" + struct.pack(">12H", *[16384, 49152, 100] * 4)) == [64, 191, 0]
    assert rgb(b"P5 2 2 1023\n" + struct.pack(">4H", *[512] * 4)) == [128] * 3


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (content(grey(300, 32), "TIFF"), "32-bit or signed integers"),
        (content(Image.new("F", (8, 8), 0.5), "TIFF"), "floating-point numbers"),
        (content(Image.new("LAB", (8, 8)), "TIFF"), "Lab colours"),
        (tiff(bytes(128), 8, 8, bits=16, photometric=0), "of which 0 is white"),
        (tiff(bytes(128), 8, 8, bits=16, photometric=1, format=2), "32-bit or signed integers"),
        (
            content(picture(1), "TIFF", save_all=True, append_images=[picture(2)]),
            "a TIFF file of several pages",
        ),
        (
            png((b"\0" + b"\1\2" * 24) * 8, 8, 8, 16, 2, (b"tRNS", b"\1\2" * 3)),
            "colours of 16 bits of which one is transparent",
        ),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "no known image"),
        (content(picture(1), "ICO"), "no known image format"),
    ],
)
@pytest.mark.parametrize("loader", LOADERS)
def test_files_without_a_known_range_are_refused(loader, file, why, tmp_path):
    root = root_of(tmp_path, loader, file, "tif")
    with pytest.raises(ValueError, match=rf"x?\.tif: expected a readable image, got .*{why}"):
        loaded(root, loader)


WHITE, RED = [255] * 3, [200, 10, 20]


def transparent_files() -> dict[str, tuple[bytes, list[int]]]:
    """Files with transparent pixels, and the colour over white."""
    half = [round(c * 128 / 255 + 127) for c in RED]
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, *RED])
    nibble, crumb = b"\0" + b"\xff" * 4, b"\0" + b"\xff" * 2
    return {
        "gone": (content(Image.new("RGBA", (8, 8), (*RED, 0))), WHITE),
        "half": (content(Image.new("RGBA", (8, 8), (*RED, 128))), half),
        "opaque": (content(Image.new("RGBA", (8, 8), (*RED, 255))), RED),
        "grey": (content(Image.new("LA", (8, 8), (77, 0))), WHITE),
        "opaque grey": (content(Image.new("LA", (8, 8), (77, 255))), [77] * 3),
        "palette": (content(palette, transparency=1), WHITE),
        "other palette": (content(palette, transparency=0), RED),
        "palette of alphas": (content(palette, transparency=bytes([255, 128])), half),
        "one colour": (content(Image.new("RGB", (8, 8), (*RED,)), transparency=(*RED,)), WHITE),
        "other colour": (content(Image.new("RGB", (8, 8), (*RED,)), transparency=(1, 2, 3)), RED),
        "one level": (content(Image.new("L", (8, 8), 9), transparency=9), WHITE),
        "gif": (content(palette, "GIF", transparency=1), WHITE),
        "webp": (content(Image.new("RGBA", (8, 8), (*RED, 0)), "WEBP", lossless=True), WHITE),
        "16 bits": (png((b"\0" + b"\1\2" * 8) * 8, 8, 8, 16, 0, (b"tRNS", b"\1\2")), WHITE),
        "16 bits, other": (
            png((b"\0" + b"\1\2" * 8) * 8, 8, 8, 16, 0, (b"tRNS", b"\1\1")),
            [1] * 3,
        ),
        "4 bits": (png((b"\0" + b"\x55" * 4) * 8, 8, 8, 4, 0, (b"tRNS", b"\0\5")), WHITE),
        "4 bits, other": (png(nibble * 8, 8, 8, 4, 0, (b"tRNS", b"\0\5")), WHITE),
        "2 bits": (png((b"\0" + b"\x55" * 2) * 8, 8, 8, 2, 0, (b"tRNS", b"\0\1")), WHITE),
        "2 bits, other": (png((b"\0" + b"\x55" * 2) * 8, 8, 8, 2, 0, (b"tRNS", b"\0\3")), [85] * 3),
        "2 bits of white": (png(crumb * 8, 8, 8, 2, 0, (b"tRNS", b"\0\0")), WHITE),
        "1 bit": (png(b"\0\0" * 8, 8, 8, 1, 0, (b"tRNS", b"\0\0")), WHITE),
        "1 bit, other": (png(b"\0\0" * 8, 8, 8, 1, 0, (b"tRNS", b"\0\1")), [0] * 3),
    }


@pytest.mark.parametrize("name", transparent_files())
def test_transparent_pixels_are_laid_over_white(name):
    file, want = transparent_files()[name]
    assert np.abs(np.array(rgb(file)) - want).max() <= 1, rgb(file)


def test_other_kinds_of_pixels():
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, *RED])
    assert rgb(content(palette)) == RED
    assert rgb(content(Image.new("1", (8, 8), 1))) == WHITE
    # In a TIFF file, white may be zero.
    assert rgb(tiff(bytes([77] * 64), 8, 8, bits=8, photometric=0)) == [178] * 3
    # Cyan takes away red, black takes away all.
    for format in ("TIFF", "JPEG"):
        cmyk = rgb(content(Image.new("CMYK", (8, 8), (255, 0, 0, 51)), format))
        assert np.abs(np.array(cmyk) - [0, 204, 204]).max() <= 2
    for mode in ("YCbCr", "RGBX"):
        image = Image.new("RGB", (8, 8), (*RED,)).convert(mode)
        # Luma and chroma are whole numbers too.
        assert np.abs(np.array(rgb(content(image, "TIFF"))) - RED).max() <= 3


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue", "green")]
    for format in ("GIF", "WEBP", "PNG"):
        file = content(frames[0], format, save_all=True, append_images=frames[1:], duration=50)
        with Image.open(io.BytesIO(file)) as image:
            assert image.n_frames == 3
        assert np.abs(np.array(rgb(file)) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_stand_upright(loader, turn, tmp_path):
    # Corners of four colours tell all eight orientations apart.
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20, :20], pixels[:20, 20:], pixels[20:, :20] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    upright = Image.fromarray(pixels)
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[turn]
    metadata = Image.Exif()
    metadata[274] = turn
    for format, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif")):
        options = {"quality": 100, "lossless": True} if format == "WEBP" else {}
        file = content(stored, format, exif=metadata, **options)
        root = root_of(tmp_path / suffix, loader, file, suffix)
        got = loaded(root, loader, 16)
        corners = got[:, [2, 2, 13, 13], [2, 13, 2, 13]].T
        want = torch.tensor([[250, 0, 0], [0, 250, 0], [0, 0, 250], [0, 0, 0]])
        assert (corners.int() - want).abs().max() <= 8, format


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_a_turned_picture_that_is_not_square(format, loader, tmp_path):
    # Upright it is twice as high as wide; its centre is grey, its upper and lower ends are not.
    pixels = np.full((80, 40, 3), 100, np.uint8)
    pixels[:8], pixels[72:] = 0, 255
    # Columns tell a picture that is squeezed into its shape from one that is turned into it.
    pixels[:, :4] = 160
    metadata = Image.Exif()
    metadata[274] = 8
    stored = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_270)
    assert stored.size == (80, 40)
    file = content(stored, format, exif=metadata)
    got = loaded(root_of(tmp_path, loader, file, format.lower()), loader).int()
    assert (got[:, :, 2:] - 100).abs().max() <= 4
    assert got[:, :, 0].min() > 115


def test_training_views_stand_upright(tmp_path):
    # The left half of the upright picture is dark: mirroring moves it, turning would lay it down.
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, 32:] = 240
    metadata = Image.Exif()
    metadata[274] = 6
    stored = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    root = root_of(tmp_path, "imagefolder", content(stored, "JPEG", exif=metadata), "jpg")
    split = data.load("imagefolder", root=root, image_size=8, workers=0)
    views = data.source.Views(seed=0, first_step=0)
    for (image,) in split.train.pixels(torch.zeros(40, 1, dtype=torch.int64), "cpu", views=views):
        # Rows are alike, whatever the crop.
        assert image.float().std(1).max() <= 4


def test_a_size_that_changes_while_a_picture_is_decoded_is_refused(monkeypatch):
    file = content(Image.new("RGB", (8, 4)))
    with open_picture(file) as image:
        load = image.load

        def turned() -> None:
            load()
            image._size = (4, 8)

        monkeypatch.setattr(image, "load", turned)
        with pytest.raises(ValueError, match=r"\(4, 8\) pixels where the header says \(8, 4\)"):
            decoded(image)


def test_damaged_metadata_leave_the_picture_as_it_is_stored():
    file = content(picture(1), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert rgb(file)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF"])
def test_no_part_of_a_truncated_file_is_read(format):
    file = content(picture(3), format)
    with open_picture(file) as image:
        whole = decoded(image).image
    read = 0
    for length in range(0, len(file), max(1, len(file) // 60)):
        try:
            with open_picture(file[:length]) as image:
                found = decoded(image).image
        # Any type, as the loaders expect of it.
        except Exception:
            continue
        read += 1
        # Only bytes after the pixels may be absent.
        assert found.tobytes() == whole.tobytes(), length
    assert read <= 3


@pytest.mark.parametrize("loader", LOADERS)
def test_a_truncated_file_is_named(loader, tmp_path):
    file = encoded(1, format="PNG")
    root = root_of(tmp_path, loader, file[: len(file) // 2])
    with pytest.raises(ValueError, match=r"\.png: expected a readable image, got .*truncated"):
        loaded(root, loader)


@pytest.mark.parametrize(
    ("size", "why"),
    [
        ((4_000_000, 1), "4000000 x 1 pixels where sides of 1 : 100 are the limit"),
        ((1, 4_000_000), "1 x 4000000 pixels where sides of 1 : 100"),
        ((9000, 9000), "9000 x 9000 pixels where 80,000,000 are the most"),
        ((60000, 60000), "decompression bomb"),
    ],
)
@pytest.mark.parametrize("loader", LOADERS)
def test_gigantic_pictures_are_refused_by_their_headers(loader, size, why, tmp_path, monkeypatch):
    assert MAX_PIXELS == 80_000_000
    monkeypatch.setattr(Image.Image, "resize", lambda *_, **__: pytest.fail("resized"))
    root = root_of(tmp_path, loader, png(b"", *size, 8, 2))
    with pytest.raises(ValueError, match=rf"\.png: expected a readable image, got .*{why}"):
        loaded(root, loader)


@pytest.mark.parametrize("loader", LOADERS)
def test_gigantic_results_are_refused(loader, tmp_path):
    root = root_of(tmp_path, loader, content(Image.new("RGB", (500, 10))))
    assert loaded(root, loader, 200).shape == (3, 200, 200)
    with pytest.raises(ValueError, match=r"\.png: .* pixels after resizing where 80,000,000 are"):
        loaded(root, loader, 1500)
    with pytest.raises(ValueError, match="^image_size: expected at most 4096, got 1000000$"):
        loaded(root, loader, 10**6)


@pytest.mark.parametrize("loader", ["folder", "imagefolder"])
def test_gigantic_files_are_not_read(loader, tmp_path):
    root = root_of(tmp_path, loader, encoded(1, format="PNG"))
    # A file with a hole takes no room.
    os.truncate(root / "val" / "a" / "x.png", MAX_BYTES + 1)
    with pytest.raises(
        ValueError, match=r"a/x\.png: expected a readable image, got .* bytes where"
    ):
        loaded(root, loader)


def test_a_short_sweep_loses_nothing():
    found = sweep(60, seed=0)
    assert found["tried"] == 60 and found["lost"] == 0
    assert found["survived"] > 10 and found["refused"] > 10
