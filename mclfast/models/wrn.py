"""Wide ResNets for CIFAR, pre-activation blocks, no dropout.

Source: Zagoruyko and Komodakis, BMVC 2016 (arXiv 1605.07146). Stage outputs are taken before
the next batch norm, so the last batch norm and ReLU form the tail.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mclfast.models.resnet import Bottleneck, CifarResNet, conv3x3, init_conv
from mclfast.models.staged import StagedNetwork


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv twice; [B, in_channels, h, w] -> [B, width, h / stride, w / stride].

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != width:
            self.shortcut = nn.Conv2d(in_channels, width, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x), inplace=True)
        identity = x if self.shortcut is None else self.shortcut(active)
        out = F.relu(self.bn2(self.conv1(active)), inplace=True)
        return self.conv2(out) + identity


class WideResNet(StagedNetwork):
    """WRN-depth-widen, cut after each of its three stages.

    Args:
        depth: number of layers, 6n + 4 for n blocks per stage.
        widen: factor by which the stages are wider than 16, 32 and 64 channels.
        num_classes: number of logits C.
        in_channels: channels of the input image [B, in_channels, H, W], H and W at least 8.

    Raises:
        ValueError: ``depth`` is not 6n + 4 with n at least 1.
    """

    def __init__(
        self, depth: int, widen: int, *, num_classes: int = 100, in_channels: int = 3
    ) -> None:
        super().__init__()
        count, rest = divmod(depth - 4, 6)
        if count < 1 or rest:
            raise ValueError(f"depth: expected 6n + 4 with n >= 1, got {depth}")
        self.conv1 = conv3x3(in_channels, 16)
        self.block1 = _stage(16, 16 * widen, count, stride=1)
        self.block2 = _stage(16 * widen, 32 * widen, count, stride=2)
        self.block3 = _stage(32 * widen, 64 * widen, count, stride=2)
        self.norm = nn.Sequential(nn.BatchNorm2d(64 * widen), nn.ReLU(inplace=True))
        self.fc = nn.Linear(64 * widen, num_classes)
        self.apply(self.init_weights)
        nn.init.zeros_(self.fc.bias)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return self.block1, self.block2, self.block3

    @property
    def tail(self) -> nn.Module:
        return self.norm

    def init_weights(self, module: nn.Module) -> None:
        init_conv(module)

    def stem_forward(self, x: Tensor) -> Tensor:
        return self.conv1(x)


def _stage(in_channels: int, width: int, count: int, stride: int) -> nn.Sequential:
    blocks = [PreActivationBlock(in_channels, width, stride)]
    blocks += [PreActivationBlock(width, width, 1) for _ in range(count - 1)]
    return nn.Sequential(*blocks)


def wrn_16_2(*, num_classes: int = 100, in_channels: int = 3) -> WideResNet:
    """WRN-16-2: two blocks per stage, widths 32, 64 and 128."""
    return WideResNet(16, 2, num_classes=num_classes, in_channels=in_channels)


def wrn_40_2(*, num_classes: int = 100, in_channels: int = 3) -> WideResNet:
    """WRN-40-2: six blocks per stage, widths 32, 64 and 128."""
    return WideResNet(40, 2, num_classes=num_classes, in_channels=in_channels)


def wrn_28_4(*, num_classes: int = 100, in_channels: int = 3) -> WideResNet:
    """WRN-28-4: four blocks per stage, widths 64, 128 and 256."""
    return WideResNet(28, 4, num_classes=num_classes, in_channels=in_channels)


class WideBottleneck(Bottleneck):
    """A bottleneck whose 3x3 convolution has eight times the channels."""

    widen = 8


def wrn_20_8(*, num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """WRN-20-8 as online distillation names it: two wide bottlenecks per stage.

    Source: the network under this name in reproductions of PCL (AAAI 2021, arXiv 2006.04147). Its
    blocks are not pre-activated, and the maps between them are those of ResNet-110: 64, 128 and
    256 channels.
    """
    return CifarResNet(WideBottleneck, 2, num_classes=num_classes, in_channels=in_channels)
