"""Networks in stages: sizes, auxiliary heads, adapters, derivatives and error messages."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from helpers.torchvision_record import NETWORKS
from mclfast import models
from mclfast.models.staged import fresh_copy

# name: parameters, mega-MACs, the same with auxiliary heads where published (32 px, 100 classes).
SIZES: dict[str, tuple[int, float, int | None, float | None]] = {
    "resnet32": (472_756, 69.13, 1_281_852, 136.8),
    "resnet56": (861_620, 125.75, 2_336_828, 250.0),
    "resnet110": (1_170_868, 167.45, 3_181_948, 337.4),
    "wrn_16_2": (703_284, 101.12, 1_911_484, 201.8),
    "wrn_40_2": (2_255_156, 327.61, 6_122_684, 654.8),
    "wrn_28_4": (5_872_180, 845.62, 15_961_212, 1701.3),
    "shufflenet_v2_x0_5_cifar": (444_292, 10.99, 1_272_060, 24.4),
    "shufflenet_v2_x1_0_cifar": (1_356_104, 45.09, 3_762_356, 99.3),
    "hcgnet_a1": (1_102_651, 154.27, 2_581_080, 270.4),
    "hcgnet_a2": (3_133_679, 488.67, 7_248_225, 806.8),
    "vgg16": (14_774_436, 313.25, None, None),
    "densenet_40_12": (188_092, 72.38, None, None),
    "wrn_20_8": (6_871_220, 1022.83, None, None),
}
# name: maps after the stages, width of the feature (32 px).
TAPS = {
    "resnet32": ([(16, 32, 32), (32, 16, 16), (64, 8, 8)], 64),
    "resnet56": ([(16, 32, 32), (32, 16, 16), (64, 8, 8)], 64),
    "resnet110": ([(64, 32, 32), (128, 16, 16), (256, 8, 8)], 256),
    "wrn_16_2": ([(32, 32, 32), (64, 16, 16), (128, 8, 8)], 128),
    "wrn_40_2": ([(32, 32, 32), (64, 16, 16), (128, 8, 8)], 128),
    "wrn_28_4": ([(64, 32, 32), (128, 16, 16), (256, 8, 8)], 256),
    "wrn_20_8": ([(64, 32, 32), (128, 16, 16), (256, 8, 8)], 256),
    "shufflenet_v2_x0_5_cifar": ([(48, 16, 16), (96, 8, 8), (192, 4, 4)], 1024),
    "shufflenet_v2_x1_0_cifar": ([(116, 16, 16), (232, 8, 8), (464, 4, 4)], 1024),
    "hcgnet_a1": ([(60, 16, 16), (126, 8, 8), (414, 8, 8)], 414),
    "hcgnet_a2": ([(120, 16, 16), (204, 8, 8), (716, 8, 8)], 716),
    "vgg16": ([(256, 8, 8), (512, 4, 4), (512, 2, 2)], 512),
    "densenet_40_12": ([(48, 16, 16), (60, 8, 8), (132, 8, 8)], 132),
}
CIFAR_FAMILIES = [
    lambda: models.resnet8(num_classes=5),
    lambda: models.CifarResNet(models.resnet.Bottleneck, 1, num_classes=5),
    lambda: models.WideResNet(10, 1, num_classes=5),
]


def slim_resnet(block: type[nn.Module]) -> models.ImageNetResNet:
    return models.ImageNetResNet(block, (1, 2, 1, 1), num_classes=5, width=4)


POOLED_FAMILIES = [
    lambda: models.CifarShuffleNetV2((8, 12, 16), num_classes=5, feature_width=20),
    lambda: models.Vgg(((4, 2), (6, 1), (8, 1), (8, 1)), num_classes=5),
    lambda: models.CifarDenseNet(2, 4, num_classes=5),
    lambda: models.HcgNet((4, 4, 8), 2, num_classes=5),
]
FAMILIES = [
    *CIFAR_FAMILIES,
    *POOLED_FAMILIES,
    lambda: slim_resnet(models.imagenet_resnet.BasicBlock),
    lambda: slim_resnet(models.imagenet_resnet.Bottleneck),
    lambda: models.ImageNetShuffleNetV2((8, 12, 16), num_classes=5, feature_width=20),
]


def norm_stage(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.Tanh(),
    )


class HandWritten(nn.Module):
    """Two stages below a container, a normalisation before the pooling, an odd classifier name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"first": norm_stage(3, 5), "second": norm_stage(5, 7)})
        self.norm = nn.BatchNorm2d(7)
        self.head = nn.Linear(7, 4)

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.body["second"](self.body["first"](x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Summed(HandWritten):
    def features(self, x: Tensor) -> Tensor:
        y = self.body["first"](x)
        return self.norm(self.body["second"](y + x.mean()))


class Swapped(HandWritten):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"first": norm_stage(5, 7), "second": norm_stage(3, 5)})

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.body["first"](self.body["second"](x)))


class Repeated(HandWritten):
    def features(self, x: Tensor) -> Tensor:
        self.body["first"](x)
        return super().features(x)


class InPlace(HandWritten):
    def __init__(self) -> None:
        super().__init__()
        self.body["second"].insert(0, nn.ReLU(inplace=True))


class Widened(HandWritten):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.features(x), (1, 2)).flatten(1))


class Keyword(HandWritten):
    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.body["second"](input=self.body["first"](x)))


class TwoOutputs(HandWritten):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(x)
        return logits, logits


class Scale(nn.Module):
    """Owns a parameter and has no reset_parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def adapt(module: nn.Module) -> models.StagedNetwork:
    return models.staged(module, ["body.first", "body.second"], classifier="head", tail=["norm"])


@pytest.mark.parametrize("name", SIZES)
def test_sizes_match_the_published_networks(name: str) -> None:
    params, mega, params_with_heads, mega_with_heads = SIZES[name]
    with torch.device("meta"):
        backbone = models.create(name)
    assert models.parameter_count(backbone) == params
    assert round(models.macs(backbone, 32, 3) / 1e6, 2) == mega
    if params_with_heads is None:
        return
    peer = models.PeerNetwork(backbone)
    assert models.parameter_count(peer) == params_with_heads
    assert round(models.macs(peer, 32, 3) / 1e6, 1) == mega_with_heads


@pytest.mark.parametrize("name", TAPS)
def test_taps_match_the_published_networks(name: str) -> None:
    with torch.device("meta"):
        backbone = models.create(name)
    taps = backbone.forward_taps(torch.empty(2, 3, 32, 32, device="meta"))
    assert ([tuple(tap.shape[1:]) for tap in taps.maps], backbone.feature_dim) == TAPS[name]


def test_macs_leave_the_module_alone() -> None:
    net = models.resnet8().train()
    before = copy.deepcopy(net.state_dict())
    models.macs(net, 8, 3)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_registry() -> None:
    assert set(SIZES) | set(NETWORKS) | {"resnet8", "resnet20"} == set(models.available())
    net = models.create("resnet8", num_classes=7, in_channels=1)
    assert net.num_classes == 7 and net.stem_forward(torch.randn(1, 1, 8, 8)).shape[1] == 16
    for name in models.available():
        assert callable(getattr(models, name))


@pytest.mark.parametrize("make", CIFAR_FAMILIES)
@pytest.mark.parametrize("size", [8, 16, 32, 19])
def test_shapes(make, size: int) -> None:
    peer = models.PeerNetwork(make())
    x = torch.randn(3, 3, size, size)
    taps = peer.backbone.forward_taps(x)
    sides = [size, (size + 1) // 2, ((size + 1) // 2 + 1) // 2]
    assert [tuple(tap.shape[2:]) for tap in taps.maps] == [(side, side) for side in sides]
    out = peer(x)
    assert peer.num_stages == len(out.features) == len(out.logits) == 3
    assert {tuple(f.shape) for f in out.features} == {(3, peer.feature_dim)}
    assert {tuple(z.shape) for z in out.logits} == {(3, 5)}


@pytest.mark.parametrize("make", POOLED_FAMILIES)
@pytest.mark.parametrize("size", [1, 8, 19])
def test_any_image_size(make, size: int) -> None:
    out = models.PeerNetwork(make())(torch.randn(3, 3, size, size))
    assert {tuple(z.shape) for z in out.logits} == {(3, 5)} and len(out.logits) == 3
    assert all(z.isfinite().all() for z in out.logits)


def test_one_input_channel() -> None:
    maps = models.resnet110(in_channels=1).eval().forward_taps(torch.randn(1, 1, 32, 32)).maps
    assert len(maps) == 3
    for name in TAPS:
        with torch.device("meta"):
            network = models.create(name, num_classes=7, in_channels=1).eval()
            assert network(torch.empty(1, 1, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", FAMILIES)
def test_outputs_run_from_the_first_head_to_the_backbone(make, training: bool) -> None:
    peer = models.PeerNetwork(make()).train(training)
    x = torch.randn(4, 3, 16, 16)
    out, taps = peer(x), peer.backbone.forward_taps(x)
    assert torch.equal(out.logits[-1], peer.backbone(x))
    assert torch.equal(out.features[-1], taps.feature)
    for index, head in enumerate(peer.auxiliary):
        feature, logits = head(taps.maps[index])
        assert torch.equal(out.features[index], feature)
        assert torch.equal(out.logits[index], logits)


def test_wide_resnet_taps_come_before_the_tail() -> None:
    net = models.WideResNet(10, 1).eval()
    taps = net.forward_taps(torch.randn(2, 3, 8, 8))
    assert (taps.maps[-1] < 0).any()
    assert torch.equal(taps.feature, net.tail(taps.maps[-1]).mean((2, 3)))


def test_dense_layers_keep_their_input() -> None:
    x = torch.randn(2, 8, 5, 5)
    for layer in (models.densenet.DenseLayer(8, 4), models.hcgnet.SmgModule(8, 4)):
        out = layer.eval()(x)
        assert out.shape == (2, 12, 5, 5) and torch.equal(out[:, :8], x)


def test_gates_of_hcgnet() -> None:
    """A context is a weighted mean; one gate scales channels, the other mixes two contexts."""
    torch.manual_seed(0)
    x = torch.randn(3, 6, 4, 5)
    context = models.hcgnet.ContextPool(6)
    score = torch.einsum("bchw,c->bhw", x, context.score.weight[0, :, 0, 0]).flatten(1)
    wanted = torch.einsum("bcp,bp->bc", x.flatten(2), score.softmax(1))
    torch.testing.assert_close(context(x), wanted)
    forget = models.hcgnet.ForgetGate(6, 2)
    factor = forget(x) / x
    torch.testing.assert_close(factor, factor[:, :, :1, :1].expand_as(x))
    assert 0 < factor.min() and factor.max() < 1
    update = models.hcgnet.UpdateGate(6, 2)
    low, high = torch.stack([scale(x) for scale in update.scales]).sort(dim=0).values
    mixed = update(x)[:, :, 0, 0]
    assert ((low < mixed) & (mixed < high)).all()
    # Neither parameters nor MACs tell the two scales apart.
    for dilation, scale in enumerate(update.scales, start=1):
        conv, y = scale[0][-1], torch.randn(2, 6, 9, 9)
        wanted = F.conv2d(y, conv.weight, padding=dilation, dilation=dilation, groups=6)
        torch.testing.assert_close(conv(y), wanted)
    gated = models.hcgnet.GatedResidual(6, 2)
    torch.testing.assert_close(gated(x), gated.forget(x) + gated.update(x).expand_as(x))


def perturbed(module: nn.Module) -> nn.Module:
    """In evaluation mode and float64, with no statistic, gain or bias left at its start."""
    torch.manual_seed(0)
    for value in (*module.parameters(), *module.buffers()):
        if value.dim() == 1:
            torch.nn.init.uniform_(value, 0.5, 1.5)
    return module.double().eval()


def active(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return norm64(norm, x).clamp_min(0)


def norm64(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    scale = norm.weight / (norm.running_var + 1e-5).sqrt()
    return (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


def conv64(conv: nn.Conv2d, x: Tensor, stride: int = 1) -> Tensor:
    size = conv.weight.shape[-1]
    return F.conv2d(x, conv.weight, conv.bias, stride=stride, padding=size // 2)


@torch.no_grad()
def test_blocks_of_resnets() -> None:
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    b = perturbed(models.resnet.BasicBlock(4, 6, 2))
    out = norm64(b.bn2, conv64(b.conv2, active(b.bn1, conv64(b.conv1, x, 2))))
    short = norm64(b.shortcut[1], conv64(b.shortcut[0], x, 2))
    torch.testing.assert_close(b(x), (out + short).clamp_min(0))
    b = perturbed(models.resnet.Bottleneck(4, 1, 1))
    out = active(b.bn2, conv64(b.conv2, active(b.bn1, conv64(b.conv1, x))))
    out = norm64(b.bn3, conv64(b.conv3, out))
    torch.testing.assert_close(b(x), (out + x).clamp_min(0))
    # Pre-activated: the shortcut that changes the shape starts behind norm and ReLU, the other not.
    for width, stride in ((6, 2), (4, 1)):
        w = perturbed(models.wrn.PreActivationBlock(4, width, stride))
        first = active(w.bn1, x)
        out = conv64(w.conv2, active(w.bn2, conv64(w.conv1, first, stride)))
        short = x if w.shortcut is None else conv64(w.shortcut, first, stride)
        torch.testing.assert_close(w(x), out + short)


@torch.no_grad()
def test_vgg_takes_maxima_and_a_dense_net_means() -> None:
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    net = perturbed(models.Vgg(((4, 1), (5, 2), (6, 1), (7, 1)), num_classes=5))
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    y = x
    for index, (conv, norm) in enumerate(zip(layers[::2], layers[1::2], strict=True)):
        # Each group but the first starts with a pooling.
        if index in (1, 3, 4):
            y = y.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5))
        y = active(norm, conv64(conv, y))
    torch.testing.assert_close(net(x), net.fc(y.mean((2, 3))))
    dense = perturbed(models.CifarDenseNet(2, 4, num_classes=5))
    layers = [m for m in dense.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    y = conv64(layers[0], x)
    for block, start in enumerate((1, 11, 21)):
        for first in (start, start + 4):
            norm1, conv1, norm2, conv2 = layers[first : first + 4]
            y = torch.cat((y, conv64(conv2, active(norm2, conv64(conv1, active(norm1, y))))), 1)
        if block < 2:
            y = conv64(layers[start + 9], active(layers[start + 8], y))
            y = y.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))
    torch.testing.assert_close(dense(x), dense.fc(active(layers[-1], y).mean((2, 3))))


def test_without_heads() -> None:
    peer = models.PeerNetwork(models.resnet8(), auxiliary_heads=False)
    assert peer.num_stages == 1 and len(peer.auxiliary) == 0
    assert len(peer(torch.randn(2, 3, 8, 8)).logits) == 1


def test_one_stage_has_no_head() -> None:
    net = models.staged(HandWritten(), ["norm"], classifier="head")
    assert len(models.PeerNetwork(net).auxiliary) == 0


@pytest.mark.parametrize("make", [*FAMILIES, lambda: adapt(HandWritten())])
def test_heads_are_fresh_trainable_and_seeded(make) -> None:
    backbone = make().eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.fill_(3.0).requires_grad_(False)
        for buffer in backbone.buffers():
            buffer.fill_(2)
    torch.manual_seed(1)
    first = models.PeerNetwork(backbone).auxiliary
    torch.manual_seed(1)
    again = models.PeerNetwork(backbone).auxiliary
    other = models.PeerNetwork(backbone).auxiliary
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    for key, parameter in first.named_parameters():
        assert parameter.requires_grad and not (parameter == 3).any(), key
        if parameter.dim() > 1:
            assert not torch.equal(parameter, other.get_parameter(key)), key
    assert all(not (buffer == 2).any() for buffer in first.buffers())
    assert all((head.classifier.bias == 0).all() for head in first)
    assert all((parameter == 3).all() for parameter in backbone.parameters())
    storages = [p.data_ptr() for p in (*first.parameters(), *backbone.parameters())]
    assert len(set(storages)) == len(storages)


def test_heads_use_the_initialisation_of_the_backbone() -> None:
    torch.manual_seed(0)
    backbone = models.resnet32()
    head = models.AuxiliaryHead(backbone, 0)
    for conv in (backbone.layer3[-1].conv2, head.stages[-1][-1].conv2):
        # Kaiming normal, fan out of 64 x 3 x 3; the default of torch gives a third of it.
        assert conv.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("make", "kaiming"),
    [
        (lambda: models.CifarResNet(models.resnet.BasicBlock, 2), True),
        (lambda: models.CifarResNet(models.resnet.Bottleneck, 1), True),
        (lambda: models.WideResNet(10, 2), True),
        (lambda: models.CifarShuffleNetV2((48, 96, 192), feature_width=256), False),
        (lambda: models.HcgNet((16, 16, 16), 2), False),
    ],
)
def test_initial_weights(make, kaiming: bool) -> None:
    """Convolutions: Kaiming normal, fan out, or the default of torch, uniform in the fan in."""
    torch.manual_seed(0)
    peer = models.PeerNetwork(make())
    for module in peer.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            weight, fan_in = module.weight, module.weight[0].numel()
            fan_out = module.out_channels * weight[0, 0].numel()
            wanted = (2 / fan_out) ** 0.5 if kaiming else (3 * fan_in) ** -0.5
            assert weight.std().item() == pytest.approx(wanted, rel=0.05)
            # A normal distribution has tails, a uniform one has none.
            assert (weight.abs().max() > 2.5 * wanted) == kaiming
        if isinstance(module, nn.BatchNorm2d):
            # No residual branch starts at zero.
            assert (module.weight == 1).all() and (module.bias == 0).all()
        if isinstance(module, nn.Linear):
            default = (3 * module.in_features) ** -0.5
            assert module.weight.std().item() == pytest.approx(default, rel=0.2)
    zeroed = isinstance(peer.backbone, models.WideResNet)
    assert (peer.backbone.classifier.bias == 0).all() == zeroed
    assert all((head.classifier.bias == 0).all() for head in peer.auxiliary)


@pytest.mark.parametrize("make", FAMILIES)
def test_what_follows_leaves_the_maps_alone(make) -> None:
    """An in-place operation at the start of a stage or of the tail would change a tap."""
    peer, kept = models.PeerNetwork(make()).train(), []
    for stage in peer.backbone.stages:
        stage.register_forward_hook(lambda _, __, out: kept.append(out.detach().clone()))
    taps = peer.backbone.forward_taps(torch.randn(4, 3, 16, 16))
    final = taps.final_map.detach().clone()
    peer.head_outputs(taps)
    assert all(map(torch.equal, taps.maps, kept)) and len(kept) == len(taps.maps)
    assert torch.equal(taps.final_map, final)


def test_heads_take_over_the_dtype() -> None:
    peer = models.PeerNetwork(models.resnet8().double())
    assert {p.dtype for p in peer.parameters()} == {torch.float64}


def test_refinement_can_be_overridden() -> None:
    class Shallow(models.CifarResNet):
        def refinement(self, stage_index: int) -> list[nn.Module]:
            width = (16, 32)[stage_index]
            return [nn.Sequential(nn.Conv2d(width, 64, 1), Scale())]

    peer = models.PeerNetwork(Shallow(models.resnet.BasicBlock, 1))
    assert [tuple(f.shape) for f in peer(torch.randn(2, 3, 8, 8)).features] == [(2, 64)] * 3


def test_tail_may_be_a_plain_submodule() -> None:
    class WithTail(models.CifarResNet):
        def __init__(self) -> None:
            super().__init__(models.resnet.BasicBlock, 1)
            self.tail = nn.BatchNorm2d(64)

    net = WithTail()
    assert isinstance(net.tail, nn.BatchNorm2d)
    assert isinstance(models.AuxiliaryHead(net, 0).tail, nn.BatchNorm2d)


def outer_value(peer: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """One differentiable SGD step on all heads, then the loss after it."""
    params = dict(peer.named_parameters())
    inner = sum(F.cross_entropy(z, y) for z in peer(x).logits)
    grads = torch.autograd.grad(inner, list(params.values()), create_graph=True)
    stepped = {k: p - 0.1 * g for (k, p), g in zip(params.items(), grads, strict=True)}
    out = functional_call(peer, stepped, (x,))
    loss = sum(F.cross_entropy(z, y) for z in out.logits)
    loss = loss + sum(f.square().mean() for f in out.features)
    return loss, list(params.values())


@pytest.mark.parametrize("make", [*FAMILIES, lambda: adapt(HandWritten())])
def test_double_backward_through_a_step(make) -> None:
    torch.manual_seed(0)
    peer = models.PeerNetwork(make()).train()
    loss, params = outer_value(peer, torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
    grads = torch.autograd.grad(loss, params)
    assert all(g.isfinite().all() for g in grads)
    assert sum(g.abs().sum() for g in grads) > 0


@pytest.mark.parametrize("make", FAMILIES)
def test_second_derivative_matches_finite_differences(make) -> None:
    """In-place ReLUs must not corrupt what the second backward pass reads."""
    torch.manual_seed(0)
    peer = models.PeerNetwork(make()).double().train()
    x, y = torch.randn(4, 3, 8, 8).double(), torch.tensor([0, 1, 2, 3])
    params = {k: p.detach() for k, p in peer.named_parameters()}
    # A step this short, over all parameters together, crosses no kink of a ReLU.
    size = sum(p.numel() for p in params.values()) ** 0.5
    direction = {k: torch.randn_like(p) / size for k, p in params.items()}

    def gradient(step: float) -> tuple[list[Tensor], list[Tensor]]:
        moved = {k: (p + step * direction[k]).requires_grad_() for k, p in params.items()}
        out = functional_call(peer, moved, (x,))
        loss = sum(F.cross_entropy(z, y) for z in out.logits)
        leaves = list(moved.values())
        return list(torch.autograd.grad(loss, leaves, create_graph=True)), leaves

    grads, leaves = gradient(0.0)
    inner = sum((g * v).sum() for g, v in zip(grads, direction.values(), strict=True))
    exact = torch.cat([h.flatten() for h in torch.autograd.grad(inner, leaves)])
    eps = 1e-6
    plus, minus = gradient(eps)[0], gradient(-eps)[0]
    numeric = torch.cat(
        [((a - b) / (2 * eps)).detach().flatten() for a, b in zip(plus, minus, strict=True)]
    )
    assert (exact - numeric).norm() < 1e-6 * exact.norm()


def test_gradcheck() -> None:
    torch.manual_seed(0)
    peer = models.PeerNetwork(models.WideResNet(10, 1, num_classes=2, in_channels=1)).double()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: sum(peer(v)[:2], ()), (x,), fast_mode=True)
    smooth = models.PeerNetwork(adapt(HandWritten())).double()
    y = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: sum(smooth(v)[:2], ()), (y,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda v: sum(smooth(v)[:2], ()), (y,), fast_mode=True)


@pytest.mark.parametrize("training", [True, False])
def test_adapted_module_gives_its_own_logits(training: bool) -> None:
    module = HandWritten().train(training)
    net = adapt(module)
    x = torch.randn(3, 3, 16, 16)
    taps = net.forward_taps(x)
    assert torch.equal(taps.logits, module(x)) and torch.equal(net(x), module(x))
    assert [tuple(tap.shape) for tap in taps.maps] == [(3, 5, 8, 8), (3, 7, 4, 4)]
    assert torch.equal(taps.feature, module.features(x).mean((2, 3)))
    assert (net.feature_dim, net.num_classes) == (7, 4)
    out = models.PeerNetwork(net)(x)
    assert [tuple(z.shape) for z in out.logits] == [(3, 4)] * 2
    with torch.inference_mode():
        assert torch.equal(net.forward_taps(x).logits, net(x))


def test_classifier_input_may_be_a_keyword() -> None:
    class KeywordHead(HandWritten):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(input=self.features(x).mean((2, 3)))

    assert adapt(KeywordHead()).forward_taps(torch.randn(2, 3, 8, 8)).feature.shape == (2, 7)


def test_adapted_module_trains_its_heads() -> None:
    peer = models.PeerNetwork(adapt(HandWritten()))
    sum(z.square().sum() for z in peer(torch.randn(3, 3, 8, 8)).logits).backward()
    # Zero-initialised classifier biases still receive a gradient; every parameter takes part.
    assert all(p.grad is not None for p in peer.parameters())


def test_adapted_module_copies_and_pickles_without_hooks() -> None:
    net = adapt(HandWritten()).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = net.forward_taps(x)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    for clone in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(clone.forward_taps(x).feature, expected.feature)
    assert list(net.state_dict()) == [f"module.{key}" for key in HandWritten().state_dict()]


def test_hooks_are_removed_after_an_error() -> None:
    net = adapt(HandWritten())
    with pytest.raises(RuntimeError):
        net.forward_taps(torch.randn(2, 1, 8, 8))
    assert not any(module._forward_hooks for module in net.modules())


def test_adapted_module_under_functional_call() -> None:
    peer = models.PeerNetwork(adapt(HandWritten())).eval()
    x = torch.randn(2, 3, 8, 8)
    zeros = {key: torch.zeros_like(p) for key, p in peer.named_parameters()}
    assert all((z == 0).all() for z in functional_call(peer, zeros, (x,)).logits)
    assert not any((z == 0).all() for z in peer(x).logits)

    def loss(params: dict[str, Tensor]) -> Tensor:
        return sum(z.square().sum() for z in functional_call(peer, params, (x,)).logits)

    params = {key: p.detach() for key, p in peer.named_parameters()}
    grads = torch.func.grad(loss)(params)
    leaves = {key: p.clone().requires_grad_() for key, p in params.items()}
    expected = torch.autograd.grad(loss(leaves), list(leaves.values()))
    for grad, value in zip(grads.values(), expected, strict=True):
        torch.testing.assert_close(grad, value)


def test_adapted_torchvision_resnet() -> None:
    try:
        from torchvision.models import resnet18
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"torchvision does not import here: {str(error).splitlines()[0]}")
    module = resnet18(num_classes=6).eval()
    net = models.staged(module, ["layer1", "layer2", "layer3", "layer4"])
    assert list(net.state_dict()) == [f"module.{key}" for key in module.state_dict()]
    x = torch.randn(2, 3, 64, 64)
    peer = models.PeerNetwork(net)
    out = peer(x)
    assert torch.equal(out.logits[-1], module(x))
    assert [tuple(f.shape) for f in out.features] == [(2, 512)] * 4
    assert [tuple(tap.shape[1:]) for tap in net.forward_taps(x).maps] == [
        (64, 16, 16),
        (128, 8, 8),
        (256, 4, 4),
        (512, 2, 2),
    ]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            Swapped,
            r"stages: expected the forward pass to run body.first, body.second, norm, "
            r"head, each once and in this order, got body.second, body.first, norm, head",
        ),
        (Repeated, r"stages: expected .* got body.first, body.first, body.second, norm, head"),
        (
            Summed,
            r"stages: expected the input of 'body.second' to be the output of 'body.first'"
            r", got another value \(shape \(2, 5, 4, 4\) after shape \(2, 5, 4, 4\)\)",
        ),
        (
            Keyword,
            r"stages: expected 'body.second' to take one positional input, got 0 "
            r"positional and 1 keyword",
        ),
        (
            Widened,
            r"tail: expected a map of 14 channels, classifier.in_features, before "
            r"pooling, got shape \(2, 7, 2, 2\)",
        ),
        (TwoOutputs, r"module: expected the output of the module to be \[B, 4\], got tuple"),
    ],
)
def test_forward_errors_of_the_adapter(module: type[nn.Module], message: str) -> None:
    net = adapt(module())
    with pytest.raises(ValueError, match=message) as error:
        net.forward_taps(torch.randn(2, 3, 8, 8))
    assert "\n" not in str(error.value)


def test_stages_must_be_batches_of_places() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.Unflatten(1, (5, 1)), nn.Flatten(), nn.Linear(180, 4)
    )
    net = models.staged(module, ["0", "1"], classifier="3")
    message = (
        r"stages: expected a map \[B, c, h, w\] or \[B, h, w, c\], tokens \[B, N, c\] or rows "
        r"\[B, c\] after '1', got shape \(2, 5, 1, 6, 6\)"
    )
    with pytest.raises(ValueError, match=message):
        net.forward_taps(torch.randn(2, 3, 8, 8))


def test_map_must_not_change_in_place() -> None:
    message = "stages: expected the map after 'body.first' to stay as it is, got an in-place"
    # Tanh would lose the value its backward reads, so the forward pass alone is looked at.
    with pytest.raises(ValueError, match=message), torch.no_grad():
        adapt(InPlace()).forward_taps(torch.randn(2, 3, 8, 8))


def test_tail_must_follow_the_last_stage() -> None:
    class Scaled(HandWritten):
        def features(self, x: Tensor) -> Tensor:
            return self.norm(self.body["second"](self.body["first"](x)) * x.mean())

    with pytest.raises(ValueError, match="tail: expected the input of 'norm' to be the output"):
        adapt(Scaled()).forward_taps(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        (
            ["body.frist"],
            {},
            r"stages: expected a submodule of HandWritten, got 'body.frist'; "
            r"close names: body.first",
        ),
        (["zzz"], {}, r"got 'zzz'; close names: body, norm, head"),
        ("body", {}, r"stages: expected a list of names, got the string 'body'"),
        ([[]], {}, r"stages: expected at least one name in each stage, got an empty list"),
        ([], {"classifier": "head", "tail": ["norm"]}, r"tail: expected none without stages"),
        (["norm"], {"classifier": "head", "pool": "max"}, r"pool: .* or 'first', got 'max'"),
        (["norm"], {"classifier": "head", "layout": "NHWC"}, r"layout: .* None, got 'NHWC'"),
        (["norm"], {"classifier": "head", "output": True}, r"output: .* or None, got True"),
        (["body.first"], {}, r"classifier: expected a submodule of HandWritten, got 'fc'"),
        (
            ["body.first"],
            {"classifier": "norm"},
            r"classifier: expected 'norm' to be a Linear, or a Conv2d of one pixel, got "
            r"BatchNorm2d",
        ),
        (
            ["body.first"],
            {"classifier": "head", "tail": ["nrom"]},
            r"tail: expected a submodule of HandWritten, got 'nrom'; close names: norm",
        ),
    ],
)
def test_errors_when_adapting(stages, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.staged(HandWritten(), stages, **options)


def test_other_errors() -> None:
    with pytest.raises(ValueError, match=r"name: expected a known name; got 'resnet23' \(did"):
        models.create("resnet23")
    with pytest.raises(ValueError, match=r"name: expected one of .*, resnet110, .*; got 'zzz'$"):
        models.create("zzz")
    with pytest.raises(ValueError, match=r"depth: expected 6n \+ 4 with n >= 1, got 17"):
        models.WideResNet(17, 2)
    with pytest.raises(ValueError, match=r"stage_index: .* 0 <= index < 2, got 2"):
        models.AuxiliaryHead(models.resnet8(), 2)
    with pytest.raises(ValueError, match="backbone: expected a StagedNetwork, got Linear; adapt"):
        models.PeerNetwork(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"cannot re-initialise Scale at '1': it owns gain but"):
        fresh_copy(nn.Sequential(nn.Linear(2, 2), Scale()))
    module = HandWritten()
    module.body["second"].append(Scale())
    with pytest.raises(ValueError, match=r"cannot re-initialise Scale at '0\.3'.*refinement"):
        models.PeerNetwork(adapt(module))


@pytest.mark.parametrize("attribute", ["stages", "classifier"])
def test_a_subclass_must_say_what_its_parts_are(attribute: str) -> None:
    with pytest.raises(NotImplementedError, match=f"StagedNetwork must define {attribute}"):
        getattr(models.StagedNetwork(), attribute)
    with pytest.raises(NotImplementedError, match="StagedNetwork must define stem_forward"):
        models.StagedNetwork().stem_forward(torch.zeros(1))
