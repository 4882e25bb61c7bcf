"""ShuffleNetV2 for small images: a 3x3 stem of stride 1 and no max-pooling.

Source: Ma et al., ECCV 2018 (arXiv 1807.11164); the stem is that of the CIFAR networks of L-MCL
(TPAMI 2023, arXiv 2207.11518).
"""

from collections.abc import Sequence

from torch import Tensor, nn

from mclfast.models.imagenet_shufflenet import pointwise, shuffle_stage
from mclfast.models.resnet import conv3x3
from mclfast.models.staged import StagedNetwork


class CifarShuffleNetV2(StagedNetwork):
    """ShuffleNetV2 for small images, cut after each of its three stages.

    The tail is the last 1x1 convolution. Weights start from the defaults of torch.

    Args:
        widths: channels of the three stages, even numbers.
        num_classes: number of logits C.
        in_channels: channels of the input image [B, in_channels, H, W]. The stages divide H and
            W by 2, 4 and 8, rounded up.
        feature_width: width D of the pooled feature.

    Raises:
        ValueError: an odd width.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        num_classes: int = 100,
        in_channels: int = 3,
        feature_width: int = 1024,
    ) -> None:
        super().__init__()
        w2, w3, w4 = widths
        self.conv1 = nn.Sequential(
            conv3x3(in_channels, 24), nn.BatchNorm2d(24), nn.ReLU(inplace=True)
        )
        self.stage2 = shuffle_stage(24, w2, 4)
        self.stage3 = shuffle_stage(w2, w3, 8)
        self.stage4 = shuffle_stage(w3, w4, 4)
        self.conv5 = pointwise(w4, feature_width)
        self.fc = nn.Linear(feature_width, num_classes)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return self.stage2, self.stage3, self.stage4

    @property
    def tail(self) -> nn.Module:
        return self.conv5

    @property
    def classifier(self) -> nn.Linear:
        return self.fc

    def stem_forward(self, x: Tensor) -> Tensor:
        return self.conv1(x)


def shufflenet_v2_x0_5_cifar(*, num_classes: int = 100, in_channels: int = 3) -> CifarShuffleNetV2:
    """ShuffleNetV2 0.5x for small images: widths 48, 96 and 192."""
    return CifarShuffleNetV2((48, 96, 192), num_classes=num_classes, in_channels=in_channels)


def shufflenet_v2_x1_0_cifar(*, num_classes: int = 100, in_channels: int = 3) -> CifarShuffleNetV2:
    """ShuffleNetV2 1x for small images: widths 116, 232 and 464."""
    return CifarShuffleNetV2((116, 232, 464), num_classes=num_classes, in_channels=in_channels)
