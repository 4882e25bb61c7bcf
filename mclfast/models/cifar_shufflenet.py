"""ShuffleNetV2 for small images: a 3x3 stem of stride 1 and no max-pooling.

The stem is that of the CIFAR networks of L-MCL (TPAMI 2023, arXiv 2207.11518).
"""

from collections.abc import Sequence

from mclfast.models.shufflenet import ShuffleNetV2


class CifarShuffleNetV2(ShuffleNetV2):
    """ShuffleNetV2 for small images, cut after each of its three stages.

    Args:
        widths: channels of the three stages, even numbers.
        num_classes: number of logits C.
        in_channels: channels of the input image [B, in_channels, H, W]. The stages divide H and
            W by 2, 4 and 8, rounded up.
        feature_width: width D of the pooled feature.

    Raises:
        ValueError: a width is odd.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        num_classes: int = 100,
        in_channels: int = 3,
        feature_width: int = 1024,
    ) -> None:
        super().__init__(
            widths,
            num_classes=num_classes,
            in_channels=in_channels,
            feature_width=feature_width,
            large_images=False,
        )


def shufflenet_v2_x0_5_cifar(*, num_classes: int = 100, in_channels: int = 3) -> CifarShuffleNetV2:
    """ShuffleNetV2 0.5x for small images: widths 48, 96 and 192."""
    return CifarShuffleNetV2((48, 96, 192), num_classes=num_classes, in_channels=in_channels)


def shufflenet_v2_x1_0_cifar(*, num_classes: int = 100, in_channels: int = 3) -> CifarShuffleNetV2:
    """ShuffleNetV2 1x for small images: widths 116, 232 and 464."""
    return CifarShuffleNetV2((116, 232, 464), num_classes=num_classes, in_channels=in_channels)
