"""glyphs100: drawn signs of 100 classes in 20 families of look-alikes, for small machines.

A class is defined by the control points of a few strokes, which are lines or bows. The five classes
of a family differ in one or two strokes: four of them are the first one with a stroke that bends
otherwise or ends elsewhere. Every image is drawn anew. There are therefore as many training images
as one asks for, and nothing is read or downloaded.

Images of a class differ in the following, uniformly within these ranges (in pixels of the 32 x 32
image):

- position +-2 px across and down; size 0.75 to 1.1 of a glyph 20 px wide; rotation +-20 degrees;
  shear +-0.25; ratio of width to height 0.85 to 1.15
- hand: every control point of every stroke is moved by +-0.8 px on its own
- stroke width 1.2 to 2.8 px
- background: a grey of 0.05 to 0.45 with channels +-0.15, a linear gradient of up to +-0.15 from
  edge to edge, and a smooth texture of up to +-0.08 in each channel
- ink: lighter than the background's grey by 0.4 to 0.7, channels +-0.15
- a stray line of 1 px in the colour of the ink on half of the images
- an occluding rectangle of any colour, sides 4 to 10 px, on half of the images
- noise of each pixel and channel, standard deviation 0.01 to 0.04

For scale, a lone ResNet-20 (``mclfast train --method baseline --cohort resnet20 --data glyphs100
--train-per-class 25 --epochs 12 --warmup-epochs 2 --batch-size 64 --images-per-class 2 --lr 0.8
--amp bf16``, seed 0; two minutes of one core) classifies 66.9 % of the test images correctly. With
8 epochs it reaches 41.0 %, and with 8 epochs of the default 50 images a class 85.6 %. A lone
ResNet-8 reaches 64.3 % with 8 epochs of 25 images a class. Without a warm-up, or at a smaller
learning rate, the loss stays near that of chance (4.6) for longer. How fast training starts differs
from run to run, so compare over several seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import RandomState

from mclfast.data.augment import Augmentation
from mclfast.data.dataset import Dataset, ImageSet
from mclfast.data.sets.strokes import Floats, bezier_points, coverage, smooth_field, stroke_distance

IMAGE_SIZE = 32
FAMILIES, MEMBERS = 20, 5
NUM_CLASSES = FAMILIES * MEMBERS
TRAIN_PER_CLASS, TEST_PER_CLASS = 50, 20

_PIECES = 6  # straight pieces of a bow
_MOST_STROKES = 4
_PIXELS_PER_UNIT = 10  # the glyph's box is [-1, 1] x [-1, 1]
_CLASS_SEED = 100
# Number of pixels that must differ clearly between two members of a family.
_LEAST_DIFFERENCE = 10
# Random numbers drawn for one image: a few more than are used, so that a further use leaves the
# others as they are.
_NUMBERS = 160
# First number of the seed of a stream, so that training and test images differ.
_TRAIN, _TEST = 1, 2
# Rounded statistics of 50 images of every class; fixed, so that they do not depend on the number
# of images.
_MEAN, _STD = (0.3, 0.3, 0.3), (0.205, 0.205, 0.205)


def load_glyphs(
    train_per_class: int = TRAIN_PER_CLASS, *, test_per_class: int = TEST_PER_CLASS, seed: int = 0
) -> Dataset:
    """The set "glyphs100": 100 classes of drawn signs; the module's description says how they vary.

    Args:
        train_per_class: number of training images of each class, at least 1. A smaller training
            set is a part of a larger one.
        test_per_class: number of test images of each class, at least 1.
        seed: seed of the training images. Classes and test images are the same for all seeds.

    Returns:
        The data set, with images uint8 [N, 3, 32, 32], ordered by class.

    Raises:
        ValueError: a number of images is below 1, or the seed is outside [0, 2**32).
    """
    counts = {"train_per_class": train_per_class, "test_per_class": test_per_class}
    for argument, value in counts.items():
        if value < 1:
            raise ValueError(f"{argument}: expected at least 1, got {value}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected a value in [0, 2**32), got {seed}")
    return Dataset(
        name="glyphs100",
        train=_split(train_per_class, (_TRAIN, seed)),
        test=_split(test_per_class, (_TEST, 0)),
        num_classes=NUM_CLASSES,
        class_names=tuple(f"{f:02}{chr(ord('a') + m)}" for f, m in _class_numbers()),
        mean=_MEAN,
        std=_STD,
        # No flips: a mirrored sign belongs to no class.
        augmentation=Augmentation(pad=2),
    )


def glyph_classes() -> list[Floats]:
    """Strokes [strokes, 3, 2] of every class: start, control point and end in a box of +-1."""
    rng = RandomState(_CLASS_SEED)
    return [glyph for _ in range(FAMILIES) for glyph in _family(rng)]


def draw(strokes: Floats, count: int, stream: tuple[int, ...]) -> np.ndarray:
    """Draws ``count`` images of one class.

    Args:
        strokes: strokes [strokes, 3, 2] of the class, as given by ``glyph_classes``.
        count: number of images; a smaller number gives the first images of a larger one.
        stream: integers that seed the random numbers.

    Returns:
        uint8 [count, 3, 32, 32].
    """
    # NumPy promises that these legacy streams never change.
    shape = _Numbers(RandomState([*stream, 0]).random_sample((count, _NUMBERS)))
    raw = RandomState([*stream, 1]).bytes(count * 3 * IMAGE_SIZE**2 * 4)
    size = IMAGE_SIZE

    lines = _place(strokes, shape)
    ink = coverage(stroke_distance(lines, size), shape.between(1.2, 2.8))
    stray = shape.between(0, size, 1, 2, 2)
    is_stray = shape.between(0, 1) < 0.5
    stray_ink = coverage(stroke_distance(stray, size), np.ones(count, np.float32))
    ink = np.maximum(ink, stray_ink * is_stray[:, None, None])[:, None]

    grey = shape.between(0.05, 0.45)
    contrast = shape.between(0.4, 0.7)
    ground = grey[:, None] + shape.between(-0.15, 0.15, 3)
    colour = (grey + contrast)[:, None] + shape.between(-0.15, 0.15, 3)
    slope = shape.between(-0.075, 0.075, 2)
    edge = np.arange(size, dtype=np.float32) * np.float32(2 / (size - 1)) - np.float32(1)
    gradient = slope[:, :1, None] * edge[:, None] + slope[:, 1:, None] * edge
    strength = shape.between(0, 0.08)
    texture = smooth_field(shape.between(-1, 1, 3, 5, 5).reshape(-1, 5, 5), size)
    texture = texture.reshape(count, 3, size, size) * strength[:, None, None, None]
    pixels = ground[:, :, None, None] + gradient[:, None] + texture
    pixels += ink * (colour[:, :, None, None] - pixels)

    _occlude(pixels, shape)
    amount = shape.between(0.01, 0.04)
    # The sum of four bytes is nearly normal, and the same on every machine; it is scaled to a
    # standard deviation of one.
    total = np.frombuffer(raw, np.uint8).reshape(count, 3, size, size, 4).astype(np.int32)
    total = total[..., 0] + total[..., 1] + total[..., 2] + total[..., 3]
    noise = (total - 510).astype(np.float32) * np.float32(1 / 147.8)
    pixels += noise * amount[:, None, None, None]
    return np.rint(np.clip(pixels, 0, 1) * np.float32(255)).astype(np.uint8)


class _Numbers:
    """Hands out the random numbers of all images, column by column."""

    def __init__(self, uniform: np.ndarray) -> None:
        self._uniform = uniform
        self._used = 0

    def between(self, low: float, high: float, *shape: int) -> Floats:
        """[N, *shape] in [low, high)."""
        start = self._used
        self._used += int(np.prod(shape, dtype=int))
        columns = self._uniform[:, start : self._used]
        if self._used > self._uniform.shape[1]:
            raise AssertionError(f"an image draws more than {self._uniform.shape[1]} numbers")
        return (low + (high - low) * columns).astype(np.float32).reshape(-1, *shape)


def _place(strokes: Floats, shape: _Numbers) -> Floats:
    """The strokes of N images as polylines [N, strokes, points, 2], moved at random.

    Args:
        strokes: strokes [strokes, 3, 2] of the class.
        shape: random numbers of the images.
    """
    # As many numbers as the class with the most strokes needs, so that all use the same columns.
    hand = shape.between(-0.08, 0.08, _MOST_STROKES, 3, 2)[:, : len(strokes)]
    points = bezier_points(strokes + hand, _PIECES)
    x, y = points[..., 0], points[..., 1]

    def per_image(low: float, high: float) -> Floats:
        return shape.between(low, high)[:, None, None]

    aspect, shear = per_image(0.85, 1.15), per_image(-0.25, 0.25)
    x = aspect * x + shear * y
    # Rotates by twice the angle whose tangent is t, without a sine, which differs between machines.
    t = per_image(-0.1763, 0.1763)
    scale = per_image(0.75, 1.1) * np.float32(_PIXELS_PER_UNIT) / (np.float32(1) + t * t)
    cos, sin = (np.float32(1) - t * t) * scale, (t + t) * scale
    middle = np.float32((IMAGE_SIZE - 1) / 2)
    across = cos * x - sin * y + (middle + per_image(-2, 2))
    down = sin * x + cos * y + (middle + per_image(-2, 2))
    return np.stack((across, down), -1)


def _occlude(pixels: Floats, shape: _Numbers) -> None:
    """Paints a rectangle over half of the images, in place."""
    position = np.arange(IMAGE_SIZE, dtype=np.float32)
    is_hidden = shape.between(0, 1)[:, None] < 0.5
    inside = []
    for _ in range(2):
        centre, side = shape.between(4, IMAGE_SIZE - 4), shape.between(4, 10)
        away = np.abs(position - centre[:, None])
        inside.append((away < side[:, None] * np.float32(0.5)) & is_hidden)
    rectangle = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    colour = shape.between(0, 1, 3)[:, :, None, None]
    np.copyto(pixels, colour, where=rectangle)


@dataclass(frozen=True)
class _Stroke:
    """A line or bow in the box of +-1.

    Attributes:
        start: first end (x, y).
        end: second end (x, y).
        bend: distance of the control point from the middle of the line, as a share of its length.
    """

    start: tuple[float, float]
    end: tuple[float, float]
    bend: float

    def control(self) -> list[tuple[float, float]]:
        (ax, ay), (bx, by) = self.start, self.end
        middle = ((ax + bx) / 2 - self.bend * (by - ay), (ay + by) / 2 + self.bend * (bx - ax))
        return [self.start, middle, self.end]


def plain_picture(strokes: Floats) -> Floats:
    """The glyph itself, in strokes of 2 px, as the share of ink [32, 32] of each pixel."""
    middle = np.float32((IMAGE_SIZE - 1) / 2)
    lines = bezier_points(strokes, _PIECES) * np.float32(_PIXELS_PER_UNIT) + middle
    return coverage(stroke_distance(lines[None], IMAGE_SIZE), np.full(1, 2, np.float32))[0]


def _family(rng: RandomState) -> list[Floats]:
    """Strokes of the members of a family: a glyph, and copies of it with one change each."""
    base = _prototype(rng)
    order = rng.permutation(len(base)).tolist()
    members = [_as_array(base)]
    change = -1
    while len(members) < MEMBERS:
        change += 1
        which = order[change % len(base)]
        altered = (_moved if rng.randint(2) else _bent)(base[which], rng)
        member = _as_array([*base[:which], altered, *base[which + 1 :]])
        # A stroke may move along another one, where the change cannot be seen.
        if all(_differing_pixels(member, other) >= _LEAST_DIFFERENCE for other in members):
            members.append(member)
    return members


def _as_array(glyph: list[_Stroke]) -> Floats:
    return np.array([stroke.control() for stroke in glyph], np.float32)


def _differing_pixels(one: Floats, other: Floats) -> int:
    return int((np.abs(plain_picture(one) - plain_picture(other)) > 0.5).sum())


def _prototype(rng: RandomState) -> list[_Stroke]:
    """Three or four connected strokes between the nodes of a 3 x 3 grid."""
    nodes = [
        (x + _uniform(rng, -0.15, 0.15), y + _uniform(rng, -0.15, 0.15))
        for y in (-0.8, 0.0, 0.8)
        for x in (-0.8, 0.0, 0.8)
    ]
    strokes: list[_Stroke] = []
    used, pairs = [int(rng.randint(9))], set()
    wanted = int(rng.randint(_MOST_STROKES - 1, _MOST_STROKES + 1))
    while len(strokes) < wanted:
        a, b = used[rng.randint(len(used))], int(rng.randint(9))
        bend = 0.0 if rng.randint(2) else _uniform(rng, 0.25, 0.6) * (1 - 2 * rng.randint(2))
        if a == b or frozenset((a, b)) in pairs:
            continue
        pairs.add(frozenset((a, b)))
        used.append(b)
        strokes.append(_Stroke(nodes[a], nodes[b], bend))
    return _filling_the_box(strokes)


def _filling_the_box(strokes: list[_Stroke]) -> list[_Stroke]:
    """Centres and scales strokes so that their ends reach from -0.85 to 0.85 on the longer side."""
    ends = [point for stroke in strokes for point in (stroke.start, stroke.end)]
    low, high = ([f(axis) for axis in zip(*ends, strict=True)] for f in (min, max))
    factor = 1.7 / max(high[0] - low[0], high[1] - low[1])

    def fitted(point: tuple[float, float]) -> tuple[float, float]:
        x, y = ((v - (a + b) / 2) * factor for v, a, b in zip(point, low, high, strict=True))
        return x, y

    return [_Stroke(fitted(s.start), fitted(s.end), s.bend) for s in strokes]


def _bent(stroke: _Stroke, rng: RandomState) -> _Stroke:
    """The stroke with another bend: a line becomes a bow, a bow becomes flatter or turns over."""
    dx, dy = (b - a for a, b in zip(stroke.start, stroke.end, strict=True))
    # A short stroke bends as far as a long one, so that no two classes look the same.
    amount = _uniform(rng, 0.45, 0.6) / max(abs(dx), abs(dy))
    sign = 1 - 2 * rng.randint(2) if stroke.bend == 0 else (-1 if stroke.bend > 0 else 1)
    return _Stroke(stroke.start, stroke.end, stroke.bend + sign * amount)


def _moved(stroke: _Stroke, rng: RandomState) -> _Stroke:
    """The stroke with its end moved by 0.4 units within the box."""
    while True:
        dx, dy = ((0.4, 0.0), (-0.4, 0.0), (0.0, 0.4), (0.0, -0.4))[rng.randint(4)]
        end = (stroke.end[0] + dx, stroke.end[1] + dy)
        length = max(abs(end[0] - stroke.start[0]), abs(end[1] - stroke.start[1]))
        if max(abs(end[0]), abs(end[1])) <= 1 and length > 0.3:
            return _Stroke(stroke.start, end, stroke.bend)


def _uniform(rng: RandomState, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random_sample())


def _class_numbers() -> list[tuple[int, int]]:
    return [(family, member) for family in range(FAMILIES) for member in range(MEMBERS)]


def _split(per_class: int, stream: tuple[int, int]) -> ImageSet:
    images = [
        draw(strokes, per_class, (*stream, label)) for label, strokes in enumerate(glyph_classes())
    ]
    labels = torch.arange(NUM_CLASSES).repeat_interleave(per_class)
    return ImageSet(torch.from_numpy(np.concatenate(images)), labels)
