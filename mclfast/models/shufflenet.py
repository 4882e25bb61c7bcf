"""ShuffleNetV2: its units, its stages, and the network with a stem for small or large images.

Source: Ma et al., ECCV 2018 (arXiv 1807.11164), section 4 and table 5. Submodules are named so
that state dicts of torchvision fit, in both directions. The in-place ReLUs follow a batch norm,
whose backward pass does not read its output, so they are safe under double backward.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mclfast.models.resnet import conv3x3
from mclfast.models.staged import StagedNetwork


def pointwise(in_channels: int, out_channels: int) -> nn.Sequential:
    """1x1 convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def _depthwise(channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
    )


def _interleave(left: Tensor, right: Tensor) -> Tensor:
    """Concatenation and channel shuffle in one copy: [B, c, h, w] twice -> [B, 2 c, h, w]."""
    return torch.stack((left, right), dim=2).flatten(1, 2)


class BasicUnit(nn.Module):
    """Transforms one half of the channels and keeps the other; the shape stays.

    Args:
        channels: channels c of the map [B, c, h, w], an even number.

    Raises:
        ValueError: the number of channels is odd.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = _half(channels)
        self.branch2 = nn.Sequential(
            *pointwise(half, half), *_depthwise(half, 1), *pointwise(half, half)
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, used = x.chunk(2, dim=1)
        return _interleave(kept, self.branch2(used))


class DownUnit(nn.Module):
    """Two branches of stride 2; [B, in_channels, h, w] -> [B, out_channels, h / 2, w / 2].

    Args:
        in_channels: channels of the input map.
        out_channels: channels of the output map, an even number.

    Raises:
        ValueError: the number of output channels is odd.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = _half(out_channels)
        self.branch1 = nn.Sequential(*_depthwise(in_channels, 2), *pointwise(in_channels, half))
        self.branch2 = nn.Sequential(
            *pointwise(in_channels, half), *_depthwise(half, 2), *pointwise(half, half)
        )

    def forward(self, x: Tensor) -> Tensor:
        return _interleave(self.branch1(x), self.branch2(x))


def _half(channels: int) -> int:
    if channels % 2:
        raise ValueError(f"channels: expected an even number, for two branches, got {channels}")
    return channels // 2


def _stage(in_channels: int, out_channels: int, count: int) -> nn.Sequential:
    """One :class:`DownUnit` and ``count`` - 1 :class:`BasicUnit`."""
    basic = [BasicUnit(out_channels) for _ in range(count - 1)]
    return nn.Sequential(DownUnit(in_channels, out_channels), *basic)


class ShuffleNetV2(StagedNetwork):
    """ShuffleNetV2 with a stem of either form, cut after each of its three stages.

    The tail is the last 1x1 convolution. Weights start from the defaults of torch.

    Args:
        widths: channels of the three stages, even numbers.
        num_classes: number of logits C.
        in_channels: channels of the input image [B, in_channels, H, W].
        feature_width: width D of the pooled feature.
        large_images: whether the stem and a max-pooling after it divide H and W by 2 each.

    Raises:
        ValueError: a width is odd.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        num_classes: int,
        in_channels: int,
        feature_width: int,
        large_images: bool,
    ) -> None:
        super().__init__()
        w2, w3, w4 = widths
        self.conv1 = nn.Sequential(
            conv3x3(in_channels, 24, 2 if large_images else 1),
            nn.BatchNorm2d(24),
            nn.ReLU(inplace=True),
        )
        if large_images:
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stage2 = _stage(24, w2, 4)
        self.stage3 = _stage(w2, w3, 8)
        self.stage4 = _stage(w3, w4, 4)
        self.conv5 = pointwise(w4, feature_width)
        self.fc = nn.Linear(feature_width, num_classes)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return self.stage2, self.stage3, self.stage4

    @property
    def tail(self) -> nn.Module:
        return self.conv5

    def stem_forward(self, x: Tensor) -> Tensor:
        return self.conv1(x)
