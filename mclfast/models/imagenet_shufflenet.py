"""ShuffleNetV2 for ImageNet, with the layers that torchvision gives it."""

from collections.abc import Sequence

from torch import nn

from mclfast.models.shufflenet import ShuffleNetV2
from mclfast.models.staged import fresh_blocks


class ImageNetShuffleNetV2(ShuffleNetV2):
    """ShuffleNetV2 for large images, cut after the max-pooling and each of its three stages.

    An auxiliary head repeats the later stages, the first head with two units of each only, as the
    heads of L-MCL (TPAMI 2023, arXiv 2207.11518) do on ImageNet.

    Args:
        widths: channels of the three stages, even numbers.
        num_classes: number of logits C.
        in_channels: channels of the input image [B, in_channels, H, W]. The stages divide H and
            W by 4, 8, 16 and 32, rounded up.
        feature_width: width D of the pooled feature.

    Raises:
        ValueError: a width is odd.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        feature_width: int = 1024,
    ) -> None:
        super().__init__(
            widths,
            num_classes=num_classes,
            in_channels=in_channels,
            feature_width=feature_width,
            large_images=True,
        )

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return self.maxpool, *super().stages

    def refinement(self, stage_index: int) -> list[nn.Module]:
        if stage_index > 0:
            return super().refinement(stage_index)
        return [fresh_blocks(stage, 2, self.init_weights) for stage in self.stages[1:]]


def shufflenet_v2_x0_5(*, num_classes: int = 1000, in_channels: int = 3) -> ImageNetShuffleNetV2:
    """ShuffleNetV2 0.5x: widths 48, 96 and 192."""
    return ImageNetShuffleNetV2((48, 96, 192), num_classes=num_classes, in_channels=in_channels)


def shufflenet_v2_x1_0(*, num_classes: int = 1000, in_channels: int = 3) -> ImageNetShuffleNetV2:
    """ShuffleNetV2 1x: widths 116, 232 and 464."""
    return ImageNetShuffleNetV2((116, 232, 464), num_classes=num_classes, in_channels=in_channels)
