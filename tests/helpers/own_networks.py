"""Small networks built as those of other packages are, for tests of networks of one's own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, max_pool2d, relu

from mclfast.models import StagedNetwork, staged


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.Tanh()
    )


class EncoderBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """Patches, a class token, a positional embedding, blocks; the class token is classified."""

    def __init__(self, num_classes: int = 3, width: int = 8, blocks: int = 3) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, width, 4, 4)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embedding = nn.Parameter(torch.randn(1, 5, width) * 0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(width) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x).flatten(2).mT
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.pos_embedding
        return self.head(self.norm(self.blocks(x))[:, 0])


class Windowed(nn.Module):
    """A block of Swin: attention in windows of 2 by 2, channels last, optional merging."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.merge = nn.Linear(4 * inputs, outputs)
        self.norm = nn.LayerNorm(outputs)
        self.attention = nn.MultiheadAttention(outputs, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        x = self.merge(x.flatten(3))
        b, h, w, c = x.shape
        y = self.norm(x).reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        y = y.reshape(-1, 4, c)
        y = self.attention(y, y, y, need_weights=False)[0]
        y = y.reshape(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        return x + y.reshape(b, h, w, c)


class Swin(nn.Module):
    """Stages give [B, H, W, C]; the normalisation too; a permutation before the pooling."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 1)
        self.layers = nn.ModuleList([Windowed(4, 6), Windowed(6, 10)])
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).permute(0, 3, 1, 2).mean((2, 3)))


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens, self.channels = nn.Linear(tokens, tokens), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.tokens(self.norm1(x).mT)).mT
        return x + torch.tanh(self.channels(self.norm2(x)))


class Mixer(nn.Module):
    def __init__(self, num_classes: int = 3, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList(MixerBlock(4, width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """Owns a scale of the layer, which has no ``reset_parameters``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = LayerNorm2d(width)
        self.pointwise = nn.Conv2d(width, width, 1)
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 1e-1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * self.pointwise(torch.tanh(self.norm(self.depthwise(x))))


class ConvNext(nn.Module):
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, 2)
        self.stage0 = ConvNextBlock(4)
        self.stage1 = nn.Sequential(LayerNorm2d(4), nn.Conv2d(4, 6, 2, 2), ConvNextBlock(6))
        self.norm = LayerNorm2d(6)
        self.head = nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stage1(self.stage0(self.stem(x))))
        return self.head(adaptive_avg_pool2d(x, 1).flatten(1))


class UNetEncoder(nn.Module):
    """One module for the pooling between all stages."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = conv(3, 4), conv(4, 5), conv(5, 6)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down1(x)
        x = self.down2(self.pool(x))
        x = self.down3(self.pool(x))
        return self.fc(x.mean((2, 3)))


class ModelOutput(OrderedDict):
    """As in transformers: a mapping whose keys are attributes too."""

    def __getattr__(self, name: str) -> Tensor:
        if name in self:
            return self[name]
        raise AttributeError(name)


class LayerOfTuples(nn.Module):
    """A block of transformers: more inputs by keyword, a tuple comes out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = EncoderBlock(width)

    def forward(
        self, hidden: Tensor, head_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        return (self.block(hidden),)


class HuggingFace(nn.Module):
    """Control flow that cannot be traced, an encoder of layers, a mapping as the output."""

    def __init__(self, num_classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.layer = nn.ModuleList(LayerOfTuples(width) for _ in range(3))
        self.layernorm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool = True
    ) -> ModelOutput:
        if pixel_values.shape[1] != 3:
            raise ValueError("channels")
        x = self.patches(pixel_values).flatten(2).mT
        for layer in self.layer:
            x = layer(x, None, output_attentions=False)[0]
        x = self.layernorm(x)
        return ModelOutput(logits=self.classifier(x[:, 0, :]), hidden_states=x)


@dataclass
class Answer:
    hidden: Tensor
    logits: Tensor


class OfDataclass(UNetEncoder):
    def forward(self, x: Tensor) -> Answer:
        return Answer(x, super().forward(x))


class OfTuple(UNetEncoder):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, super().forward(x)


class VGG(nn.Module):
    """A functional flatten between the features and a classifier of several layers."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 5, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Linear(20, 12),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(12, 12),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(12, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.avgpool(self.features(x)), 1)
        return self.classifier(x)


class SqueezeNet(nn.Module):
    """A convolution classifies every pixel; the averages are the logits."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1), nn.Tanh(), nn.MaxPool2d(2), conv(4, 5), conv(5, 6, 2)
        )
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Conv2d(6, num_classes, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.classifier(self.features(x)), 1)


class FunctionalResNet(nn.Module):
    """Functions between the stages."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5))
        self.layer2 = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.layer3 = nn.Sequential(nn.Conv2d(6, 7, 3, padding=1), nn.BatchNorm2d(7))
        self.fc = nn.Linear(7, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.conv1(x))
        x = max_pool2d(relu(self.layer1(x)), 2)
        x = relu(self.layer2(x) * 1.5)
        return self.fc(relu(self.layer3(x)).mean((2, 3)))


class Rows(nn.Module):
    """Layers on rows [B, D] from the first stage on."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 10), nn.Tanh())
        self.two = nn.Sequential(nn.Linear(10, 8), nn.Tanh())
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.two(self.one(x)))


#: Class of each network, its stages, and the options of ``staged``.
NETWORKS = {
    "vit": (
        VisionTransformer,
        ["blocks.0", "blocks.1", "blocks.2"],
        {"classifier": "head", "tail": ["norm"], "pool": "first"},
    ),
    "swin": (Swin, ["layers.0", "layers.1"], {"classifier": "head", "tail": ["norm"]}),
    "mixer": (
        Mixer,
        ["blocks.0", ["blocks.1", "blocks.2"]],
        {"classifier": "head", "tail": ["norm"]},
    ),
    "convnext": (ConvNext, ["stage0", "stage1"], {"classifier": "head", "tail": ["norm"]}),
    "unet": (UNetEncoder, ["down1", "down2", "down3"], {}),
    "huggingface": (
        HuggingFace,
        ["layer.0", "layer.1", "layer.2"],
        {"classifier": "classifier", "tail": ["layernorm"], "output": "logits", "pool": "first"},
    ),
    "dataclass": (OfDataclass, ["down1", "down2", "down3"], {"output": "logits"}),
    "tuple": (OfTuple, ["down1", "down2", "down3"], {"output": 1}),
    "vgg": (
        VGG,
        [["features.0", "features.1", "features.2"], ["features.3", "features.4", "features.5"]],
        {"classifier": "classifier.6", "tail": ["avgpool", *(f"classifier.{i}" for i in range(6))]},
    ),
    "squeezenet": (
        SqueezeNet,
        ["features.2", "features.3", "features.4"],
        {"classifier": "classifier.1", "tail": ["classifier.0"]},
    ),
    "functional": (FunctionalResNet, ["layer1", "layer2", "layer3"], {}),
    "rows": (Rows, ["one", "two"], {}),
}


def make(name: str) -> StagedNetwork:
    """One of the networks above, in stages; images are [B, 3, 8, 8], there are three classes."""
    cls, stages, options = NETWORKS[name]
    return staged(cls(), stages, **options)


def parameters_without_gradient(module: nn.Module) -> Iterator[str]:
    """Names of the parameters that a backward pass left without a gradient."""
    return (name for name, p in module.named_parameters() if p.grad is None)
