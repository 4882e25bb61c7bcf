"""mclfast transfer: what is copied, what learns, what is written; torchvision's detectors."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers.exports import edit
from helpers.torchvision_record import RECORD
from mclfast import data, models
from mclfast.cli.main import main
from mclfast.config import TrainConfig
from mclfast.data.dataset import with_channels
from mclfast.data.feed import TrainingFeed, evaluation_batches
from mclfast.train.evaluation import accuracy
from mclfast.train.export import WEIGHTS, export_backbone, load_backbone
from mclfast.train.trainer import Trainer
from mclfast.train.transfer import build_transfer, copy_backbone, default_settings, transfer_config

FEW = {"data": "digits-full", "train_per_class": 8, "batch_size": 20, "device": "cpu"}


pytestmark = pytest.mark.usefixtures("one_thread")


def export(folder: Path, name: str = "resnet8", in_channels: int = 3, num_classes: int = 7) -> Path:
    """An export whose batch norms have statistics that a new network has not."""
    torch.manual_seed(11)
    network = models.create(name, num_classes=num_classes, in_channels=in_channels)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    about = {"num_classes": num_classes, "in_channels": in_channels}
    return export_backbone(network, folder, network=name, description=about)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone of colour images and seven classes. Not to be changed."""
    return export(tmp_path_factory.mktemp("exported") / "peer0")


def without_classifier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in state.items() if not k.startswith("fc.")}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------- from Python


@pytest.mark.parametrize("name", models.available())
def test_all_but_the_classifier_is_copied(name):
    with torch.device("meta"):
        source = models.create(name, num_classes=3).to_empty(device="cpu")
    target = models.create(name, num_classes=5)
    for index, value in enumerate(source.state_dict().values()):
        value.fill_(index)
    before = {k: v.clone() for k, v in target.classifier.state_dict().items()}
    copy_backbone(source, target)
    assert equal(target.classifier.state_dict(), before)
    classifier = {id(v) for v in target.classifier.state_dict(keep_vars=True).values()}
    copied = [
        (value.flatten()[0].item(), index)
        for index, value in enumerate(target.state_dict(keep_vars=True).values())
        if id(value) not in classifier
    ]
    assert len(copied) == len(target.state_dict()) - 2
    assert all(found == index for found, index in copied)


def test_linear_trains_the_classifier_only(exported):
    trainer = build_transfer(
        exported, "linear", transfer_config(exported, "linear", {**FEW, "epochs": 2})
    )
    backbone = trainer.cohort.peers[0].backbone
    classifier = backbone.classifier.weight.clone()
    trainer.fit(progress=False)
    original = load_backbone(exported).network.state_dict()
    assert equal(without_classifier(backbone.state_dict()), without_classifier(original))
    assert backbone.classifier.out_features == 10
    assert not torch.equal(backbone.classifier.weight, classifier)


def test_linear_learns(exported):
    values = {**FEW, "train_per_class": 40, "epochs": 60}
    trainer = build_transfer(exported, "linear", transfer_config(exported, "linear", values))
    result = trainer.fit(progress=False)
    # Random convolutions; a tenth would be chance.
    assert result.peers[0] > 25
    assert trainer.history[-1]["train_loss"] < 0.9 * trainer.history[0]["train_loss"]


def test_stored_features_train_as_the_images_do(exported):
    values = {**FEW, "epochs": 3}
    stored = build_transfer(exported, "linear", transfer_config(exported, "linear", values))
    images = build_transfer(
        exported, "linear", transfer_config(exported, "linear", {**values, "augment": True})
    )
    assert type(images) is not type(stored)
    images.feed = TrainingFeed(
        images.data, device=images.device, seed=images.config.seed, augmented=False
    )
    found, expected = stored.fit(progress=False), images.fit(progress=False)
    weights = [t.cohort.peers[0].backbone.classifier.weight for t in (stored, images)]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    assert found.peers == pytest.approx(expected.peers, abs=0.3)
    for row, other in zip(found.history, expected.history, strict=True):
        assert row.keys() == other.keys()
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)


def test_linear_with_augmentation_draws_crops(exported):
    losses = []
    for augment in (True, False):
        values = {**FEW, "epochs": 1, "augment": augment}
        trainer = build_transfer(exported, "linear", transfer_config(exported, "linear", values))
        losses.append(trainer.fit(progress=False).history[0]["train_loss"])
        kept = without_classifier(trainer.cohort.peers[0].backbone.state_dict())
        assert equal(kept, without_classifier(load_backbone(exported).network.state_dict()))
    assert losses[0] != losses[1]


def test_features_are_computed_once(exported, monkeypatch):
    values = {**FEW, "epochs": 3, "eval_batch_size": 400}
    trainer = build_transfer(exported, "linear", transfer_config(exported, "linear", values))
    backbone = trainer.cohort.peers[0].backbone
    monkeypatch.setattr(backbone, "forward_taps", lambda _: pytest.fail("the backbone ran again"))
    trainer.fit(progress=False)


def test_finetune_starts_from_the_backbone_and_trains_all(exported):
    config = transfer_config(exported, "finetune", {**FEW, "epochs": 1})
    trainer = build_transfer(exported, "finetune", config)
    backbone = trainer.cohort.peers[0].backbone
    original = without_classifier(load_backbone(exported).network.state_dict())
    assert equal(without_classifier(backbone.state_dict()), original)
    trainer.fit(progress=False)
    trained = without_classifier(backbone.state_dict())
    assert all(not torch.equal(trained[k], v) for k, v in original.items())


def test_the_seed_draws_the_classifier(exported):
    def classifier(seed: int) -> Tensor:
        config = transfer_config(exported, "finetune", {**FEW, "seed": seed})
        return build_transfer(exported, "finetune", config).cohort.peers[0].backbone.fc.weight

    assert torch.equal(classifier(1), classifier(1))
    assert not torch.equal(classifier(1), classifier(2))


@pytest.mark.parametrize("mode", ["linear", "finetune"])
def test_resuming(exported, tmp_path, mode):
    config = transfer_config(exported, mode, {**FEW, "epochs": 3, "eval_batch_size": 400})
    whole = build_transfer(exported, mode, config).fit(progress=False)
    build_transfer(exported, mode, config, tmp_path).fit(progress=False, stop_after=1)
    resumed = build_transfer(exported, mode, config, tmp_path).fit(progress=False)
    assert resumed.peers == whole.peers
    losses = [[row["train_loss"] for row in r.history] for r in (resumed, whole)]
    assert losses[0] == losses[1]
    other = "linear" if mode == "finetune" else "finetune"
    with pytest.raises(ValueError, match="^transfer_mode: expected "):
        build_transfer(exported, other, config, tmp_path).fit(progress=False)


def test_settings_of_the_modes(exported):
    linear = transfer_config(exported, "linear", {"data": "digits", "lr": "0.5"})
    assert (linear.lr, linear.augment, linear.weight_decay) == (0.5, False, 0.0)
    finetune = transfer_config(exported, "finetune", {"data": "digits"})
    assert finetune.augment and finetune.lr < 0.05
    assert finetune.cohort == ("resnet8",) and finetune.method == "baseline"


def test_unknown_mode(exported):
    with pytest.raises(ValueError, match="^mode: expected .*'linaer'.*did you mean 'linear'"):
        transfer_config(exported, "linaer")


# ---------------------------------------------------------------- channels


def test_grey_images_are_repeated():
    grey = data.load("digits", train_per_class=2)
    colour = with_channels(grey, 3)
    assert colour.in_channels == 3 and len(colour.mean) == len(colour.std) == 3
    for split, original in ((colour.train, grey.train), (colour.test, grey.test)):
        assert torch.equal(split.labels, original.labels)
    device = torch.device("cpu")
    batches = [
        next(evaluation_batches(d.test, mean=d.mean, std=d.std, batch_size=5, device=device))[0]
        for d in (colour, grey)
    ]
    assert torch.equal(batches[0], batches[1].expand(5, 3, 16, 16))
    assert with_channels(grey, 1) is grey


def test_colours_do_not_become_grey(tmp_path, capsys):
    folder = export(tmp_path / "grey", in_channels=1)
    glyphs = data.load("glyphs100", train_per_class=1)
    with pytest.raises(ValueError, match="^data: expected in_channels=1 .*got in_channels=3"):
        with_channels(glyphs, 1)
    assert main(["transfer", str(folder), "--data", "glyphs100", "--run-dir", f"{tmp_path}/r"]) == 2
    assert "error: data: expected in_channels=1" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


# ---------------------------------------------------------------- the command


def command(folder: Path, run_dir: Path, *more: str) -> list[str]:
    few = [part for k, v in FEW.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    return ["transfer", str(folder), *few, "--run-dir", str(run_dir), "--no-progress", *more]


@pytest.mark.parametrize("mode", ["linear", "finetune"])
def test_a_run_is_written(exported, tmp_path, capsys, mode):
    run_dir = tmp_path / "run"
    assert main(command(exported, run_dir, "--mode", mode, "--epochs", "2")) == 0
    text = capsys.readouterr().out
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "checkpoint.pt",
        "config.yaml",
        "curves.png",
        "environment.json",
        "metrics.csv",
        "peer0",
        "result.json",
    ]
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert (config["transfer_from"], config["transfer_mode"]) == (str(exported), mode)
    assert (config["data"], config["epochs"], config["augment"]) == (
        "digits-full",
        2,
        mode == "finetune",
    )
    (reached,) = json.loads((run_dir / "result.json").read_text())["peers"]
    assert f"resnet8 of {exported}, {mode}: {reached:.2f} % of 359 test images" in text

    written = load_backbone(run_dir / "peer0")
    assert written.description["accuracy"] == reached
    digits = with_channels(data.load("digits-full"), 3)
    assert accuracy(written.network, digits) == pytest.approx(reached, abs=0.3)
    assert main(["eval", str(run_dir), "--device", "cpu"]) == 0
    line = capsys.readouterr().out
    assert f"(recorded in training: {reached:.4f} %)" in line
    # A test image on the border between two classes may fall to either side.
    assert math.isclose(float(line.split("digits-full: ")[1].split(" %")[0]), reached, abs_tol=0.3)


def test_an_old_run_is_kept_unless_told(exported, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert main(command(exported, run_dir, "--epochs", "1")) == 0
    before = (run_dir / "checkpoint.pt").read_bytes()
    assert main(command(exported, run_dir, "--epochs", "2")) == 2
    assert "error: run_dir: expected a new folder" in capsys.readouterr().err
    assert (run_dir / "checkpoint.pt").read_bytes() == before
    assert main(command(exported, run_dir, "--epochs", "2", "--overwrite")) == 0
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["epochs"] == 2
    # Going on as with an ordinary run would train what a linear classifier keeps fixed.
    assert main(["train", "--resume", str(run_dir), "--no-progress"]) == 2
    assert "resume: expected a run of mclfast train" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["linear", "finetune"])
def test_a_resumed_command_equals_an_unbroken_one(tmp_path, capsys, mode):
    folder, whole, broken = (tmp_path / name for name in ("peer0", "whole", "broken"))
    export(folder)
    more = ("--mode", mode, "--epochs", "3")
    assert main(command(folder, whole, *more)) == 0
    config = transfer_config(folder, mode, {**FEW, "epochs": 3})
    build_transfer(folder, mode, config, broken).fit(progress=False, stop_after=1)
    # Another run may have replaced the backbone: the weights are those of the checkpoint.
    weights = load_file(folder / WEIGHTS)
    save_file(
        {k: v + 1 if v.is_floating_point() else v for k, v in weights.items()}, folder / WEIGHTS
    )
    edit(folder)
    capsys.readouterr()
    assert main(["transfer", "--resume", str(broken), "--no-progress"]) == 0
    assert f"resnet8 of {folder}, {mode}: " in capsys.readouterr().out
    assert equal(*(load_file(run / "peer0" / WEIGHTS) for run in (whole, broken)))
    results = [json.loads((run / "result.json").read_text()) for run in (whole, broken)]
    assert results[0]["peers"] == results[1]["peers"]
    assert main(["transfer", "--resume", str(broken), "--lr", "0.5"]) == 2
    assert "error: lr: expected " in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["linear", "finetune"])
def test_a_transferred_backbone_is_exported_again(exported, tmp_path, capsys, mode):
    run_dir = tmp_path / "run"
    assert main(command(exported, run_dir, "--mode", mode, "--epochs", "1")) == 0
    before = {f.name: f.read_bytes() for f in (run_dir / "peer0").iterdir()}
    assert main(["export", str(run_dir), "--out", str(tmp_path / "again")]) == 0
    assert {f.name: f.read_bytes() for f in (tmp_path / "again").iterdir()} == before


def test_a_run_in_the_place_of_an_export(exported, tmp_path, capsys):
    shutil.copytree(exported, tmp_path / "one" / "peer0")
    assert main(command(tmp_path / "one", tmp_path / "run", "--epochs", "1")) == 0
    shutil.copytree(exported, tmp_path / "one" / "peer1")
    capsys.readouterr()
    assert main(["transfer", str(tmp_path / "one"), "--data", "digits"]) == 2
    one = tmp_path / "one"
    assert f"path: expected one exported backbone, got a run; name one of {one}/peer0, " in (
        capsys.readouterr().err
    )


def test_help_shows_the_defaults_of_the_modes(capsys):
    with pytest.raises(SystemExit):
        main(["transfer", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for mode in ("linear", "finetune"):
        config = TrainConfig.from_values(default_settings(mode))
        for value in (config.epochs, config.lr, str(config.augment).lower()):
            assert f"{value} for {mode}" in text
    assert "images per step (default: 64)" in text and "--amp {off,bf16,fp16}" in text


def test_an_export_of_another_network_or_version(exported, tmp_path, capsys):
    def error() -> str:
        assert main(["transfer", str(folder), "--data", "digits"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    folder = Path(shutil.copytree(exported, tmp_path / "peer0"))
    edit(folder, network="resnet_of_2030")
    description = folder / "backbone.json"
    assert f"export: expected a network of mclfast.models in {description}, got " in error()
    edit(folder, network="vgg16")
    # Without the hundreds of names that do not fit.
    line = error()
    assert "export: expected intact weights of vgg16" in line and len(line) < 500
    # What only eval needs is not asked for.
    edit(folder, network="resnet8", mclfast="0.0.1")
    assert main(command(folder, tmp_path / "run", "--epochs", "1")) == 0


def test_an_interrupted_command_says_how_to_go_on(exported, tmp_path, monkeypatch, capsys):
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", interrupted)
    assert main(command(exported, tmp_path / "run")) == 130
    err = capsys.readouterr().err
    assert err == f"\ninterrupted; go on with: mclfast transfer --resume {tmp_path}/run\n"


def test_mistakes_in_resuming(exported, tmp_path, capsys):
    def error(*arguments: str) -> str:
        assert main(["transfer", *arguments]) == 2
        return capsys.readouterr().err

    assert "path: expected the folder of an exported backbone" in error("--data", "digits")
    assert "resume: expected a run with config.yaml" in error("--resume", str(tmp_path))
    given = (str(exported), "--resume", str(tmp_path))
    assert "resume: expected no path beside --resume" in error(*given)
    assert "resume: expected no --mode beside" in error(*given[1:], "--mode", "linear")
    (tmp_path / "config.yaml").write_text("method: baseline\ncohort: [resnet8]\n")
    assert "resume: expected a run of mclfast transfer" in error("--resume", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "data: expected the set to transfer to"),
        (("--data", "digit"), "data: .*did you mean 'digits'"),
        (("--data", "digits", "--mode", "both"), "mode: expected .*'both'"),
        (("--data", "digits", "--lr", "fast"), "lr: expected a number, got 'fast'"),
        (("--data", "digits", "--method", "lmcl"), "--method: unknown argument"),
    ],
)
def test_mistakes(exported, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["transfer", str(exported), *arguments])
    except SystemExit as leave:
        status = leave.code
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_transfer(tmp_path, capsys):
    assert main(["transfer", str(tmp_path / "no"), "--data", "digits"]) == 2
    assert "error: path: expected backbone.json in " in capsys.readouterr().err


# ---------------------------------------------------------------- torchvision's detectors


def recorded_shapes(name: str) -> dict[str, list[int]]:
    """Key and shape of torchvision's network, from the record of its layout."""
    shapes = {}
    for line in json.loads(RECORD.read_text())["layouts"][name]:
        module, *entries = line.split(" ")
        for entry in entries:
            key, *rest = entry.split(":")
            sides = rest[0] if rest and rest[0][0].isdigit() else ""
            shapes[f"{module}.{key}"] = [int(side) for side in sides.split("x") if side]
    return shapes


def detector_body(weights: dict[str, Any]) -> dict[str, Any]:
    """What the body of torchvision's detectors holds: stem and stages, without a classifier.

    Their frozen batch norms count no batches, and drop that entry when they load.
    """
    return {
        k: v
        for k, v in weights.items()
        if k.split(".")[0] != "fc" and not k.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_an_export_fits_the_body_of_a_detector(tmp_path, name):
    # Another number of classes than the record's: the body must not depend on it.
    found = detector_body(load_file(export(tmp_path, name, num_classes=3) / WEIGHTS))
    expected = detector_body(recorded_shapes(name))
    assert {k: list(v.shape) for k, v in found.items()} == expected
    stages = {key.split(".")[0] for key in found}
    assert stages == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_detector_of_the_installed_torchvision_loads_an_export(tmp_path, name):
    try:
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"torchvision does not import here: {str(error).splitlines()[0]}")
    weights = load_file(export(tmp_path, name, num_classes=3) / WEIGHTS)
    body = resnet_fpn_backbone(backbone_name=name, weights=None).body
    kept = {k: v for k, v in weights.items() if not k.startswith("fc.")}
    body.load_state_dict(kept, strict=True)
    assert equal(dict(body.state_dict()), detector_body(weights))
