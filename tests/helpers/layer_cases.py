"""Every layer of torch.nn in a small network, for derivatives through it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

#: How a layer's input is made from the map [B, 4, 4, 4] of a convolution.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "map": lambda x: x,
    "line": lambda x: x.flatten(2),
    "volume": lambda x: x.unflatten(1, (2, 2)),
    "tokens": lambda x: x.flatten(2).transpose(1, 2)[:, :5],
    "rows": lambda x: x.mean((2, 3)),
}


class Twice(nn.Module):
    """A layer of two inputs, with the input and its square."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x * x)


class Attention(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(4, 2, batch_first=True)
        self.settings = settings

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, **self.settings)[0]


class Lookup(nn.Module):
    """An embedding of fixed numbers, as a factor of the input."""

    def __init__(self, layer: nn.Module, *shape: int) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("numbers", torch.arange(8).view(4, -1)[:, : shape[0]] % 3)

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(self.numbers)
        return x * (found.sum(1) if found.dim() == 3 else found)


class Unpool(nn.Module):
    def __init__(self, pool: type[nn.Module], unpool: type[nn.Module]) -> None:
        super().__init__()
        self.pool, self.unpool = pool(2, return_indices=True), unpool(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.unpool(*self.pool(x))


class Own(nn.Module):
    """A module that calls functions."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _written(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0] = x[:, 1] * x[:, 2]
    return y


#: Functions of maps, as networks call them between their layers.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "squeeze and excitation": lambda x: x * x.mean((2, 3), True).sigmoid(),
    "cut and join": lambda x: torch.cat([x[:, :2], x.chunk(2, 1)[1] ** 2], 1),
    "write into": _written,
    "addcmul": lambda x: torch.addcmul(x, x, x.cos()),
    "amax": lambda x: x.amax((2, 3)),
    "clamp": lambda x: x.clamp(-0.3, 0.3) * x.clamp(min=-0.5) + x.clamp_max(0.4),
    "exp and log": lambda x: (x.exp() + 1).log(),
    "flip and roll": lambda x: x.flip(2) * x.roll(1, 3),
    "gather": lambda x: x.gather(1, torch.zeros(4, 2, 4, 4).long()) * x[:, [0, 2]],
    "index_select": lambda x: x.index_select(1, torch.tensor([0, 2])).square(),
    "lerp": lambda x: torch.lerp(x, x.sin(), 0.3),
    "logsumexp": lambda x: x.logsumexp(1),
    "masked_fill": lambda x: x.masked_fill(x > 0.5, 0.0).erf(),
    "max": lambda x: x.max(1).values * torch.minimum(x, x.sin())[:, 0],
    "maximum": lambda x: torch.maximum(x, x.square()),
    "native_dropout": lambda x: torch.native_dropout(x, 0.3, True)[0],
    "normalize": lambda x: nn.functional.normalize(x, dim=1),
    "sqrt and where": lambda x: torch.where(x > 0, (x.square() + 1).sqrt(), x.tanh()),
    "to": lambda x: x.to(torch.float64, copy=True).square(),
    "var and std": lambda x: x.var((2, 3)) * x.std((2, 3)),
}


def _cases() -> dict[str, tuple[str, Callable[[], nn.Module]]]:
    found: dict[str, tuple[str, Callable[[], nn.Module]]] = {}

    def add(name: str, view: str, make: Callable[[], nn.Module]) -> None:
        found[name] = view, make

    for name in (
        "CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid "
        "Mish PReLU RReLU ReLU ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh "
        "Tanhshrink AlphaDropout Dropout Dropout2d FeatureAlphaDropout Softmax2d"
    ).split():
        settings = {"dim": 1} if name == "GLU" else {}
        add(name, "map", lambda name=name, settings=settings: getattr(nn, name)(**settings))
    for name in "LogSoftmax Softmax Softmin".split():
        add(name, "map", lambda name=name: getattr(nn, name)(1))
    for name in "CELU ELU Hardtanh Hardswish LeakyReLU ReLU SELU SiLU".split():
        add(f"{name} in place", "map", lambda name=name: getattr(nn, name)(inplace=True))
    add("GELU tanh", "map", lambda: nn.GELU("tanh"))
    add("Threshold", "map", lambda: nn.Threshold(0.1, 0.2))
    views = {1: "line", 2: "map", 3: "volume"}
    for n, view in views.items():
        channels = 2 if n == 3 else 4
        for name in "AdaptiveAvgPool AdaptiveMaxPool".split():
            for size in (1, 2):
                add(
                    f"{name}{n}d {size}",
                    view,
                    lambda name=name, n=n, size=size: getattr(nn, f"{name}{n}d")(size),
                )
        for name in "AvgPool MaxPool".split():
            add(f"{name}{n}d", view, lambda name=name, n=n: getattr(nn, f"{name}{n}d")(2))
        add(f"LPPool{n}d", view, lambda n=n: getattr(nn, f"LPPool{n}d")(2, 2))
        for name in "CircularPad ReflectionPad ReplicationPad ZeroPad ConstantPad".split():
            more = (0.5,) if name == "ConstantPad" else ()
            add(
                f"{name}{n}d",
                view,
                lambda name=name, n=n, more=more: getattr(nn, f"{name}{n}d")(1, *more),
            )
        for name in "Conv ConvTranspose".split():
            add(
                f"{name}{n}d",
                view,
                lambda name=name, n=n, c=channels: getattr(nn, f"{name}{n}d")(c, 3, 2),
            )
        pools = f"MaxPool{n}d", f"MaxUnpool{n}d"
        add(pools[1], view, lambda pools=pools: Unpool(*(getattr(nn, p) for p in pools)))
        for name in ("BatchNorm", "InstanceNorm"):
            for label, options in {
                "": {},
                " affine" if name == "InstanceNorm" else " plain": {
                    "affine": name == "InstanceNorm"
                },
                " tracked" if name == "InstanceNorm" else " untracked": {
                    "track_running_stats": name == "InstanceNorm"
                },
            }.items():
                add(
                    f"{name}{n}d{label}",
                    view,
                    lambda name=name, n=n, c=channels, o=options: getattr(nn, f"{name}{n}d")(
                        c, **o
                    ),
                )
        add(f"GroupNorm {n}d", view, lambda c=channels: nn.GroupNorm(2, c))
    add("Dropout1d", "line", nn.Dropout1d)
    add("Dropout3d", "volume", nn.Dropout3d)
    add("FractionalMaxPool2d", "map", lambda: nn.FractionalMaxPool2d(2, output_size=2))
    add("FractionalMaxPool3d", "volume", lambda: nn.FractionalMaxPool3d((1, 2, 2), (1, 2, 2)))
    add("GroupNorm plain", "map", lambda: nn.GroupNorm(4, 4, affine=False))
    add("LayerNorm", "tokens", lambda: nn.LayerNorm(4))
    add("LayerNorm map", "map", lambda: nn.LayerNorm((4, 4, 4)))
    add("LayerNorm plain", "tokens", lambda: nn.LayerNorm(4, elementwise_affine=False))
    add("LayerNorm unshifted", "tokens", lambda: nn.LayerNorm(4, bias=False))
    add("RMSNorm", "tokens", lambda: nn.RMSNorm(4))
    add("BatchNorm1d rows", "rows", lambda: nn.BatchNorm1d(4))
    add("BatchNorm2d cumulative", "map", lambda: nn.BatchNorm2d(4, momentum=None))
    add("LocalResponseNorm", "map", lambda: nn.LocalResponseNorm(2))
    add("CrossMapLRN2d", "map", lambda: nn.CrossMapLRN2d(2))
    add("ChannelShuffle", "map", lambda: nn.ChannelShuffle(2))
    add("PixelShuffle", "map", lambda: nn.PixelShuffle(2))
    add("PixelUnshuffle", "map", lambda: nn.PixelUnshuffle(2))
    for mode in "nearest bilinear bicubic area nearest-exact".split():
        add(f"Upsample {mode}", "map", lambda mode=mode: nn.Upsample(scale_factor=2, mode=mode))
    add("Upsample linear", "line", lambda: nn.Upsample(scale_factor=2, mode="linear"))
    add("Upsample trilinear", "volume", lambda: nn.Upsample(scale_factor=2, mode="trilinear"))
    add("UpsamplingBilinear2d", "map", lambda: nn.UpsamplingBilinear2d(scale_factor=2))
    add("UpsamplingNearest2d", "map", lambda: nn.UpsamplingNearest2d(scale_factor=2))
    add("Flatten", "map", nn.Flatten)
    add("Unflatten", "map", lambda: nn.Unflatten(1, (2, 2)))
    add("Unfold", "map", lambda: nn.Unfold(2))
    add("Fold", "map", lambda: nn.Sequential(nn.Unfold(2), nn.Fold((4, 4), 2)))
    add("Linear", "tokens", lambda: nn.Linear(4, 3))
    add("Linear unshifted", "tokens", lambda: nn.Linear(4, 3, bias=False))
    add("Bilinear", "rows", lambda: Twice(nn.Bilinear(4, 4, 3)))
    add("CosineSimilarity", "map", lambda: Twice(nn.CosineSimilarity()))
    add("PairwiseDistance", "rows", lambda: Twice(nn.PairwiseDistance()))
    add("Embedding", "rows", lambda: Lookup(nn.Embedding(3, 4), 1))
    for mode in ("sum", "mean", "max"):
        add(f"EmbeddingBag {mode}", "rows", lambda m=mode: Lookup(nn.EmbeddingBag(3, 4, mode=m), 2))
    for name in "RNN LSTM GRU".split():
        add(name, "tokens", lambda name=name: getattr(nn, name)(4, 3, batch_first=True))
        add(f"{name}Cell", "rows", lambda name=name: getattr(nn, f"{name}Cell")(4, 3))
    add(
        "LSTM two layers",
        "tokens",
        lambda: nn.LSTM(4, 2, 2, batch_first=True, bidirectional=True, dropout=0.2),
    )
    add("MultiheadAttention", "tokens", lambda: Attention(need_weights=False))
    add("MultiheadAttention weights", "tokens", lambda: Attention(need_weights=True))
    block = {"d_model": 4, "nhead": 2, "dim_feedforward": 6, "batch_first": True}
    add("TransformerEncoderLayer", "tokens", lambda: nn.TransformerEncoderLayer(**block))
    add(
        "TransformerEncoder",
        "tokens",
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**block, norm_first=True), 1, enable_nested_tensor=False
        ),
    )
    add("TransformerDecoderLayer", "tokens", lambda: Twice(nn.TransformerDecoderLayer(**block)))
    add(
        "TransformerDecoder",
        "tokens",
        lambda: Twice(nn.TransformerDecoder(nn.TransformerDecoderLayer(**block), 1)),
    )
    small = {k: v for k, v in block.items() if k != "d_model"}
    add(
        "Transformer",
        "tokens",
        lambda: Twice(nn.Transformer(4, num_encoder_layers=1, num_decoder_layers=1, **small)),
    )
    for name in "weight_norm spectral_norm orthogonal".split():
        add(
            f"{name} Linear",
            "rows",
            lambda name=name: getattr(parametrizations, name)(nn.Linear(4, 3)),
        )
    for name in "weight_norm spectral_norm".split():
        add(
            f"{name} Conv2d",
            "map",
            lambda name=name: getattr(parametrizations, name)(nn.Conv2d(4, 3, 2)),
        )
        add(
            f"old {name} Linear", "rows", lambda name=name: getattr(nn.utils, name)(nn.Linear(4, 3))
        )
    add(
        "Conv2d many",
        "map",
        lambda: nn.Conv2d(4, 4, 3, padding="same", groups=2, dilation=2, padding_mode="reflect"),
    )
    for name, function in FUNCTIONS.items():
        add(name, "map", lambda function=function: Own(function))
    return found


#: For each layer, the view of its input and a function that makes it.
LAYERS = _cases()
#: Classes of torch.nn that are no layers by themselves.
NO_LAYERS = set(
    "Container DataParallel Module ModuleDict ModuleList ParameterDict ParameterList RNNBase "
    "RNNCellBase Sequential SyncBatchNorm".split()
)


def unlisted() -> list[str]:
    """Layers of torch.nn without a case; losses, and layers that become others, are left out."""
    names = {
        name
        for name in dir(nn)
        if isinstance(getattr(nn, name), type) and issubclass(getattr(nn, name), nn.Module)
    }
    listed = {name.split()[0] for name in LAYERS} | NO_LAYERS
    return sorted(n for n in names - listed if "Loss" not in n and not n.startswith("Lazy"))


class LayerNet(nn.Module):
    """A convolution, the layer, and two outputs.

    Args:
        name: name of the layer in :data:`LAYERS`.
        channels_last: memory format of weights and images.
        training: mode of the network.
    """

    def __init__(self, name: str, *, channels_last: bool, training: bool) -> None:
        super().__init__()
        view, make = LAYERS[name]
        self.stem = nn.Conv2d(2, 4, 3)
        self.view = VIEWS[view]
        self.layer = make()
        # Not the values that make a norm's scale and shift do nothing.
        with torch.no_grad():
            for parameter in self.layer.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn(parameter.shape) / 4)
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.double().train(training)
        for parameter in self.parameters():
            if channels_last and parameter.dim() in (4, 5):
                last = (torch.channels_last, torch.channels_last_3d)[parameter.dim() - 4]
                parameter.data = parameter.data.to(memory_format=last)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        # A copy, because a layer in place would change what else is computed from it.
        found = self.layer(self.view(self.stem(images)) * 1.3)
        while isinstance(found, tuple):
            found = found[0]
        return {"flat": found.flatten(1) if found.dim() > 1 else found[:, None]}


def functions_of(net: LayerNet, images: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    """The network as a function of its parameters; buffers are not changed."""
    images = images.to(memory_format=net.format)
    start = copy.deepcopy(dict(net.named_buffers()))

    def outputs(params: dict[str, Tensor]) -> Any:
        buffers = {name: value.clone() for name, value in start.items()}
        return torch.func.functional_call(net, {**params, **buffers}, (images,))

    return outputs
