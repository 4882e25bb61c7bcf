"""ImageNet networks: published sizes, torchvision's state dicts, taps, heads, small images."""

import json
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.torchvision_record import CLASSES, NETWORKS, RECORD, layout, outputs
from mclfast import models
from mclfast.cli.main import main
from mclfast.train.export import load_backbone

# name: parameters, mega-MACs, the same with auxiliary heads (224 px, 1000 classes).
SIZES = {
    "resnet18": (11_689_512, 1814.1, 26_316_000, 2894.6),
    "resnet34": (21_797_672, 3663.8, 36_424_160, 4744.3),
    "resnet50": (25_557_032, 4089.2, 53_226_976, 6330.4),
    "shufflenet_v2_x0_5": (1_366_792, 40.5, 5_330_920, 105.2),
    "shufflenet_v2_x1_0": (2_278_604, 144.9, 8_398_400, 394.2),
}
# name: channels of the four maps, width of the feature.
CHANNELS = {
    "resnet18": ([64, 128, 256, 512], 512),
    "resnet34": ([64, 128, 256, 512], 512),
    "resnet50": ([256, 512, 1024, 2048], 2048),
    "shufflenet_v2_x0_5": ([24, 48, 96, 192], 1024),
    "shufflenet_v2_x1_0": ([24, 116, 232, 464], 1024),
}


@pytest.fixture(scope="module")
def torchvision() -> ModuleType:
    try:
        import torchvision.models
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"torchvision does not import here: {str(error).splitlines()[0]}")
    return torchvision.models


def on_meta(name: str, num_classes: int | None = None) -> models.StagedNetwork:
    """Shapes only: weights of this size take long to draw."""
    with torch.device("meta"):
        return models.create(name, num_classes=num_classes)


def perturb(module: nn.Module) -> None:
    """Other values than those of a new network in every weight and statistic."""
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.mul_(torch.empty_like(value).uniform_(0.9, 1.1))
            value.add_(torch.empty_like(value).uniform_(0, 0.01))
        else:
            value.fill_(3)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_match_the_published_networks(name: str) -> None:
    params, mega, params_with_heads, mega_with_heads = SIZES[name]
    backbone = on_meta(name)
    assert models.parameter_count(backbone) == params
    assert round(models.macs(backbone, 224) / 1e6, 1) == mega
    peer = models.PeerNetwork(backbone)
    assert models.parameter_count(peer) == params_with_heads
    assert round(models.macs(peer, 224) / 1e6, 1) == mega_with_heads


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


@pytest.mark.parametrize("name", NETWORKS)
def test_state_dict_has_the_layout_of_torchvision(name: str, record) -> None:
    """Keys, shapes, dtypes and order."""
    assert layout(on_meta(name, CLASSES).state_dict()) == record["layouts"][name]


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_recorded_of_torchvision(name: str, record) -> None:
    expected = torch.tensor(record["outputs"][name])
    found = torch.tensor(outputs(models.create(name, num_classes=CLASSES)))
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("name", NETWORKS)
def test_record_is_that_of_the_installed_torchvision(torchvision, name: str, record) -> None:
    network = getattr(torchvision, name)(num_classes=CLASSES)
    assert layout(network.state_dict()) == record["layouts"][name]
    assert outputs(network) == pytest.approx(record["outputs"][name], rel=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_equal_weights_give_the_outputs_of_torchvision(torchvision: ModuleType, name: str) -> None:
    torch.manual_seed(0)
    ours, theirs = models.create(name, num_classes=7), getattr(torchvision, name)(num_classes=7)
    x = torch.randn(2, 3, 65, 97)
    for source, target in ((ours, theirs), (theirs, ours)):
        perturb(source)
        target.load_state_dict(source.state_dict(), strict=True)
        for training in (True, False):
            torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))


@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.parametrize(("size", "sides"), [(224, [56, 28, 14, 7]), (75, [19, 10, 5, 3])])
def test_taps(name: str, size: int, sides: list[int]) -> None:
    channels, width = CHANNELS[name]
    backbone = on_meta(name)
    taps = backbone.forward_taps(torch.empty(2, 3, size, size, device="meta"))
    expected = [(2, c, side, side) for c, side in zip(channels, sides, strict=True)]
    assert [tuple(tap.shape) for tap in taps.maps] == expected
    assert (backbone.feature_dim, backbone.num_classes) == (width, 1000)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("resnet18", [[1, 1, 1], [1, 1], [1]]),
        ("resnet34", [[1, 1, 1], [1, 1], [1]]),
        ("resnet50", [[1, 1, 1], [1, 1], [1]]),
        ("shufflenet_v2_x0_5", [[2, 2, 2], [8, 4], [4]]),
        ("shufflenet_v2_x1_0", [[2, 2, 2], [8, 4], [4]]),
    ],
)
def test_depth_of_the_heads(name: str, blocks: list[list[int]]) -> None:
    heads = models.PeerNetwork(on_meta(name)).auxiliary
    assert [[len(stage) for stage in head.stages] for head in heads] == blocks


def test_outputs_of_a_peer_on_small_images() -> None:
    torch.manual_seed(0)
    peer = models.PeerNetwork(models.create("shufflenet_v2_x0_5", num_classes=6, in_channels=1))
    for size in (64, 32, 8, 1):
        out = peer(torch.randn(3, 1, size, size))
        assert [tuple(f.shape) for f in out.features] == [(3, 1024)] * 4
        assert [tuple(z.shape) for z in out.logits] == [(3, 6)] * 4
        assert all(z.isfinite().all() for z in out.logits)


def test_one_small_image_has_no_batch_statistics() -> None:
    net = models.create("shufflenet_v2_x0_5", num_classes=3)
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        net(x)
    assert net.eval()(x).isfinite().all()


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5"])
def test_small_images_train(name: str) -> None:
    """A step against the gradient lowers the loss at every stage, by what the gradient says.

    Many steps would say more of the processor's rounding than of the networks.
    """
    torch.manual_seed(0)
    peer = models.PeerNetwork(models.create(name, num_classes=4)).double()
    x, y = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.arange(4)

    def losses() -> Tensor:
        return torch.stack([F.cross_entropy(z, y) for z in peer(x).logits])

    parameters = list(peer.parameters())
    for stage, before in enumerate(losses()):
        grads = torch.autograd.grad(losses()[stage], parameters, allow_unused=True)
        slope = sum(g.square().sum() for g in grads if g is not None)
        size = 1e-6 / slope
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                if g is not None:
                    p -= size * g
            after = losses()[stage]
            for p, g in zip(parameters, grads, strict=True):
                if g is not None:
                    p += size * g
        assert float(before.detach() - after.detach()) == pytest.approx(1e-6, rel=0.05)
    losses().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


def test_shuffle_interleaves_the_halves() -> None:
    """A basic unit keeps the first half, in the even channels; groups are mixed after two."""
    unit = models.shufflenet.BasicUnit(6).eval()
    x = torch.randn(2, 6, 4, 5)
    out = unit(x)
    assert torch.equal(out[:, 0::2], x[:, :3])
    assert torch.equal(out[:, 1::2], unit.branch2(x[:, 3:]))
    down = models.shufflenet.DownUnit(6, 10).eval()
    out = down(x)
    assert torch.equal(out[:, 0::2], down.branch1(x))
    assert torch.equal(out[:, 1::2], down.branch2(x))


def test_initial_weights() -> None:
    torch.manual_seed(0)
    resnet = models.ImageNetResNet(models.imagenet_resnet.BasicBlock, (1, 1, 1, 2), width=16)
    head = models.AuxiliaryHead(resnet, 0)
    for conv in (resnet.layer4[-1].conv2, head.stages[-1][0].conv2):
        # Kaiming normal, fan out of 128 x 3 x 3.
        assert conv.weight.std().item() == pytest.approx((2 / 1152) ** 0.5, rel=0.02)
    shuffle = models.create("shufflenet_v2_x0_5", num_classes=10)
    head = models.AuxiliaryHead(shuffle, 0)
    for conv in (shuffle.conv5[0], head.tail[0]):
        # The default of torch: uniform within 1 / sqrt(fan in of 192).
        assert conv.weight.abs().max().item() == pytest.approx(192**-0.5, rel=0.001)
        assert conv.weight.std().item() == pytest.approx((3 * 192) ** -0.5, rel=0.02)
    for net in (resnet, shuffle):
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)


def test_default_number_of_classes_is_that_of_the_data_set() -> None:
    assert models.create("resnet8").num_classes == 100
    assert on_meta("resnet18").num_classes == 1000
    assert models.create("shufflenet_v2_x0_5", num_classes=3).num_classes == 3


def test_odd_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="channels: expected an even number, .* got 7"):
        models.ImageNetShuffleNetV2((8, 7, 16))


def test_train_and_export_from_the_command_line(tmp_path) -> None:
    """Digits of 8 x 8 pixels: every map but the first is a single pixel."""
    arguments = [
        "--method",
        "lmcl",
        "--cohort",
        "shufflenet_v2_x0_5,resnet8",
        "--data",
        "digits-full",
        "--train-per-class",
        "2",
        "--batch-size",
        "20",
        "--images-per-class",
        "2",
        "--projection-dim",
        "4",
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--no-progress",
    ]
    assert main(["train", *arguments, "--run-dir", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "net")]) == 0
    network = load_backbone(tmp_path / "net").network
    assert isinstance(network, models.ImageNetShuffleNetV2) and network.num_classes == 10
    norm = network.get_submodule("conv5.1")
    assert norm.num_batches_tracked > 0 and not (norm.running_mean == 0).any()
