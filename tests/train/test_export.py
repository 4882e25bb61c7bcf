"""Exported backbones: what is written, what is read back, what is refused."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.exports import edit
from mclfast import __version__, models
from mclfast.cli.main import main
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
    edit(folder)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:size])


def other_tensors(folder: Path) -> None:
    edit(folder)
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


def test_every_changed_byte_of_the_weights_is_found(folder):
    content = (folder / WEIGHTS).read_bytes()
    for place in (0, 9, 200, len(content) // 2, len(content) - 5001, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 0x40
        (folder / WEIGHTS).write_bytes(changed)
        with pytest.raises(ValueError, match="got: other content than weights_blake2b in backbone"):
            load_backbone(folder)


def test_a_changed_description_is_found(folder):
    text = (folder / DESCRIPTION).read_text()
    (folder / DESCRIPTION).write_text(
        text.replace('"eval_batch_size": 100', '"eval_batch_size": 8')
    )
    with pytest.raises(ValueError, match="^export: expected .*backbone.json as it was written"):
        load_backbone(folder)


def test_weights_and_description_of_two_exports(run, folder):
    shutil.copy(run.run_dir / "peer1" / WEIGHTS, folder / WEIGHTS)
    with pytest.raises(ValueError, match="got: other content than weights_blake2b"):
        load_backbone(folder)


def test_an_older_export_has_no_digest(run, folder):
    edit(folder)
    found = load_backbone(folder)
    assert found.description == load_backbone(run.run_dir / "peer0").description


def test_weights_have_the_mode_of_their_neighbours(run):
    modes = {(run.run_dir / "peer0" / name).stat().st_mode for name in (WEIGHTS, DESCRIPTION)}
    assert len(modes) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder, value):
    tensors = load_file(folder / WEIGHTS)
    tensors["fc.bias"][3] = value
    save_file(tensors, folder / WEIGHTS)
    edit(folder)
    with pytest.raises(ValueError, match="got: infinite or NaN values in fc.bias"):
        load_backbone(folder)


def test_logits_that_are_not_finite(run):
    network = load_backbone(run.run_dir / "peer0").network
    # Finite, and no variance: its root is NaN.
    network.state_dict()["bn1.running_var"].fill_(-1)
    with pytest.raises(FloatingPointError, match="^network: expected finite logits .*classifier 0"):
        accuracy(network, run.data)


@pytest.mark.parametrize("counts", [{"num_classes": 10**9}, {"in_channels": 10**9}])
def test_false_sizes_are_refused_before_memory_is_taken(folder, counts):
    edit(folder, **counts)
    with pytest.raises(ValueError, match="got: no tensor of size 1000000000"):
        load_backbone(folder)


def header(text: bytes, more: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + more


@pytest.mark.parametrize(
    "content",
    [
        header(b"{}"),
        header(b"[" * 1000),
        header(
            b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}', b"abcd"
        ),
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,400000]}}', b"abcd"),
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', b"abcd"),
        header(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}', b"abcd"),
        (2**63).to_bytes(8, "little") + b"{}",
        b"PK\x03\x04 an archive",
    ],
)
def test_lying_headers(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    edit(folder)
    with pytest.raises(ValueError, match="^export: expected intact weights of resnet8") as error:
        load_backbone(folder)
    assert "\n" not in str(error.value)


def test_an_export_imports_nothing_from_the_current_folder(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "timm.py").write_text(f"open({str(tmp_path / 'trap')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    edit(folder, network="timm:resnet18")
    for command in (["eval"], ["transfer", "--data", "digits"], ["transfer", "--published"]):
        assert main([command[0], str(folder), *command[1:]]) == 2
        error = capsys.readouterr().err
        assert "got 'timm:resnet18'; " in error and "--allow-external" in error
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_batch_size": 0}, "expected an integer >= 1 as eval_batch_size in .*, got 0$"),
        ({"eval_batch_size": True}, "expected an integer >= 1 as eval_batch_size in .*, got True$"),
        ({"class_names": 10}, "expected a list of 1 or more, each text as class_names .*, got 10$"),
        ({"class_names": [1, 2]}, "as class_names in .*, got .1, 2.$"),
        ({"mean": "0.5"}, "as mean in .*, got '0.5'$"),
        ({"std": [1e400]}, "as std in .*, got .inf.$"),
        ({"std": ...}, r"expected std \(a list of .*\) in .*, got none$"),
        ({"data": ["digits"]}, "expected text as data in "),
        ({"data_root": 5}, "expected text or null as data_root in .*, got 5$"),
        ({"train_per_class": 10**12}, "as train_per_class in .*, got 1000000000000$"),
        ({"accuracy": "good"}, "expected a number >= 0 and <= 100 or null as .*'good'$"),
    ],
)
def test_descriptions_that_lie(folder, capsys, changes, message):
    edit(folder, **changes)
    assert main(["eval", str(folder), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^mclfast eval: error: path: .*{message}", line)
