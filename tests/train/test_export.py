"""Exported backbones: what is written, what is read back, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mclfast import __version__, models
from mclfast.config import TrainConfig
from mclfast.train.builder import build
from mclfast.train.evaluation import accuracy
from mclfast.train.export import DESCRIPTION, WEIGHTS, export_backbone, load_backbone
from mclfast.train.trainer import Trainer

VALUES = {
    "method": "lmcl",
    "cohort": "resnet8,wrn_16_2",
    "data": "digits-full",
    "train_per_class": 4,
    "batch_size": 20,
    "images_per_class": 2,
    "epochs": 1,
    "projection_dim": 4,
    "seed": 5,
    "eval_batch_size": 100,
    "lr": 0.02,
    "bilevel_every": 0,
    "device": "cpu",
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A finished run of two unlike peers."""
    trainer = build(TrainConfig.from_values(VALUES), tmp_path_factory.mktemp("run"))
    trainer.fit(progress=False)
    return trainer


@pytest.fixture
def folder(run: Trainer, tmp_path: Path) -> Path:
    """A copy of an export, to be damaged."""
    assert run.run_dir is not None
    return Path(shutil.copytree(run.run_dir / "peer0", tmp_path / "peer"))


def edit(folder: Path, **changes: Any) -> None:
    description = json.loads((folder / DESCRIPTION).read_text())
    description |= changes
    description = {k: v for k, v in description.items() if v is not ...}
    (folder / DESCRIPTION).write_text(json.dumps(description))


@pytest.mark.parametrize("peer", [0, 1])
def test_an_export_is_the_backbone(run, peer):
    exported = load_backbone(run.run_dir / f"peer{peer}")
    backbone = run.cohort.peers[peer].backbone
    assert type(exported.network) is type(backbone)
    found, expected = exported.network.state_dict(), backbone.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not any(module.training for module in exported.network.modules())
    images = torch.rand(4, 1, 16, 16)
    # Training may have had another layout, which rounds in another order.
    alike = exported.network.to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = backbone.to(memory_format=torch.channels_last).eval()(images)
        assert torch.equal(alike(images), expected)

    file = load_file(run.run_dir / f"peer{peer}" / WEIGHTS)
    plain = models.create(run.config.cohort[peer], num_classes=10, in_channels=1)
    assert file.keys() == plain.state_dict().keys()
    trained = {n.split(".")[0] for n, _ in run.cohort.named_parameters()}
    assert "projections" in trained and len(run.cohort.peers[peer].auxiliary) == 2


@pytest.mark.parametrize("peer", [0, 1])
def test_the_recorded_accuracy_is_reached_exactly(run, peer):
    exported = load_backbone(str(run.run_dir / f"peer{peer}"))
    found = accuracy(exported.network, run.data, batch_size=exported.description["eval_batch_size"])
    assert found == exported.description["accuracy"] == run.history[-1][f"acc_peer{peer}"]


def test_description(run):
    assert load_backbone(run.run_dir / "peer1").description == {
        "network": "wrn_16_2",
        "mclfast": __version__,
        "class": "WideResNet",
        "num_classes": 10,
        "in_channels": 1,
        "image_size": 16,
        "mean": list(run.data.mean),
        "std": list(run.data.std),
        "class_names": list("0123456789"),
        "data": "digits-full",
        "data_root": None,
        "train_per_class": 4,
        "eval_batch_size": 100,
        "method": "lmcl",
        "seed": 5,
        "epochs_trained": 1,
        "accuracy": run.history[-1]["acc_peer1"],
    }


def test_exporting_again_replaces(tmp_path):
    for seed in range(2):
        torch.manual_seed(seed)
        network = models.create("resnet8", num_classes=3, in_channels=2)
        about = {"num_classes": 3, "in_channels": 2, "note": seed}
        target = export_backbone(network, tmp_path / "a", network="resnet8", description=about)
    assert target == tmp_path / "a"
    assert sorted(path.name for path in target.iterdir()) == [DESCRIPTION, WEIGHTS]
    exported = load_backbone(target)
    assert exported.description["note"] == 1
    assert torch.equal(exported.network.state_dict()["fc.weight"], network.fc.weight)
    assert exported.network(torch.zeros(1, 2, 16, 16)).shape == (1, 3)


def test_trainer_that_has_not_trained(tmp_path):
    trainer = build(TrainConfig.from_values(VALUES))
    trainer.export(0, tmp_path)
    description = load_backbone(tmp_path).description
    assert description["accuracy"] is None and description["epochs_trained"] == 0


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"^export: expected a file .*{DESCRIPTION}"):
        load_backbone(tmp_path)


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"^export: expected a file .*{WEIGHTS}"):
        load_backbone(folder)


def truncate(folder: Path, size: int) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:size])


def other_tensors(folder: Path) -> None:
    save_file({"a": torch.zeros(2)}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: truncate(f, 0), "expected intact weights of resnet8"),
        (lambda f: truncate(f, 5), "expected intact weights of resnet8"),
        (lambda f: truncate(f, 3000), "expected intact weights of resnet8"),
        (lambda f: truncate(f, -1), "expected intact weights of resnet8"),
        (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 64), "expected intact weights"),
        (other_tensors, "expected intact weights of resnet8 .*Missing key.*conv1.weight"),
        (lambda f: edit(f, num_classes=11), "expected intact weights of resnet8 .*fc.weight"),
        (lambda f: edit(f, network="wrn_16_2"), "expected intact weights of wrn_16_2"),
        (lambda f: (f / DESCRIPTION).write_text('{"network": '), "expected JSON in"),
        (lambda f: (f / DESCRIPTION).write_bytes(b"\xff\xfe\x00"), "expected JSON in"),
        (lambda f: (f / DESCRIPTION).write_text("[1]"), "expected a JSON object in .*list"),
        (lambda f: edit(f, network=...), "expected network, num_classes, in_channels .*None"),
        (lambda f: edit(f, num_classes=...), "expected network, num_classes, in_channels"),
        (lambda f: edit(f, in_channels=...), "expected network, num_classes, in_channels"),
        (lambda f: edit(f, num_classes="ten"), "expected network, num_classes, .*'ten'"),
        (lambda f: edit(f, in_channels=-1), "expected network, num_classes, .*-1"),
        (lambda f: edit(f, network=["resnet8"]), "expected network, num_classes"),
    ],
)
def test_damaged(folder: Path, damage: Callable[[Path], object], message: str):
    load_backbone(folder)
    damage(folder)
    with pytest.raises(ValueError, match=f"^export: {message}") as error:
        load_backbone(folder)
    assert "\n" not in str(error.value)


def test_unknown_network(folder):
    edit(folder, network="resnet9")
    with pytest.raises(ValueError, match="^export: expected a network .*, got 'resnet9'"):
        load_backbone(folder)
