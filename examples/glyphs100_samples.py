"""A picture of the data set glyphs100: some training images of each of its 100 classes.

    python examples/glyphs100_samples.py results/glyphs100/samples.png --samples 4

A row shows a family of five look-alike classes, the samples of a class side by side.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from mclfast.data.sets.glyphs import FAMILIES, IMAGE_SIZE, MEMBERS, load_glyphs

_GAP = 6  # pixels between classes


def contact_sheet(samples: int) -> Image.Image:
    """20 families of rows, 5 classes of `samples` images in each."""
    images = load_glyphs(samples, test_per_class=1).train.images
    tiles = images.view(FAMILIES, MEMBERS, samples, *images.shape[1:]).permute(0, 1, 2, 4, 5, 3)
    width = samples * IMAGE_SIZE
    sheet = Image.new("RGB", (MEMBERS * (width + _GAP) - _GAP, FAMILIES * IMAGE_SIZE), "white")
    for family in range(FAMILIES):
        for member in range(MEMBERS):
            row = tiles[family, member].transpose(0, 1).reshape(IMAGE_SIZE, width, 3)
            corner = (member * (width + _GAP), family * IMAGE_SIZE)
            sheet.paste(Image.fromarray(row.numpy()), corner)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description="draws a contact sheet of glyphs100")
    parser.add_argument("out", type=Path, help="PNG file to write")
    parser.add_argument("--samples", type=int, default=8, help="images of each class (default: 8)")
    parser.add_argument(
        "--colours", type=int, default=64, help="size of the palette, at most 256 (default: 64)"
    )
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    # Noise does not compress: few colours keep the file small.
    sheet = contact_sheet(given.samples).quantize(given.colours, dither=Image.Dither.NONE)
    sheet.save(given.out, optimize=True)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"glyphs100_samples: error: {error}")
