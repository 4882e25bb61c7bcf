"""Batched augmentation of uint8 images on the device they are on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training image.

    Attributes:
        pad: largest shift in pixels: that many black pixels are added on every side before a crop
            of the original size is drawn; 0 draws no crop.
        flip: whether to mirror left and right with probability 1/2.

    Raises:
        ValueError: pad is negative.
    """

    pad: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise ValueError(f"pad: expected at least 0, got {self.pad}")


def prepare(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalises: (images / 255 - mean) / std, per channel.

    Args:
        images: uint8 [B, C, H, W].
        mean: C means of pixels scaled to [0, 1].
        std: C standard deviations on the same scale.

    Returns:
        float32 [B, C, H, W] on the device of the images.

    Raises:
        TypeError: images are not uint8.
        ValueError: images are not of rank 4, or mean or std does not have C entries.
    """
    check_images(images, mean, std)
    out = images.to(torch.float32)
    # Python scalars: a tensor of the constants would have to be copied to the device, which makes
    # the host wait for it.
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        out[:, channel].sub_(255 * m).div_(255 * s)
    return out


def augment(
    images: Tensor,
    augmentation: Augmentation,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    generator: Generator,
) -> Tensor:
    """Shifts and mirrors every image independently, then normalises.

    The result is that of the following for each image b, computed without the loop:

        padded = F.pad(images[b], (pad, pad, pad, pad))
        crop = padded[:, dy[b] : dy[b] + H, dx[b] : dx[b] + W]
        out[b] = (crop.flip(-1) if mirrored[b] else crop) / 255 normalised

    Args:
        images: uint8 [B, C, H, W].
        augmentation: the largest shift, and whether to mirror.
        mean: C means of pixels scaled to [0, 1].
        std: C standard deviations on the same scale.
        generator: the only source of randomness, on the device of the images. The same state
            gives the same result.

    Returns:
        float32 [B, C, H, W] on the device of the images.

    Raises:
        TypeError: images are not uint8.
        ValueError: images are not of rank 4, mean or std does not have C entries, or the
            generator is on another kind of device.
    """
    check_images(images, mean, std)
    device = images.device
    if generator.device.type != device.type:
        raise ValueError(
            f"generator: expected the device of the images, {device}, got {generator.device}"
        )
    if augmentation.pad == 0 and not augmentation.flip:
        return prepare(images, mean, std)

    batch, channels, height, width = images.shape
    rows = torch.arange(height, device=device).expand(batch, height)  # [B, H]
    cols = torch.arange(width, device=device).expand(batch, width)  # [B, W]
    if augmentation.flip:
        mirrored = torch.randint(0, 2, (batch, 1), device=device, generator=generator)
        cols = torch.where(mirrored.bool(), width - 1 - cols, cols)
    if augmentation.pad > 0:
        pad = augmentation.pad
        images = F.pad(images, (pad, pad, pad, pad))
        shift = torch.randint(0, 2 * pad + 1, (2, batch, 1), device=device, generator=generator)
        rows = rows + shift[0]
        cols = cols + shift[1]
    index = torch.arange(batch, device=device)
    channel = torch.arange(channels, device=device)
    picked = images[
        index[:, None, None, None],
        channel[None, :, None, None],
        rows[:, None, :, None],
        cols[:, None, None, :],
    ]
    return prepare(picked, mean, std)


def check_images(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises unless images are uint8 [B, C, H, W], and mean and std have C entries."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images: expected torch.uint8, got {images.dtype}")
    if images.ndim != 4:
        raise ValueError(f"images: expected [B, C, H, W], got shape {list(images.shape)}")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != images.shape[1]:
            raise ValueError(f"{name}: expected C={images.shape[1]} entries, got {len(values)}")
