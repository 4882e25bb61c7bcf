"""Methods that distil between logits: their losses, gradients, schedules and whole runs."""

from __future__ import annotations

import math

import pytest

from mclfast.schedule import sigmoid_rampup


@pytest.mark.parametrize(
    ("epoch", "length", "expected"),
    [
        (0, 80, math.exp(-5)),
        (-3, 80, math.exp(-5)),
        (40, 80, math.exp(-1.25)),
        (79, 80, math.exp(-5 / 6400)),
        (80, 80, 1.0),
        (10_000, 80, 1.0),
        (0, 1, math.exp(-5)),
        (1, 1, 1.0),
        (0, 0, 1.0),
    ],
)
def test_sigmoid_rampup(epoch, length, expected):
    assert sigmoid_rampup(epoch, length) == pytest.approx(expected, rel=1e-12)


def test_sigmoid_rampup_rises():
    values = [sigmoid_rampup(epoch, 20) for epoch in range(21)]
    assert values == sorted(set(values))
