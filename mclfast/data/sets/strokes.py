"""Draws antialiased strokes and smooth noise on small images, many images at once.

Every machine draws the same bytes: the code uses only +, -, *, /, sqrt and comparisons of NumPy
arrays, whose results IEEE 754 defines to the last bit, and NumPy does not fuse these operations.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def bezier_points(control: Floats, pieces: int) -> Floats:
    """Quadratic Bezier curves as polylines.

    Args:
        control: start, control point and end of each curve, [..., 3, 2].
        pieces: number of straight pieces of each polyline.

    Returns:
        [..., pieces + 1, 2].
    """
    t = (np.arange(pieces + 1, dtype=np.float32) / np.float32(pieces))[:, None]
    start, middle, end = (control[..., None, i, :] for i in range(3))
    one = np.float32(1) - t
    return one * one * start + (t + t) * one * middle + t * t * end


def stroke_distance(lines: Floats, size: int) -> Floats:
    """Distance in pixels of every pixel centre to the nearest polyline of its image.

    Args:
        lines: polylines [N, strokes, points, 2], x to the right and y down, with the centre of
            pixel (0, 0) at the origin.
        size: side of the square images in pixels.

    Returns:
        [N, size, size].
    """
    along = np.arange(size, dtype=np.float32)
    nearest = np.full((len(lines), size, size), np.inf, dtype=np.float32)
    starts = lines[:, :, :-1].reshape(len(lines), -1, 2)
    ends = lines[:, :, 1:].reshape(len(lines), -1, 2)
    for piece in range(starts.shape[1]):
        px, py = starts[:, piece, 0, None], starts[:, piece, 1, None]  # [N, 1]
        dx, dy = ends[:, piece, 0, None] - px, ends[:, piece, 1, None] - py
        x, y = along - px, along - py  # [N, size]
        squared = dx * dx + dy * dy
        # A piece of length 0 is a point: any finite scale will do.
        scale = np.float32(1) / np.where(squared > 0, squared, np.float32(1))
        # Position of the foot of the perpendicular, [N, size, size].
        foot = (x * (dx * scale))[:, None, :] + (y * (dy * scale))[:, :, None]
        np.clip(foot, 0, 1, out=foot)
        across = x[:, None, :] - foot * dx[:, :, None]
        down = y[:, :, None] - foot * dy[:, :, None]
        across *= across
        down *= down
        across += down
        np.minimum(nearest, across, out=nearest)
    return np.sqrt(nearest, out=nearest)


def coverage(distance: Floats, width: Floats) -> Floats:
    """Share of each pixel [N, size, size] that strokes of ``width`` [N] pixels cover, in [0, 1]."""
    return np.clip(np.float32(0.5) * width[:, None, None] + np.float32(0.5) - distance, 0, 1)


def smooth_field(grid: Floats, size: int) -> Floats:
    """Interpolates coarse values [N, g, g] bilinearly over the image, [N, size, size]."""
    cells = grid.shape[1] - 1
    position = np.arange(size, dtype=np.float32) * np.float32(cells) / np.float32(size - 1)
    before = np.minimum(position.astype(np.int64), cells - 1)
    share = position - before.astype(np.float32)
    rows = _between(grid[:, before], grid[:, before + 1], share[:, None])  # [N, size, g]
    return _between(rows[:, :, before], rows[:, :, before + 1], share)


def _between(a: Floats, b: Floats, share: Floats) -> Floats:
    return a + share * (b - a)
