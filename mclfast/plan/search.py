"""The largest size that fits, along lines through two rehearsals."""

from __future__ import annotations

from collections.abc import Sequence

#: What no search goes beyond.
MOST = 10**6

#: Two sizes, and what they need.
Line = tuple[tuple[int, int], tuple[int, int]]


def largest(lines: Sequence[Line], limit: int) -> int:
    """The largest size in 0 to :data:`MOST` at which every need is within a limit.

    Activations, parameters and the state of the optimiser grow in proportion to images and to
    peers. The losses compare each peer with every other one, but keep so little that a line through
    two cohorts is 1 % off at eight times their size.

    Args:
        lines: of each need, two points (size, bytes); it grows along a straight line.
        limit: bytes.
    """
    low, high = 0, MOST
    while low < high:
        middle = (low + high + 1) // 2
        if all(_on(line, middle) <= limit for line in lines):
            low = middle
        else:
            high = middle - 1
    return low


def _on(line: Line, size: int) -> float:
    (x0, y0), (x1, y1) = line
    return y0 + (y1 - y0) * (size - x0) / (x1 - x0)
