"""HCGNet for small images: dense connections between gated modules.

Source: Yang et al., AAAI 2020 (arXiv 1908.09699). Each module squeezes its input by two
convolutions, then adds to the squeezed map, scaled by a forget gate, a global context of two
scales that an update gate mixes. The in-place ReLUs follow a batch norm, whose backward pass does
not read its output.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mclfast.models.densenet import preactivated
from mclfast.models.resnet import conv3x3
from mclfast.models.staged import StagedNetwork


class ContextPool(nn.Module):
    """Sum over the pixels, weighted by a softmax of learned scores; [B, c, h, w] -> [B, c]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.score = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.score(x).flatten(1).softmax(dim=1).view(x.shape[0], 1, *x.shape[2:])
        return (x * weights).sum(dim=(2, 3))


def _bottleneck(inputs: int, inner: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, inner), nn.BatchNorm1d(inner), nn.Tanh(), nn.Linear(inner, outputs)
    )


class ForgetGate(nn.Module):
    """Scales each channel by a factor in (0, 1), found from its context; the shape stays."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.context = ContextPool(channels)
        self.gate = _bottleneck(channels, channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        factor = self.gate(self.context(x)).sigmoid()
        return x * factor[:, :, None, None]


class UpdateGate(nn.Module):
    """New features: contexts at two scales, mixed per channel; [B, c, h, w] -> [B, c, 1, 1]."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            nn.Sequential(
                preactivated(channels, _depthwise(channels, dilation)), ContextPool(channels)
            )
            for dilation in (1, 2)
        )
        self.gate = _bottleneck(2 * channels, 2 * channels // reduction, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        contexts = torch.cat([scale(x) for scale in self.scales], dim=1)
        # The two scales compete for each channel.
        shares = self.gate(contexts).unflatten(1, (2, -1)).softmax(dim=1)
        mixed = (shares * contexts.unflatten(1, (2, -1))).sum(dim=1)
        return mixed[:, :, None, None]


def _depthwise(channels: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(
        channels, channels, 3, padding=dilation, dilation=dilation, groups=channels, bias=False
    )


class GatedResidual(nn.Module):
    """A map after its forget gate, plus the update of its features; the shape stays."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.forget = ForgetGate(channels, reduction)
        self.update = UpdateGate(channels, reduction)

    def forward(self, x: Tensor) -> Tensor:
        return self.forget(x) + self.update(x)


class SmgModule(nn.Module):
    """Squeeze, multi-scale excitation, gates; [B, c, h, w] -> [B, c + growth, h, w].

    Args:
        in_channels: channels c of the input map.
        growth: channels that the module adds, a multiple of its four convolution groups.
    """

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        inner = 4 * growth
        self.squeeze = nn.Sequential(
            preactivated(in_channels, nn.Conv2d(in_channels, inner, 1, bias=False)),
            preactivated(inner, nn.Conv2d(inner, growth, 3, padding=1, groups=4, bias=False)),
        )
        self.gated = GatedResidual(growth, reduction=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.gated(self.squeeze(x))), dim=1)


def transition(in_channels: int, out_channels: int) -> nn.Sequential:
    """Layers between two blocks: fewer channels in two equal steps, half the map size, gates."""
    middle = in_channels - (in_channels - out_channels) // 2
    return nn.Sequential(
        preactivated(in_channels, nn.Conv2d(in_channels, middle, 1, bias=False)),
        preactivated(middle, conv3x3(middle, out_channels, 2)),
        GatedResidual(out_channels, reduction=4),
    )


class HcgNet(StagedNetwork):
    """HCGNet for small images: three hybrid blocks, cut after each transition and at the end.

    The last batch norm and ReLU form the tail. Weights start from the defaults of torch. The
    gates normalise vectors over the batch, so training needs two images or more.

    Args:
        growths: channels that each module of a block adds, one number per block, multiples of 4;
            the stem has twice the first number.
        modules: number of modules in each block.
        num_classes: number of logits C.
        in_channels: channels of the input image [B, in_channels, H, W]. The stages divide H and
            W by 2, 4 and 4, rounded up.
    """

    def __init__(
        self,
        growths: Sequence[int],
        modules: int = 8,
        *,
        num_classes: int = 100,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        g1, g2, g3 = growths
        width = 2 * g1
        self.conv1 = conv3x3(in_channels, width)
        self.block1, width = _stage(width, g1, modules, last=False)
        self.block2, width = _stage(width, g2, modules, last=False)
        self.block3, width = _stage(width, g3, modules, last=True)
        self.norm = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.fc = nn.Linear(width, num_classes)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return self.block1, self.block2, self.block3

    @property
    def tail(self) -> nn.Module:
        return self.norm

    def stem_forward(self, x: Tensor) -> Tensor:
        return self.conv1(x)


def _stage(width: int, growth: int, modules: int, *, last: bool) -> tuple[nn.Sequential, int]:
    """A hybrid block with the transition that follows it, and the width of its output."""
    parts: list[nn.Module] = [SmgModule(width + i * growth, growth) for i in range(modules)]
    width += modules * growth
    if not last:
        parts.append(transition(width, width // 2))
        width //= 2
    return nn.Sequential(*parts), width


def hcgnet_a1(*, num_classes: int = 100, in_channels: int = 3) -> HcgNet:
    """HCGNet-A1: growths 12, 24 and 36."""
    return HcgNet((12, 24, 36), num_classes=num_classes, in_channels=in_channels)


def hcgnet_a2(*, num_classes: int = 100, in_channels: int = 3) -> HcgNet:
    """HCGNet-A2: growths 24, 36 and 64."""
    return HcgNet((24, 36, 64), num_classes=num_classes, in_channels=in_channels)
