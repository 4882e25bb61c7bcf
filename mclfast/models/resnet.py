"""CIFAR ResNets: 3x3 stem, three stages of widths 16, 32 and 64, no max-pooling.

Source: He et al., CVPR 2016 (arXiv 1512.03385), section 4.2 for basic blocks; the bottleneck
form has expansion 4. Where a block changes the shape, the shortcut is a 1x1 convolution with
batch norm. The in-place ReLUs follow a batch norm or a sum, whose backward passes do not read
their outputs, so they are safe under double backward.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mclfast.models.staged import StagedNetwork


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution without bias that keeps the map size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def init_conv(module: nn.Module) -> None:
    """Kaiming normal (fan out, ReLU) for a convolution; other modules keep their defaults."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ResidualBlock(nn.Module):
    """Sum of a residual branch and a shortcut, then ReLU.

    A subclass adds its layers, calls :meth:`add_shortcut` last and defines :meth:`residual`.

    Attributes:
        expansion: ratio of the output channels to ``width``.
        shortcut_name: name of the shortcut in the state dict; published weights differ in it.
    """

    expansion = 1
    shortcut_name = "shortcut"

    def add_shortcut(self, in_channels: int, out_channels: int, stride: int) -> None:
        """Adds the shortcut: identity if the shape stays, else 1x1 convolution and batch norm."""
        shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        self.add_module(self.shortcut_name, shortcut)

    def residual(self, x: Tensor) -> Tensor:
        """[B, in_channels, h, w] -> [B, expansion * width, h / stride, w / stride]."""
        raise NotImplementedError(f"{type(self).__name__} must define residual")

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, h, w] -> the shape that :meth:`residual` gives."""
        shortcut = getattr(self, self.shortcut_name)
        return F.relu(self.residual(x) + shortcut(x), inplace=True)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions; [B, in_channels, h, w] -> [B, width, h / stride, w / stride]."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.add_shortcut(in_channels, width, stride)

    def residual(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.bn2(self.conv2(out))


class Bottleneck(ResidualBlock):
    """1x1, 3x3, 1x1 convolutions; [B, in_channels, h, w] -> [B, 4 width, h / stride, ...].

    Attributes:
        widen: ratio of the channels of the 3x3 convolution to ``width``.
    """

    expansion = 4
    widen = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        inner = width * self.widen
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.add_shortcut(in_channels, width * self.expansion, stride)

    def residual(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return self.bn3(self.conv3(out))


def residual_stage(
    block: type[ResidualBlock], in_channels: int, width: int, count: int, stride: int
) -> nn.Sequential:
    """``count`` blocks, of which the first takes ``in_channels`` and the stride."""
    blocks = [block(in_channels, width, stride)]
    blocks += [block(width * block.expansion, width, 1) for _ in range(count - 1)]
    return nn.Sequential(*blocks)


class CifarResNet(StagedNetwork):
    """ResNet for small images, cut after each of its three stages.

    Args:
        block: class of the blocks, :class:`BasicBlock` or :class:`Bottleneck`.
        blocks_per_stage: number n of blocks in each stage; the depth is 6n + 2 with basic blocks
            and 9n + 2 with bottlenecks.
        num_classes: number of logits C.
        in_channels: channels of the input image [B, in_channels, H, W], H and W at least 8.
    """

    def __init__(
        self,
        block: type[ResidualBlock],
        blocks_per_stage: int,
        *,
        num_classes: int = 100,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, 16)
        self.bn1 = nn.BatchNorm2d(16)
        wide = block.expansion
        self.layer1 = residual_stage(block, 16, 16, blocks_per_stage, stride=1)
        self.layer2 = residual_stage(block, 16 * wide, 32, blocks_per_stage, stride=2)
        self.layer3 = residual_stage(block, 32 * wide, 64, blocks_per_stage, stride=2)
        self.fc = nn.Linear(64 * wide, num_classes)
        self.apply(self.init_weights)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return self.layer1, self.layer2, self.layer3

    def init_weights(self, module: nn.Module) -> None:
        init_conv(module)

    def stem_forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)), inplace=True)


def resnet8(*, num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """ResNet-8: basic blocks, one per stage; for tests and quick trials."""
    return CifarResNet(BasicBlock, 1, num_classes=num_classes, in_channels=in_channels)


def resnet20(*, num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """ResNet-20: basic blocks, three per stage."""
    return CifarResNet(BasicBlock, 3, num_classes=num_classes, in_channels=in_channels)


def resnet32(*, num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """ResNet-32: basic blocks, five per stage."""
    return CifarResNet(BasicBlock, 5, num_classes=num_classes, in_channels=in_channels)


def resnet56(*, num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """ResNet-56: basic blocks, nine per stage."""
    return CifarResNet(BasicBlock, 9, num_classes=num_classes, in_channels=in_channels)


def resnet110(*, num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """ResNet-110: bottlenecks with expansion 4, twelve per stage."""
    return CifarResNet(Bottleneck, 12, num_classes=num_classes, in_channels=in_channels)
