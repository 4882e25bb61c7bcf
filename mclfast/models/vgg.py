"""VGG-16 for small images: batch norm after every convolution, one linear layer.

Source: Simonyan and Zisserman, ICLR 2015 (arXiv 1409.1556), configuration D without its hidden
linear layers. The in-place ReLUs follow a batch norm, whose backward pass does not read its output.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from mclfast.models.resnet import init_conv
from mclfast.models.staged import StagedNetwork

#: Convolutions between two poolings: their width and their number.
Group = tuple[int, int]

VGG16: tuple[Group, ...] = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class Vgg(StagedNetwork):
    """VGG in three stages: all groups but the last two, then each of these two.

    The maps after the stages are thus 4, 8 and 16 times smaller than the image. Online distillation
    that shares the first groups, pairs the next and splits the last cuts between stages.

    Args:
        groups: width and number of convolutions of each group, at least three groups; all but the
            first start with a 2x2 max-pooling that rounds sizes up.
        num_classes: number of logits C.
        in_channels: channels of the input image [B, in_channels, H, W].
    """

    def __init__(
        self, groups: Sequence[Group] = VGG16, *, num_classes: int = 100, in_channels: int = 3
    ) -> None:
        super().__init__()
        first: list[nn.Module] = []
        width = in_channels
        for index, (out, count) in enumerate(groups[:-2]):
            first += _group(width, out, count, pool=index > 0)
            width = out
        (fourth, fourth_count), (fifth, fifth_count) = groups[-2:]
        self.stage1 = nn.Sequential(*first)
        self.stage2 = nn.Sequential(*_group(width, fourth, fourth_count, pool=True))
        self.stage3 = nn.Sequential(*_group(fourth, fifth, fifth_count, pool=True))
        self.fc = nn.Linear(fifth, num_classes)
        self.apply(self.init_weights)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return self.stage1, self.stage2, self.stage3

    def init_weights(self, module: nn.Module) -> None:
        init_conv(module)

    def stem_forward(self, x: Tensor) -> Tensor:
        """The image itself: the first group belongs to the first stage."""
        return x


def _group(in_channels: int, width: int, count: int, *, pool: bool) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.MaxPool2d(2, ceil_mode=True)] if pool else []
    for index in range(count):
        source = width if index else in_channels
        layers += [
            nn.Conv2d(source, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
    return layers


def vgg16(*, num_classes: int = 100, in_channels: int = 3) -> Vgg:
    """VGG-16 for small images: widths 64, 128, 256, 512 and 512.

    Reproductions of PCL have two hidden linear layers of 512 before the classifier.
    """
    return Vgg(VGG16, num_classes=num_classes, in_channels=in_channels)
