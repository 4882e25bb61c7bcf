"""ImageNet ResNets: 7x7 stem with max-pooling, four stages that double their width.

Source: He et al., CVPR 2016 (arXiv 1512.03385), table 1; bottlenecks carry the stride in their
3x3 convolution. Submodules are named so that state dicts of torchvision fit, in both directions.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mclfast.models import resnet
from mclfast.models.resnet import ResidualBlock, init_conv, residual_stage
from mclfast.models.staged import StagedNetwork, fresh_blocks


class BasicBlock(resnet.BasicBlock):
    """Basic block whose shortcut is named as in torchvision."""

    shortcut_name = "downsample"


class Bottleneck(resnet.Bottleneck):
    """Bottleneck whose shortcut is named as in torchvision."""

    shortcut_name = "downsample"


class ImageNetResNet(StagedNetwork):
    """ResNet for large images, cut after each of its four stages.

    An auxiliary head repeats each later stage with its first block only, as the heads of L-MCL
    (TPAMI 2023, arXiv 2207.11518) do on ImageNet.

    Args:
        block: class of the blocks, :class:`BasicBlock` or :class:`Bottleneck`.
        blocks_per_stage: number of blocks in each of the four stages.
        num_classes: number of logits C.
        in_channels: channels of the input image [B, in_channels, H, W]. The stages divide H and
            W by 4, 8, 16 and 32, rounded up.
        width: channels of the stem; stage k has 2^(k - 1) times as many before expansion.
    """

    def __init__(
        self,
        block: type[ResidualBlock],
        blocks_per_stage: Sequence[int],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: int = 64,
    ) -> None:
        super().__init__()
        n1, n2, n3, n4 = blocks_per_stage
        wide = width * block.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = residual_stage(block, width, width, n1, stride=1)
        self.layer2 = residual_stage(block, wide, 2 * width, n2, stride=2)
        self.layer3 = residual_stage(block, 2 * wide, 4 * width, n3, stride=2)
        self.layer4 = residual_stage(block, 4 * wide, 8 * width, n4, stride=2)
        self.fc = nn.Linear(8 * wide, num_classes)
        self.apply(self.init_weights)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return self.layer1, self.layer2, self.layer3, self.layer4

    def init_weights(self, module: nn.Module) -> None:
        init_conv(module)

    def refinement(self, stage_index: int) -> list[nn.Module]:
        later = self.stages[stage_index + 1 :]
        return [fresh_blocks(stage, 1, self.init_weights) for stage in later]

    def stem_forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.max_pool2d(x, 3, stride=2, padding=1)


def resnet18(*, num_classes: int = 1000, in_channels: int = 3) -> ImageNetResNet:
    """ResNet-18: basic blocks, two per stage."""
    return ImageNetResNet(
        BasicBlock, (2, 2, 2, 2), num_classes=num_classes, in_channels=in_channels
    )


def resnet34(*, num_classes: int = 1000, in_channels: int = 3) -> ImageNetResNet:
    """ResNet-34: basic blocks, 3, 4, 6 and 3 per stage."""
    return ImageNetResNet(
        BasicBlock, (3, 4, 6, 3), num_classes=num_classes, in_channels=in_channels
    )


def resnet50(*, num_classes: int = 1000, in_channels: int = 3) -> ImageNetResNet:
    """ResNet-50: bottlenecks with expansion 4; 3, 4, 6 and 3 per stage."""
    return ImageNetResNet(
        Bottleneck, (3, 4, 6, 3), num_classes=num_classes, in_channels=in_channels
    )
