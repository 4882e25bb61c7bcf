"""Stages that are found in networks built as those of timm and torchvision are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from helpers.own_networks import VGG, ConvNext, EncoderBlock, SqueezeNet
from mclfast.models import PeerNetwork
from mclfast.models.external import in_stages


class Transformer(nn.Module):
    """As timm's and torchvision's: blocks in one container, layers of no effect before the head."""

    def __init__(self, pooled: str = "token") -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 32, 32)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.blocks = nn.Sequential(*(EncoderBlock(8) for _ in range(5)))
        self.norm = nn.LayerNorm(8)
        self.fc_norm = nn.Identity()
        self.head_drop = nn.Dropout(0.0)
        self.head = nn.Linear(8, 3)
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        x = self.norm(self.blocks(x))
        x = x[:, 0] if self.pooled == "token" else x.mean(1)
        return self.head(self.head_drop(self.fc_norm(x)))


class Block(nn.Module):
    """Channels last in and out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Merging(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return self.reduction(torch.cat(parts, -1))


class Permute(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


class Swin(nn.Module):
    """As torchvision's: all stages in one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 4, 4), Permute(0, 2, 3, 1), nn.LayerNorm(4)),
            nn.Sequential(Block(4), Block(4)),
            Merging(4, 6),
            nn.Sequential(Block(6)),
            Merging(6, 10),
            nn.Sequential(Block(10)),
        )
        self.norm = nn.LayerNorm(10)
        self.permute = Permute(0, 3, 1, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.permute(self.norm(self.features(x)))
        return self.head(self.flatten(self.avgpool(x)))


class DeepVgg(VGG):
    """Four sizes of maps; the last one is that of a pooling alone."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 4), (4, 4), (4, 5), (5, 5)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)


class DeepSqueezeNet(SqueezeNet):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2), nn.ReLU(True), nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Conv2d(4, 5, 1), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Conv2d(5, 6, 1),
        )  # fmt: skip


CASES = {
    "class token": (Transformer, 4, "blocks.4"),
    "mean of tokens": (lambda: Transformer("mean"), 4, "blocks.4"),
    "swin": (Swin, 3, "features.5"),
    "vgg": (DeepVgg, 2, "features.10"),
    "squeezenet": (DeepSqueezeNet, 2, "features.5"),
}


@pytest.mark.parametrize("name", CASES)
def test_heads_of_found_stages(name: str) -> None:
    """Copied weights make a head the rest of the network."""
    torch.manual_seed(0)
    build, stages, last = CASES[name]
    module = build().double().eval()
    net = in_stages(module, name).eval()
    assert len(net.stages) == stages
    names = {m: n for n, m in module.named_modules()}
    assert last in {names.get(m) for m in net.stages[-1].modules()}
    peer = PeerNetwork(net).eval()
    for k, head in enumerate(peer.auxiliary):
        head.stages.load_state_dict(nn.Sequential(*net.stages[k + 1 :]).state_dict())
        head.tail.load_state_dict(net.tail.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    out = peer(x)
    assert torch.equal(out.logits[-1], module(x))
    for feature in out.features:
        torch.testing.assert_close(feature, out.features[-1])


def test_one_stage_is_too_few() -> None:
    message = "name: expected a network of two or more stages .* got convnext .*mclfast.staged"
    with pytest.raises(ValueError, match=message):
        in_stages(ConvNext(), "convnext")


@pytest.mark.parametrize(
    "name", ["vgg11", "squeezenet1_1", "vit_b_16", "swin_t", "convnext_tiny", "mobilenet_v2"]
)
def test_networks_of_torchvision(name: str) -> None:
    try:
        from torchvision.models import get_model
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"torchvision does not import here: {str(error).splitlines()[0]}")
    net = in_stages(get_model(name, num_classes=3), name)
    assert len(net.stages) >= 2
