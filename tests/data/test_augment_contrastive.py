"""mclfast.data.augment_contrastive against definitions for one image."""

from __future__ import annotations

import colorsys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mclfast.data import augment_contrastive as module
from mclfast.data.augment import prepare
from mclfast.data.augment_contrastive import (
    CONTRASTIVE,
    ContrastiveAugmentation,
    augment_contrastive,
    random_resized_crop,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NOTHING = ContrastiveAugmentation(
    brightness=0, contrast=0, saturation=0, hue=0, grey=0, crop=False, flip=False
)


def images(batch: int = 12, channels: int = 3, size: int = 10) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    shape = (batch, channels, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def run(x: Tensor, augmentation: ContrastiveAugmentation, seed: int = 0) -> Tensor:
    """Without normalisation: values in [0, 1]."""
    c = x.shape[1]
    return augment_contrastive(x, augmentation, mean=(0.0,) * c, std=(1.0,) * c, seed=seed)


def unit(x: Tensor) -> Tensor:
    return x.float() / 255


@pytest.mark.parametrize("version", CONTRASTIVE)
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_function_of_the_seed(version, channels):
    x = images(channels=channels)
    kept = x.clone()
    first, again, other = (run(x, CONTRASTIVE[version], seed) for seed in (1, 1, 2))
    assert torch.equal(x, kept) and torch.equal(first, again)
    assert first.shape == x.shape and first.dtype == torch.float32
    assert first.min() > -1e-5 and first.max() < 1 + 1e-5
    assert ((first - other).abs().amax((1, 2, 3)) > 0).all()


def test_normalises_as_evaluation_does():
    x = images()
    got = augment_contrastive(x, NOTHING, mean=MEAN, std=STD, seed=0)
    torch.testing.assert_close(got, prepare(x, MEAN, STD), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("min_area", [0.2, 0.9])
def test_crops_are_boxes_resized(min_area):
    # Coordinates as pixels: the box can be read off.
    size, batch = 32, 600
    ramp = torch.arange(size).float()
    x = torch.stack([ramp.expand(size, size), ramp[:, None].expand(size, size)])
    x = x.expand(batch, -1, -1, -1).contiguous()
    out = random_resized_crop(x, min_area, torch.Generator().manual_seed(0))
    left, right = out[:, 0, 0, 0].round(), out[:, 0, 0, -1].round()
    top, bottom = out[:, 1, 0, 0].round(), out[:, 1, -1, 0].round()
    for i in range(60):
        box = x[i : i + 1, :, int(top[i]) : int(bottom[i]) + 1, int(left[i]) : int(right[i]) + 1]
        want = F.interpolate(box, (size, size), mode="bilinear", align_corners=False)
        torch.testing.assert_close(out[i : i + 1], want, rtol=1e-4, atol=1e-3)
    width, height = right - left + 1, bottom - top + 1
    share = width * height / size**2
    assert share.min() > min_area - 0.05 and share.max() <= 1
    assert share.max() > 0.97 and share.min() < min_area + 0.05
    assert (width / height).log().abs().max() < 0.29 + 0.1
    if min_area < 0.5:
        assert abs(float(share.mean()) - 0.58) < 0.04
        assert left.min() == 0 and right.max() == size - 1
        assert top.min() == 0 and bottom.max() == size - 1


def test_flips_half_of_the_images():
    x = images(400, size=4)
    out = run(x, replace(NOTHING, flip=True))
    plain = (out - unit(x)).abs().amax((1, 2, 3)) < 1e-5
    want = torch.where(plain[:, None, None, None], unit(x), unit(x).flip(-1))
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert 150 < int(plain.sum()) < 250


def test_greys_a_fifth():
    x = images(500, size=4)
    out = run(x, replace(NOTHING, grey=0.2))
    r, g, b = unit(x).unbind(1)
    luma = (0.299 * r + 0.587 * g + 0.114 * b)[:, None].expand_as(out)
    is_grey = (out - luma).abs().amax((1, 2, 3)) < 1e-6
    torch.testing.assert_close(out[~is_grey], unit(x)[~is_grey])
    assert 70 < int(is_grey.sum()) < 130


@pytest.mark.parametrize("grey_first", [True, False])
def test_order_of_grey_and_jitter(grey_first):
    # A grey image has no hue to turn and no saturation; the luma of a turned one differs.
    a = replace(NOTHING, hue=0.4, grey=1.0, grey_first=grey_first)
    x = images(20)
    r, g, b = unit(x).unbind(1)
    luma = (0.299 * r + 0.587 * g + 0.114 * b)[:, None].expand(-1, 3, -1, -1)
    same = torch.allclose(run(x, a), luma, atol=1e-5)
    assert same == grey_first


def test_brightness_and_contrast():
    x = images(300, size=6)
    factor = (run(x // 2, replace(NOTHING, brightness=0.4)) / unit(x // 2).clamp_min(1e-6)).amax(
        (1, 2, 3)
    )
    assert 0.6 <= factor.min() < 0.65 and 1.35 < factor.max() <= 1.4001
    assert abs(float(factor.mean()) - 1) < 0.05
    # Around the mean of the luma, without reaching 0 or 1.
    middle = x // 4 + 96
    out, before = run(middle, replace(NOTHING, contrast=0.4)), unit(middle)
    r, g, b = before.unbind(1)
    mean = (0.299 * r + 0.587 * g + 0.114 * b).mean((1, 2))[:, None, None, None]
    ratio = ((out - mean) * (before - mean)).sum((1, 2, 3)) / (before - mean).square().sum(
        (1, 2, 3)
    )
    torch.testing.assert_close(out, mean + ratio[:, None, None, None] * (before - mean))
    assert 0.6 <= ratio.min() < 0.65 and 1.35 < ratio.max() <= 1.4001


def test_saturation_moves_away_from_grey():
    middle = images(200, size=5) // 4 + 96
    out, before = run(middle, replace(NOTHING, saturation=0.4)), unit(middle)
    r, g, b = before.unbind(1)
    luma = (0.299 * r + 0.587 * g + 0.114 * b)[:, None]
    ratio = ((out - luma) * (before - luma)).sum((1, 2, 3)) / (before - luma).square().sum(
        (1, 2, 3)
    )
    torch.testing.assert_close(out, luma + ratio[:, None, None, None] * (before - luma))
    assert 0.6 <= ratio.min() < 0.65 and 1.35 < ratio.max() <= 1.4001


@pytest.mark.parametrize("turn", [-0.4, 0.0, 0.1, 0.4])
def test_hue_is_turned_as_in_hsv(turn):
    x = unit(images(2, size=5))
    # All shades of equal and of extreme channels, too.
    x[0, :, 0, 0], x[0, :, 0, 1], x[0, :, 0, 2] = 0.0, 1.0, 0.3
    x[0, :, 1, 0] = torch.tensor([0.5, 0.5, 0.1])
    got = module._turn_hue(x, torch.full((2, 1, 1, 1), turn))
    for i in range(2):
        for row in range(5):
            for column in range(5):
                h, s, v = colorsys.rgb_to_hsv(*x[i, :, row, column].tolist())
                want = torch.tensor(colorsys.hsv_to_rgb((h + turn) % 1, s, v))
                torch.testing.assert_close(got[i, :, row, column], want, rtol=1e-4, atol=1e-5)


def test_blur_is_gaussian_with_a_width_for_each_image():
    size = 25
    x = torch.zeros(2, 3, size, size)
    x[:, :, 12, 12] = 1
    sigma = torch.tensor([0.5, 1.9]).view(2, 1, 1, 1)
    out = module._blur(x, sigma)
    offsets = torch.arange(-6, 7).float()
    for i, s in enumerate((0.5, 1.9)):
        line = torch.exp(-offsets.square() / (2 * s * s))
        line = line / line.sum()
        want = torch.zeros(size, size)
        want[6:19, 6:19] = torch.outer(line, line)
        torch.testing.assert_close(out[i], want.expand(3, -1, -1), atol=1e-6, rtol=1e-4)
    flat = torch.full((1, 1, 4, 4), 0.7)
    torch.testing.assert_close(module._blur(flat, sigma[1:]), flat)


def test_jitters_come_in_every_order():
    a = replace(NOTHING, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4)
    draw = [module._Draw(s, 1, torch.device("cpu")).order(4) for s in range(40)]
    assert {o[0] for o in draw} == {0, 1, 2, 3}
    x = images(200, size=3)
    untouched = (run(x, replace(a, jitter=0.8)) == unit(x)).flatten(1).all(1)
    assert 15 < int(untouched.sum()) < 70


def test_wrong_images():
    with pytest.raises(TypeError, match=r"^images: expected torch.uint8, got torch.float32"):
        run(images().float(), NOTHING)
    with pytest.raises(ValueError, match=r"^images: expected \[B, C, H, W\]"):
        augment_contrastive(images()[0], NOTHING, mean=MEAN, std=STD, seed=0)
    with pytest.raises(ValueError, match=r"^std: expected C=3 entries, got 1"):
        augment_contrastive(images(), NOTHING, mean=MEAN, std=(1.0,), seed=0)
