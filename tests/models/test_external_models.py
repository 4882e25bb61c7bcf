"""Networks of other packages by name: stages found, errors. The packages here are small fakes."""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from mclfast import Cohort, models
from mclfast._base.optional import MissingOptionalError
from mclfast.config import TrainConfig
from mclfast.train.export import export_backbone, load_backbone


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Stepped(nn.Module):
    """As ResNets are: leaves of a stem, one child per stage, a pooling, a linear layer."""

    def __init__(self, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 4, 3, 2, 1)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(conv(4, 4), conv(4, 4))
        self.layer2 = nn.Sequential(conv(4, 6, 2), conv(6, 6))
        self.layer3 = nn.Sequential(conv(6, 8, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.maxpool(self.conv1(x)))
        return self.fc(self.pool(self.layer3(self.layer2(x))).flatten(1))


class Mobile(nn.Module):
    """As MobileNets are: stages inside one container, a convolution after the pooling."""

    def __init__(self, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(in_chans, 4, 3, 2, 1)
        self.blocks = nn.Sequential(
            conv(4, 4), conv(4, 6, 2), conv(6, 6), conv(6, 8, 2), conv(8, 10, 2)
        )
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_head = nn.Conv2d(10, 12, 1)
        self.act = nn.Hardswish()
        self.classifier = nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv_head(self.global_pool(self.blocks(self.conv_stem(x)))))
        return self.classifier(x.flatten(1))


class Flat(nn.Module):
    """As transformers are: tokens, no maps."""

    def __init__(self, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_chans, 4, 16, 16)
        self.block = nn.Linear(4, 4)
        self.head = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.patches(x).flatten(2).mT).mean(1))


class Skipping(Stepped):
    """A stage whose input is not just the output of the one before."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer1(self.maxpool(self.conv1(x)))
        return self.fc(self.pool(self.layer3(self.layer2(y) * x.mean())).flatten(1))


NETWORKS = {"stepped": Stepped, "mobile": Mobile, "flat": Flat, "skipping": Skipping}


def fake_timm(name: str, **arguments: int) -> nn.Module:
    if name not in NETWORKS:
        raise RuntimeError(f"Unknown model ({name})")
    return NETWORKS[name](**arguments)


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = ModuleType("timm")
    timm.create_model = fake_timm
    torchvision = ModuleType("torchvision")
    torchvision.models = ModuleType("torchvision.models")
    torchvision.models.get_model = lambda name, **arguments: NETWORKS[name](**arguments)
    torchvision.models.list_models = lambda module: list(NETWORKS)
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.models", torchvision.models)


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_stages_are_cut_where_the_maps_shrink(package: str) -> None:
    net = models.create(f"{package}:stepped", num_classes=5).eval()
    assert len(net.stages) == 3
    assert net.stages[0][0] is net.module.maxpool and net.stages[0][1] is net.module.layer1
    assert net.stages[1:] == (net.module.layer2, net.module.layer3)
    x = torch.randn(2, 3, 64, 64)
    taps = net.forward_taps(x)
    assert [tuple(tap.shape[1:]) for tap in taps.maps] == [(4, 16, 16), (6, 8, 8), (8, 4, 4)]
    # The pooling is left out, so that the final map still has its pixels.
    assert taps.final_map is taps.maps[-1] and taps.feature.shape == (2, 8)
    torch.testing.assert_close(taps.logits, net.module(x))


def test_layers_after_the_pooling_are_the_tail() -> None:
    net = models.create("timm:mobile", num_classes=5, in_channels=1).eval()
    names = {m: n for n, m in net.module.named_modules()}
    # The block at half the size belongs to the stem.
    assert [names.get(stage) or [names[m] for m in stage] for stage in net.stages] == [
        ["blocks.1", "blocks.2"],
        "blocks.3",
        "blocks.4",
    ]
    assert [names[m] for m in net.tail] == ["global_pool", "conv_head", "act"]
    taps = net.forward_taps(torch.randn(2, 1, 64, 64))
    assert taps.final_map.shape == (2, 12, 1, 1) and taps.feature.shape == (2, 12)
    torch.testing.assert_close(taps.feature, taps.final_map.flatten(1))


@pytest.mark.parametrize("name", ["timm:stepped", "torchvision:stepped", "timm:mobile"])
def test_heads_and_training(name: str) -> None:
    torch.manual_seed(0)
    cohort = Cohort([models.create(name, num_classes=4), models.resnet8(num_classes=4)])
    out = cohort(torch.randn(3, 3, 32, 32))
    assert [len(logits) for logits in out.logits] == [3, 3]
    assert {tuple(z.shape) for z in out.logits[0]} == {(3, 4)}
    sum(z.square().sum() for z in out.logits[0]).backward()
    assert all(p.grad is not None for p in cohort.peers[0].parameters())


def test_number_of_classes_is_that_of_the_package() -> None:
    assert models.create("timm:stepped").num_classes == 1000


def test_export_round_trip(tmp_path) -> None:
    torch.manual_seed(0)
    net = models.create("timm:mobile", num_classes=4).eval()
    about = {"num_classes": 4, "in_channels": 3}
    export_backbone(net, tmp_path, network="timm:mobile", description=about)
    x = torch.randn(2, 3, 32, 32)
    found = load_backbone(tmp_path, allow_external=True)
    assert torch.equal(found.network(x), net(x))
    message = "^export: expected a network of mclfast.models .*'timm:mobile'; .*--allow-external"
    with pytest.raises(ValueError, match=message):
        load_backbone(tmp_path)


def test_a_run_may_name_them() -> None:
    config = TrainConfig(cohort=("timm:mobile", "resnet8"))
    assert config.cohort == ("timm:mobile", "resnet8")
    with pytest.raises(ValueError, match="cohort: expected .* got 'tim:mobile'"):
        TrainConfig(cohort=("tim:mobile", "resnet8"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:flat", r"^name: expected a network of two or more .* got timm:flat \(found 1"),
        ("timm:skipping", r"stages: expected the input of 'layer3' to be the output of 'layer2'"),
        ("timm:other", r"^name: expected a network of timm, got 'other' \(Unknown model \(other\)"),
        ("torchvision:other", r"^name: expected a classifier of torchvision, got 'other'$"),
    ],
)
def test_errors(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        models.create(name)
    assert "\n" not in str(error.value)
    if "other" not in name:
        assert str(error.value).endswith("name its stages yourself with mclfast.staged")


def test_channels_of_torchvision() -> None:
    with pytest.raises(ValueError, match="in_channels: expected 3 for torchvision:stepped, got 1"):
        models.create("torchvision:stepped", in_channels=1)


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_missing_package_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(MissingOptionalError, match=r'pip install "mclfast\[vision\]"') as error:
        models.create(f"{package}:stepped")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_broken_package_tells_why(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torchvision built for another torch raises a RuntimeError when it is imported."""
    (tmp_path / f"{package}.py").write_text("raise RuntimeError('operator nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("timm", "torchvision", "torchvision.models"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingOptionalError) as error:
        models.create(f"{package}:stepped")
    assert re.fullmatch(
        rf"the package {package} is installed but fails to import \(RuntimeError: operator nms "
        r'does not exist\); pip install "mclfast\[vision\]"',
        str(error.value),
    )


def test_a_stage_of_several_modules() -> None:
    parts = OrderedDict(
        a=conv(3, 4, 2),
        b=conv(4, 5),
        c=conv(5, 6, 2),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        fc=nn.Linear(6, 3),
    )
    module = nn.Sequential(parts).eval()
    net = models.staged(module, [["a", "b"], "c"])
    x = torch.randn(2, 3, 16, 16)
    maps = net.forward_taps(x).maps
    assert torch.equal(maps[0], module[:2](x)) and torch.equal(maps[1], module[:3](x))
    assert torch.equal(net.stages[0](x), maps[0]) and net.stages[1] is module.c
    assert [len(head.stages) for head in models.PeerNetwork(net).auxiliary] == [1]
    with pytest.raises(ValueError, match="stages: expected a submodule of Sequential, got 'zzz'"):
        models.staged(module, [["a", "zzz"], "c"])
    with pytest.raises(
        ValueError, match="stages: expected at least one name in each stage, got an empty"
    ):
        models.staged(module, [[], "c"])
    with pytest.raises(ValueError, match="stages: expected the forward pass to run b, a, c, fc"):
        models.staged(module, [["b", "a"], "c"]).forward_taps(x)
