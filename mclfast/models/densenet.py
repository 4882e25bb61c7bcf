"""DenseNet for small images, in its bottleneck form with compression (DenseNet-BC).

Source: Huang et al., CVPR 2017 (arXiv 1608.06993), section 3. The in-place ReLUs follow a batch
norm, whose backward pass does not read its output.
"""

import torch
from torch import Tensor, nn

from mclfast.models.resnet import conv3x3, init_conv
from mclfast.models.staged import StagedNetwork


def preactivated(in_channels: int, conv: nn.Module) -> nn.Sequential:
    """Batch norm, ReLU, then a convolution that takes ``in_channels``."""
    return nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True), conv)


class DenseLayer(nn.Module):
    """Adds ``growth`` channels to its input: [B, c, h, w] -> [B, c + growth, h, w]."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        inner = 4 * growth
        self.squeeze = preactivated(in_channels, nn.Conv2d(in_channels, inner, 1, bias=False))
        self.grow = preactivated(inner, conv3x3(inner, growth))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.grow(self.squeeze(x))), dim=1)


class CifarDenseNet(StagedNetwork):
    """DenseNet for small images: three dense blocks, cut after each transition and at the end.

    A transition keeps half of the channels and averages 2x2 pixels. The last batch norm and ReLU
    form the tail.

    Args:
        layers: number of dense layers in each block.
        growth: channels k that each layer adds; the stem has 2 k.
        num_classes: number of logits C.
        in_channels: channels of the input image [B, in_channels, H, W]. The stages divide H and
            W by 2, 4 and 4, rounded up.
    """

    def __init__(
        self, layers: int, growth: int, *, num_classes: int = 100, in_channels: int = 3
    ) -> None:
        super().__init__()
        width = 2 * growth
        self.conv1 = conv3x3(in_channels, width)
        self.block1, width = _stage(width, layers, growth, transition=True)
        self.block2, width = _stage(width, layers, growth, transition=True)
        self.block3, width = _stage(width, layers, growth, transition=False)
        self.norm = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.fc = nn.Linear(width, num_classes)
        self.apply(self.init_weights)

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


def _stage(width: int, layers: int, growth: int, *, transition: bool) -> tuple[nn.Sequential, int]:
    """A dense block with the transition that follows it, and the width of its output."""
    parts: list[nn.Module] = [DenseLayer(width + i * growth, growth) for i in range(layers)]
    width += layers * growth
    if transition:
        parts.append(preactivated(width, nn.Conv2d(width, width // 2, 1, bias=False)))
        parts.append(nn.AvgPool2d(2, ceil_mode=True))
        width //= 2
    return nn.Sequential(*parts), width


def densenet_40_12(*, num_classes: int = 100, in_channels: int = 3) -> CifarDenseNet:
    """DenseNet-BC-40 with growth 12: six bottleneck layers per block.

    Two published sizes differ from this one. Reproductions of PCL leave out the last batch norm,
    264 parameters; the tree of CL-ILR in the code of MCL-OKD holds two more second transitions,
    which never run.
    """
    return CifarDenseNet(6, 12, num_classes=num_classes, in_channels=in_channels)
