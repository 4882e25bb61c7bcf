"""glyphs100: the drawing, the classes, what varies, and that none of it changes by itself."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch

from mclfast import data
from mclfast.data import Augmentation, Dataset, channel_stats
from mclfast.data.sets import glyphs, strokes
from mclfast.data.sets.glyphs import draw, glyph_classes, load_glyphs, plain_picture


@pytest.fixture(scope="module")
def small() -> Dataset:
    return load_glyphs(3, test_per_class=2)


# ---------------------------------------------------------------- drawing


def test_distance_is_that_of_the_nearest_point():
    rng = np.random.RandomState(0)
    lines = rng.uniform(-2, 9, (2, 2, 3, 2)).astype(np.float32)
    lines[1, 1, 2] = lines[1, 1, 1]  # a piece of no length
    found = strokes.stroke_distance(lines, 8)
    share = np.linspace(0, 1, 2001)[:, None]
    for image in range(2):
        dense = np.concatenate(
            [
                a + share * (b - a)
                for line in lines[image]
                for a, b in zip(line[:-1], line[1:], strict=True)
            ]
        )
        for y in range(8):
            for x in range(8):
                expected = np.hypot(*(dense - (x, y)).T).min()
                assert found[image, y, x] == pytest.approx(expected, abs=4e-3)


def test_bows_are_quadratic_curves():
    control = np.array([[0, 0], [1, 2], [2, 0]], np.float32)
    points = strokes.bezier_points(control, 4)
    assert points.tolist() == [[0, 0], [0.5, 0.75], [1, 1], [1.5, 0.75], [2, 0]]


def test_coverage_of_a_line():
    """A vertical line of 2 px through a pixel centre: one whole pixel, two halves."""
    line = np.array([[[[3, -9], [3, 20]]]], np.float32)
    ink = strokes.coverage(strokes.stroke_distance(line, 8), np.full(1, 2, np.float32))
    assert ink[0, 4].tolist() == [0, 0, 0.5, 1, 0.5, 0, 0, 0]


def test_smooth_field_is_bilinear():
    grid = np.random.RandomState(1).rand(2, 5, 5).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(grid)[:, None], size=(32, 32), mode="bilinear", align_corners=True
    )
    found = torch.from_numpy(strokes.smooth_field(grid, 32))
    torch.testing.assert_close(found, expected[:, 0], rtol=0, atol=1e-5)


# ---------------------------------------------------------------- classes


def test_families_of_distinct_look_alikes():
    pictures = np.stack([plain_picture(c) for c in glyph_classes()]).reshape(100, -1)
    assert pictures.max() == 1
    distances = np.sqrt(((pictures[:, None] - pictures[None]) ** 2).sum(-1))
    within = distances.reshape(20, 5, 20, 5)[range(20), :, range(20)]
    apart = ~np.eye(5, dtype=bool)
    np.fill_diagonal(distances, np.inf)
    # For scale: the mean norm of a picture is about 8.
    assert distances.min() > 2.5
    assert within[:, apart].mean() < 0.75 * distances[np.isfinite(distances)].mean()
    nearest = distances.argmin(1)
    assert (nearest // 5 == np.arange(100) // 5).mean() > 0.9


def test_classes_are_strokes_in_the_box():
    classes = glyph_classes()
    assert len(classes) == 100
    for control in classes:
        assert control.dtype == np.float32 and control.shape in ((3, 3, 2), (4, 3, 2))
        assert np.abs(control[:, [0, 2]]).max() <= 1
        assert np.hypot(*(control[:, 0] - control[:, 2]).T).min() > 0.2


def test_members_differ_from_the_first_in_one_stroke():
    classes = glyph_classes()
    for first in range(0, 100, 5):
        for member in classes[first + 1 : first + 5]:
            changed = (member != classes[first]).any((1, 2))
            assert changed.sum() == 1


# ---------------------------------------------------------------- the set


def test_shapes_and_balance(small):
    for split, count in ((small.train, 3), (small.test, 2)):
        assert split.images.shape == (100 * count, 3, 32, 32)
        assert split.images.dtype == torch.uint8
        assert split.labels.bincount().tolist() == [count] * 100
    assert len(set(small.class_names)) == 100
    assert small.class_names[:6] == ("00a", "00b", "00c", "00d", "00e", "01a")
    assert small.augmentation == Augmentation(pad=2)


def test_by_name(small):
    loaded = data.load("glyphs100", train_per_class=3, image_size=32)
    assert torch.equal(loaded.train.images, small.train.images)
    assert loaded.test.labels.bincount().tolist() == [20] * 100
    with pytest.raises(ValueError, match="image_size: expected 32 or None for 'glyphs100'"):
        data.load("glyphs100", image_size=64)


def test_default_counts(monkeypatch):
    counts = []

    def drawn(_: np.ndarray, count: int, stream: tuple[int, ...]) -> np.ndarray:
        counts.append(count)
        return np.zeros((count, 3, 32, 32), np.uint8)

    monkeypatch.setattr(glyphs, "draw", drawn)
    data.load("glyphs100")
    assert counts == [50] * 100 + [20] * 100


def test_the_images_never_change():
    """Byte for byte: the drawing is arithmetic that IEEE 754 defines to the last bit."""
    images = np.stack([draw(glyph_classes()[k], 2, (1, 0, k)) for k in (0, 37, 99)])
    assert hashlib.sha256(images.tobytes()).hexdigest().startswith("e0b4b135f861ec77")


def test_fewer_images_are_a_part_of_more(small):
    more = load_glyphs(7, test_per_class=4)
    for few, many, count in ((small.train, more.train, 7), (small.test, more.test, 4)):
        per_class = len(few) // 100
        kept = many.images.view(100, count, 3, 32, 32)[:, :per_class].flatten(0, 1)
        assert torch.equal(kept, few.images)


def test_another_seed_draws_other_training_images(small):
    other = load_glyphs(3, test_per_class=2, seed=1)
    same = (other.train.images == small.train.images).flatten(1).float().mean(1)
    assert same.max() < 0.2
    assert torch.equal(other.test.images, small.test.images)


def test_no_test_image_is_trained_on(small):
    images = torch.cat((small.train.images, small.test.images)).flatten(1)
    assert len(images.unique(dim=0)) == 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_per_class": 0}, "^train_per_class: expected at least 1, got 0"),
        ({"test_per_class": -1}, "^test_per_class: expected at least 1, got -1"),
        ({"seed": -1}, r"^seed: expected a value in \[0, 2\*\*32\), got -1"),
        ({"seed": 2**32}, "^seed: .*4294967296"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_glyphs(**arguments)


def test_statistics_are_those_of_the_images(small):
    mean, std = channel_stats(torch.cat((small.train.images, small.test.images)))
    assert small.mean == pytest.approx(mean, abs=0.02)
    assert small.std == pytest.approx(std, abs=0.02)


# ---------------------------------------------------------------- what varies


@pytest.fixture(scope="module")
def many() -> np.ndarray:
    """[300, 3, 32, 32] in [0, 1] of one class, and no others."""
    return draw(glyph_classes()[7], 300, (1, 0, 7)) / 255


def test_placement_varies_as_documented():
    control = glyph_classes()[3]
    uniform = np.random.RandomState(5).random_sample((4000, 160))
    lines = glyphs._place(control, glyphs._Numbers(uniform))
    # The middle of the box is where the glyph's own origin went: undo nothing but the position.
    origin = np.zeros_like(control)
    middle = glyphs._place(origin, glyphs._Numbers(uniform)).mean((1, 2))
    for axis in range(2):
        shift = middle[:, axis] - 15.5
        assert -3 < shift.min() < -1.5 and 1.5 < shift.max() < 3
    assert lines.min() > -6 and lines.max() < 38
    # A stick along y without bow: its angle is the rotation with the shear.
    stick = np.array([[[0, -1], [0, 0], [0, 1]]], np.float32)
    ends = glyphs._place(stick, glyphs._Numbers(uniform))[:, 0]
    dx, dy = (ends[:, -1] - ends[:, 0]).T
    angle = np.degrees(np.arctan2(dx, dy))
    largest = 20 + math.degrees(math.atan(0.25))
    assert 0.7 * largest < angle.max() < largest + 6
    assert -0.7 * largest > angle.min() > -largest - 6


def test_background_varies_and_the_ink_is_lighter(many):
    grey = many.mean((1, 2, 3))
    assert 0.25 < np.percentile(grey, 90) - np.percentile(grey, 10) < 0.4
    # The glyph covers the middle more often than the edge, and is lighter there.
    ink = plain_picture(glyph_classes()[7])
    weight = ink / ink.sum() - (1 - ink) / (1 - ink).sum()
    contrast = (many.mean(1) * weight).sum((1, 2))
    assert (contrast > 0).mean() > 0.9
    chroma = (many - many.mean(1, keepdims=True)).std((2, 3)).mean(1)
    assert chroma.mean() > 0.03


def test_noise_varies(many):
    rough = np.abs(np.diff(many, axis=3))
    level = np.median(rough.reshape(300, -1), axis=1)
    assert np.percentile(level, 90) > 3 * np.percentile(level, 10) > 0


def test_half_of_the_images_are_occluded():
    size = 400
    uniform = np.random.RandomState(6).random_sample((size, 160))
    pixels = np.full((size, 3, 32, 32), -1, np.float32)
    glyphs._occlude(pixels, glyphs._Numbers(uniform))
    hidden = pixels[:, 0] >= 0
    area = hidden.sum((1, 2))
    assert 0.4 < (area > 0).mean() < 0.6
    assert 9 <= area[area > 0].min() and area.max() <= 121
    rows, columns = hidden.any(2).sum(1), hidden.any(1).sum(1)
    assert (rows * columns == area).all()
