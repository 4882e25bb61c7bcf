"""Batched augmentation of momentum contrast: crops of any size, colour jitter, grey, blur.

Everything runs on the device of the images, one batch at a time, and never waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mclfast.data.augment import check_images
from mclfast.data.stream.decode import RATIO

_ATTEMPTS = 10
_GREY = (0.299, 0.587, 0.114)
_BLUR_SIGMA = (0.1, 2.0)
_BLUR_RADIUS = 6


@dataclass(frozen=True)
class ContrastiveAugmentation:
    """Random changes of a training image, drawn for each image by itself.

    Attributes:
        min_area: smallest share of the image's area that a crop covers.
        brightness: largest change of the brightness; the factor is drawn from [1 - value,
            1 + value].
        contrast: largest change of the contrast, drawn in the same way.
        saturation: largest change of the saturation, drawn in the same way.
        hue: largest turn of the hue, as a share of the colour circle, in either direction.
        jitter: probability that brightness, contrast, saturation and hue are changed.
        grey: probability that an image becomes grey.
        grey_first: whether images become grey before the jitter, as in MoCo v1, or after it.
        blur: probability of a Gaussian blur with a standard deviation in [0.1, 2] pixels.
        crop: whether to crop.
        flip: whether to mirror left and right with probability 1/2.
    """

    min_area: float = 0.2
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.4
    jitter: float = 1.0
    grey: float = 0.2
    grey_first: bool = True
    blur: float = 0.0
    crop: bool = True
    flip: bool = True


#: Settings of MoCo v1 (arXiv 1911.05722) and MoCo v2 (arXiv 2003.04297).
CONTRASTIVE = {
    "moco-v1": ContrastiveAugmentation(),
    "moco-v2": ContrastiveAugmentation(hue=0.1, jitter=0.8, grey_first=False, blur=0.5),
}


def augment_contrastive(
    images: Tensor,
    augmentation: ContrastiveAugmentation,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
) -> Tensor:
    """Crops and resizes, changes colours, blurs and mirrors each image, then normalises.

    If images do not have three channels, they have no colours, and the jitter changes only their
    brightness and contrast. The order of the four changes is drawn once for the batch (torchvision
    draws it for each image). Values are not rounded between the operations.

    Args:
        images: uint8 [B, C, S, S].
        augmentation: the changes and their ranges.
        mean: C means of pixels scaled to [0, 1].
        std: C standard deviations on the same scale.
        seed: seed of this batch, and the only source of randomness. The same seed gives the same
            images on all devices of one kind.

    Returns:
        float32 [B, C, S, S] on the device of the images.

    Raises:
        TypeError: images are not uint8.
        ValueError: images are not of rank 4, or mean or std does not have C entries.
    """
    check_images(images, mean, std)
    a, draw = augmentation, _Draw(seed, len(images), images.device)
    x = images.to(torch.float32) / 255
    if a.crop:
        x = random_resized_crop(x, a.min_area, draw.generator)
    has_colour = x.shape[1] == 3
    if has_colour and a.grey_first:
        x = torch.where(draw.chosen(a.grey), _grey(x), x)
    x = torch.where(draw.chosen(a.jitter), _jitter(x, a, draw), x)
    if has_colour and not a.grey_first:
        x = torch.where(draw.chosen(a.grey), _grey(x), x)
    if a.blur > 0:
        x = torch.where(draw.chosen(a.blur), _blur(x, draw.uniform(*_BLUR_SIGMA)), x)
    if a.flip:
        x = torch.where(draw.chosen(0.5), x.flip(-1), x)
    # Python scalars: a tensor of the constants would make the host wait for its copy.
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        x[:, channel].sub_(m).div_(s)
    return x


class _Draw:
    """Random numbers for each image of a batch, [B, 1, 1, 1]."""

    def __init__(self, seed: int, batch: int, device: torch.device) -> None:
        self.generator = Generator(device).manual_seed(seed)
        self._host = Generator().manual_seed(seed)
        self._batch = batch

    def uniform(self, low: float, high: float) -> Tensor:
        shape = (self._batch, 1, 1, 1)
        drawn = torch.rand(shape, device=self.generator.device, generator=self.generator)
        return low + (high - low) * drawn

    def chosen(self, probability: float) -> Tensor:
        return self.uniform(0, 1) < probability

    def order(self, count: int) -> list[int]:
        """An order for the whole batch, drawn on the host."""
        return torch.randperm(count, generator=self._host).tolist()


def random_resized_crop(x: Tensor, min_area: float, generator: Generator) -> Tensor:
    """Cuts a random box out of each image and resizes it bilinearly to the image's size.

    The box has whole pixels; its area and its ratio are drawn as in
    :func:`mclfast.data.stream.decode.random_box`. The result equals ``F.interpolate`` of each box.

    Args:
        x: float [B, C, S, S].
        min_area: smallest share of the image's area that a box covers.
        generator: source of randomness, on the device of x.
    """
    batch, _, size, _ = x.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, device=x.device, generator=generator)

    area = size**2 * (min_area + (1 - min_area) * uniform(batch, _ATTEMPTS))
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    root = ((low + (high - low) * uniform(batch, _ATTEMPTS)) / 2).exp()
    sides = torch.stack([area.sqrt() / root, area.sqrt() * root]).round().clamp_min(1)  # [2, B, 10]
    fits = (sides <= size).all(0)  # [B, 10]
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    chosen = sides.gather(2, first.expand(2, -1, -1))  # [2, B, 1]: height, width
    # If no draw fits, the whole square image is taken, whose ratio of 1 is always allowed.
    chosen = torch.where(fits.any(1, keepdim=True), chosen, float(size))
    start = (uniform(2, batch, 1) * (size - chosen + 1)).floor()
    start = torch.minimum(start, size - chosen)
    steps = (torch.arange(size, device=x.device) + 0.5) / size  # [S]
    # Clamped, so that pixels outside the box do not show at its edge.
    at = start + (chosen * steps - 0.5).clamp_min(0).minimum(chosen - 1)  # [2, B, S]
    at = (2 * at + 1) / size - 1
    grid = torch.stack(
        [at[1][:, None, :].expand(-1, size, -1), at[0][:, :, None].expand(-1, -1, size)], dim=-1
    )  # [B, S, S, 2]: x, y
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _jitter(x: Tensor, a: ContrastiveAugmentation, draw: _Draw) -> Tensor:
    def around_one(spread: float) -> Tensor:
        return draw.uniform(max(0.0, 1 - spread), 1 + spread)

    def contrast(y: Tensor) -> Tensor:
        mean = (_grey(y)[:, :1] if y.shape[1] == 3 else y).mean((1, 2, 3), keepdim=True)
        return mean.lerp(y, around_one(a.contrast)).clamp(0, 1)

    steps: list[Callable[[Tensor], Tensor]] = [
        lambda y: (y * around_one(a.brightness)).clamp(0, 1),
        contrast,
    ]
    if x.shape[1] == 3:
        steps.append(lambda y: _grey(y).lerp(y, around_one(a.saturation)).clamp(0, 1))
        steps.append(lambda y: _turn_hue(y, draw.uniform(-a.hue, a.hue)))
    for i in draw.order(len(steps)):
        x = steps[i](x)
    return x


def _grey(x: Tensor) -> Tensor:
    """Luma (ITU-R BT.601) in all three channels, [B, 3, H, W]."""
    luma = sum(weight * x[:, c : c + 1] for c, weight in enumerate(_GREY))
    assert isinstance(luma, Tensor)
    return luma.expand_as(x)


def _turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Adds to the hue of HSV colours; x in [0, 1] [B, 3, H, W], turn in [-1, 1] [B, 1, 1, 1]."""
    red, green, blue = x.split(1, dim=1)
    value, smallest = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - smallest
    width = torch.where(chroma > 0, chroma, 1)
    sextant = torch.where(
        value == red,
        (green - blue) / width,
        torch.where(value == green, 2 + (blue - red) / width, 4 + (red - green) / width),
    )
    sextant = sextant + 6 * turn
    channels = []
    for offset in (5, 3, 1):
        k = (sextant + offset).remainder(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.cat(channels, dim=1)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of each image with its own standard deviation [B, 1, 1, 1] in pixels."""
    batch, channels, height, width = x.shape
    radius = min(_BLUR_RADIUS, min(height, width) - 1)
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    weights = (-0.5 * (offsets / sigma).square()).softmax(-1)  # [B, 1, 1, 2 radius + 1]
    kernel = weights.expand(-1, channels, -1, -1).reshape(batch * channels, 1, 1, -1)
    flat = F.pad(x, (radius,) * 4, mode="reflect").flatten(0, 1)[None]
    flat = F.conv2d(flat, kernel, groups=batch * channels)
    flat = F.conv2d(flat, kernel.transpose(2, 3), groups=batch * channels)
    return flat.view(batch, channels, height, width)
