"""The command line: what each command writes and says, and what each mistake costs."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from helpers.command import call, contents, error_of
from helpers.every_method import METHODS
from helpers.exports import edit
from mclfast import data, methods, models
from mclfast._base.settings import field_types
from mclfast.cli.main import main
from mclfast.config import TrainConfig, field_help
from mclfast.execution.step import TrainStep
from mclfast.train.export import load_backbone
from mclfast.train.trainer import Trainer

SMALL = [
    "--data",
    "digits-full",
    "--train-per-class",
    "2",
    "--batch-size",
    "20",
    "--images-per-class",
    "2",
    "--device",
    "cpu",
    "--no-progress",
]
TINY_LMCL = [*SMALL, "--projection-dim", "4", "--matcher-dim", "4", "--bilevel-every", "2"]
TINY = [*SMALL, "--method", "baseline", "--cohort", "resnet8"]
FILES = ["checkpoint.pt", "config.yaml", "curves.png", "environment.json", "metrics.csv"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Commands run in an empty folder, with the setting of a user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MCLFAST_TRACEBACK", raising=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run of two peers, and what the command printed. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    command = [sys.executable, "-m", "mclfast", "train", *TINY_LMCL, "--epochs", "2"]
    done = subprocess.run(
        [*command, "--cohort", "resnet8,resnet8", "--seed", "3", "--run-dir", str(folder)],
        cwd=folder.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder, done.stdout


@pytest.fixture
def run_dir(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


# ---------------------------------------------------------------- train


def test_train_writes_the_run(finished):
    folder, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*FILES, "peer0", "peer1", "result.json"]
    )
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["epochs"], config["seed"], config["matcher_dim"]) == (2, 3, 4)
    assert config["cohort"] == ["resnet8", "resnet8"]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["torch"]["version"] == torch.__version__
    for peer in ("peer0", "peer1"):
        names = sorted(path.name for path in (folder / peer).iterdir())
        assert names == ["backbone.json", "backbone.safetensors"]


def test_train_writes_metrics_and_result(finished):
    folder, text = finished
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = "loss ce aggregate_ce distill vcl soft_vcl icl soft_icl".split()
    assert list(rows[0]) == [
        "epoch",
        "step",
        "lr",
        *(f"train_{name}" for name in losses),
        "acc_peer0",
        "acc_peer1",
        "acc_mean",
        "acc_ensemble",
        "acc_best_head_so_far",
        "seconds",
    ]
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    result = json.loads((folder / "result.json").read_text())
    last = rows[-1]
    assert result["peers"] == [float(last["acc_peer0"]), float(last["acc_peer1"])]
    assert result["ensemble"] == float(last["acc_ensemble"])
    assert result["published_protocol"] == float(last["acc_best_head_so_far"])
    for value in (*result["peers"], result["ensemble"], result["published_protocol"]):
        assert f"{value:.2f} %" in text
    for name in ("curves.png", "metrics.csv", "checkpoint.pt", "peer0", "peer1"):
        assert str(folder / name) in text


def test_train_draws_curves(finished):
    with Image.open(finished[0] / "curves.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width > picture.height > 200
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 10


def test_train_with_a_recipe_in_the_default_folder(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(
        "method: baseline\ncohort: resnet8\ndata: digits-full\ntrain_per_class: 2\n"
        "batch_size: 20\nimages_per_class: 2\nepochs: 7\namp: off\n"
    )
    arguments = ("train", "--recipe", "mine.yaml", "--epochs=1", "--seed", "4", "--device", "cpu")
    assert call(*arguments) == 0
    folder = tmp_path / "runs" / "digits-full-baseline-resnet8-seed4-mine-epochs=1"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["epochs"], config["seed"], config["amp"]) == (1, 4, "off")
    captured = capsys.readouterr()
    assert "resnet8" in captured.out and "ensemble" not in captured.out
    # The progress bar, on a stream that is no terminal.
    assert "baseline seed 4" in captured.err


def test_help_shows_the_options_of_the_method(capsys):
    assert call("train", "--help", "--method", "baseline") == 0
    baseline = capsys.readouterr().out
    assert "--weight-decay" in baseline and "--run-dir" in baseline
    assert "--matcher-dim" not in baseline and "--vcl-weight" not in baseline
    assert call("train", "-h") == 0
    lmcl = capsys.readouterr().out
    assert "--weight-decay" in lmcl and "--matcher-dim" in lmcl and "--run-dir" in lmcl
    assert call("--help") == 0
    text = capsys.readouterr().out
    assert all(f"\n    {name} " in text for name in ("train", "eval", "export", "env"))


@pytest.mark.parametrize("name", methods.available())
def test_help_explains_every_setting(name, capsys):
    assert call("train", "--help", "--method", name) == 0
    text = capsys.readouterr().out
    shown = " ".join(text.split())
    for cls in (TrainConfig, methods.method_class(name).Options):
        kinds, meaning, defaults = field_types(cls), field_help(cls), cls()
        for field, kind in kinds.items():
            words = [f"--{field.replace('_', '-')} "]
            if typing.get_origin(kind) is typing.Literal:
                words[0] += "{" + ",".join(typing.get_args(kind)) + "} "
            default = getattr(defaults, field)
            if not isinstance(default, tuple):
                value = default if isinstance(default, str) else str(default).lower()
                words.append(f"{meaning[field]} (default: {value})")
            assert meaning[field] and all(" ".join(w.split()) in shown for w in words), field
    for known in (*methods.available(), *data.available(), *models.available()):
        assert re.search(rf"[ ,]{known}\b", shown), known
    assert max(map(len, text.splitlines())) <= 80


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The help of ``train``, without its line breaks."""
    assert call("train", "--help", *arguments) == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_the_settings_of_a_recipe(tmp_path, capsys):
    assert "passes over the sampler's batches (default: 60)" in help_of(capsys)
    text = help_of(capsys, "--recipe", "lmcl-cifar100")
    for shown in (
        "passes over the sampler's batches (default: 300)",
        "separated by commas; one trains alone (default: resnet32,resnet32)",
        "automatic mixed precision (default: off)",
        "the matcher compares stages in (default: 128)",
    ):
        assert shown in text
    (tmp_path / "mine.yaml").write_text("amp: off\ndata_root: /A%d\nmatcher_dim: 3\n")
    text = help_of(capsys, "--recipe", "mine.yaml")
    for shown in ("precision (default: off)", "(default: /A%d)", "stages in (default: 3)"):
        assert shown in text


def test_settings_are_spelled_with_dashes_or_underscores(tmp_path, capsys):
    spelled = [a.replace("-", "_").replace("__", "--", 1) if a[:2] == "--" else a for a in TINY]
    assert "--train_per_class" in spelled and "digits-full" in spelled
    assert call("train", *spelled, "--epochs", "1", "--run_dir=a_b-c", "--data_root=d_e-f") == 0
    config = yaml.safe_load((tmp_path / "a_b-c" / "config.yaml").read_text())
    assert (config["train_per_class"], config["data_root"]) == (2, "d_e-f")
    assert call("eval", "a_b-c", "--data_root", "d_e-f", "--device=cpu") == 0


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["env"]])
def test_a_reader_that_has_left(command):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mclfast", *command],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": ""},
        )
    finally:
        os.close(writer)
    assert done.stderr == ""
    # argparse passes over a failed write itself.
    assert done.returncode in ((141,) if command == ["env"] else (0, 141))


def test_env_and_version(capsys):
    assert call("env") == 0
    assert torch.__version__ in capsys.readouterr().out
    assert call("--version") == 0
    assert capsys.readouterr().out.startswith("mclfast ")


# ---------------------------------------------------------------- eval and export


def reached(line: str) -> tuple[str, str]:
    found = re.search(r": ([0-9.]+) % of 359 test images \(recorded in training: (.*)\)$", line)
    assert found, line
    return found[1], found[2]


def test_eval_of_a_run_reaches_the_recorded_accuracy(finished, capsys):
    folder, _ = finished
    assert call("eval", folder, "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(folder / f"peer{i}") for i in (0, 1)]
    recorded = json.loads((folder / "result.json").read_text())["peers"]
    assert [reached(line) for line in lines] == [(f"{a:.4f}", f"{a:.4f} %") for a in recorded]


def test_export_and_eval_of_one_backbone(finished, tmp_path, capsys):
    folder, _ = finished
    before = contents(folder)
    assert call("export", folder, "--peer", "1", "--out", tmp_path / "a" / "net") == 0
    assert "resnet8 written to" in capsys.readouterr().out
    assert contents(tmp_path / "a" / "net") == contents(folder / "peer1")
    assert contents(folder) == before
    assert call("eval", tmp_path / "a" / "net", "--device", "cpu") == 0
    (line,) = capsys.readouterr().out.splitlines()
    recorded = json.loads((folder / "result.json").read_text())["peers"][1]
    assert reached(line) == (f"{recorded:.4f}", f"{recorded:.4f} %")


def test_export_into_the_run(run_dir):
    before = contents(run_dir / "peer0")
    shutil.rmtree(run_dir / "peer0")
    assert call("export", run_dir) == 0
    assert contents(run_dir / "peer0") == before


@pytest.mark.parametrize("name", [*filter(METHODS.get, methods.available()), "kdcl general"])
def test_eval_and_export_of_every_method(name, tmp_path, capsys):
    values = {
        "cohort": "resnet8,resnet8",
        "projection_dim": 4,
        "images_per_class": 2,
        "epochs": 1,
        "sampler": "balanced",
        "batch_size": 20,
    } | METHODS[name]
    if name == "mcl-okd":
        values["num_negatives"] = 12
    given = [f"--{k}={v}" for k, v in values.items()]
    assert call("train", *SMALL, "--train-per-class", "4", *given, "--run-dir", "run") == 0
    capsys.readouterr()
    assert call("eval", "run", "--device", "cpu") == 0
    recorded = json.loads((tmp_path / "run" / "result.json").read_text())["peers"]
    lines = capsys.readouterr().out.splitlines()
    assert [reached(line)[0] for line in lines] == [f"{a:.4f}" for a in recorded]
    last = len(recorded) - 1
    assert call("export", "run", "--peer", str(last), "--out", "net") == 0
    assert contents(tmp_path / "net") == contents(tmp_path / "run" / f"peer{last}")


def test_eval_measures_anew(run_dir, capsys):
    true = json.loads((run_dir / "peer0" / "backbone.json").read_text())["accuracy"]
    edit(run_dir / "peer0", accuracy=None)
    assert call("eval", run_dir / "peer0", "--device", "cpu") == 0
    assert reached(capsys.readouterr().out.strip()) == (f"{true:.4f}", "nothing")


# ---------------------------------------------------------------- interruption, resume, overwrite


def test_interrupted_run_is_resumed(tmp_path, capsys, monkeypatch):
    arguments = ["train", *TINY_LMCL, "--cohort", "resnet8", "--epochs", "3"]
    assert call(*arguments, "--run-dir", "whole") == 0
    step, done = TrainStep.__call__, []

    def interrupted(self: TrainStep, *batch: Any) -> Any:
        done.append(1)
        if len(done) == 2:
            raise KeyboardInterrupt
        return step(self, *batch)

    monkeypatch.setattr(TrainStep, "__call__", interrupted)
    assert call(*arguments, "--run-dir", "cut") == 130
    message = capsys.readouterr().err.strip()
    assert message == "interrupted; go on with: mclfast train --resume cut"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)

    assert "unfinished run; use --resume cut, --overwrite" in error_of(
        capsys, *arguments, "--run-dir", "cut"
    )
    assert not (tmp_path / "cut" / "result.json").exists()
    assert call(*message.split("mclfast ")[1].split(), "--no-progress") == 0
    results = [json.loads((tmp_path / n / "result.json").read_text()) for n in ("whole", "cut")]
    for result in results:
        # The records hold times, and so do their digests.
        for name in ("seconds", "blake2b", "metrics_blake2b"):
            del result[name]
    assert results[0] == results[1]
    weights = [contents(tmp_path / n)["peer0/backbone.safetensors"] for n in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_interrupted_before_the_first_checkpoint(tmp_path, monkeypatch):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_epoch", interrupt)
        assert call("train", *TINY, "--epochs", "1", "--run-dir", "a") == 130
    assert call("train", "--resume", "a", "--no-progress") == 0
    assert (tmp_path / "a" / "result.json").exists()


def test_resume_of_a_finished_run_changes_no_weights(run_dir):
    before = contents(run_dir)
    assert call("train", "--resume", run_dir, "--no-progress") == 0
    after = contents(run_dir)
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys() and changed <= {"curves.png"}


def test_finished_run_is_not_trained_over(run_dir, capsys):
    before = contents(run_dir)
    message = error_of(capsys, "train", *TINY, "--run-dir", run_dir)
    assert message.startswith("run_dir: expected a new folder")
    assert "a finished run; use --overwrite or another --run-dir" in message
    assert contents(run_dir) == before


def test_overwrite_replaces_the_run(run_dir):
    (run_dir / "notes.txt").write_text("mine")
    assert call("train", *TINY, "--epochs", "1", "--run-dir", run_dir, "--overwrite") == 0
    result = json.loads((run_dir / "result.json").read_text())
    assert len(result["peers"]) == 1
    assert load_backbone(run_dir / "peer0").description["method"] == "baseline"
    # The second peer was of the old run.
    assert not list(run_dir.glob("peer1/*"))
    assert (run_dir / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("wrong", [("--device", "tpu"), ("--batch-size", "40"), ("--lr", "x")])
def test_overwrite_with_a_mistake_costs_nothing(run_dir, capsys, wrong):
    before = contents(run_dir)
    error_of(capsys, "train", *TINY, "--run-dir", run_dir, "--overwrite", *wrong)
    assert contents(run_dir) == before


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], ".*COMMAND"),
        (["trian"], ".*'trian'"),
        (["train", "--epoch", "3"], r"setting: .*'epoch' \(did you mean 'epochs'\?\)"),
        (["train", "--epoch=3"], "setting: .*'epoch'"),
        (["train", "--lr"], ".*--lr: expected one argument"),
        (["train", "--method"], ".*--method: expected one argument"),
        (["train", "3"], "setting: .*'3'"),
        (["train", "--method", "lmlc"], "method: .*'lmlc'.*did you mean 'lmcl'"),
        (["train", "--batch_sze", "3"], r"setting: .*'batch-sze' \(did you mean 'batch-size'\?\)"),
        (["train", "--lr", "3", "4"], "lr: expected one value, got '4' after it"),
        (["train", "--seed=3", "4"], "seed: expected one value, got '4' after it"),
        (
            ["train", "--cohort", "resnet8", "resnet8"],
            "cohort: expected one list separated by commas, got 'resnet8' after it",
        ),
        (
            ["train", "--method", "baseline", "--matcher_dim", "3"],
            "matcher-dim: expected a setting of method baseline, got one of method lmcl",
        ),
        (
            ["train", "--recipe", "lmcl-cifar100", "--method", "baseline"],
            "temperature: expected a setting of method baseline, got one of method lmcl",
        ),
        (["train", "--data", "cifar"], "data: .*'cifar'"),
        (["train", "--cohort", "resnet8,resnet9"], "cohort: .*'resnet9'"),
        (["train", "--lr", "fast"], "lr: expected a number, got 'fast'"),
        (["train", "--epochs", "0"], "epochs: expected a value >= 1, got 0"),
        (["train", "--seed", "-1"], "seed: expected a value >= 0, got -1"),
        (["train", "--batch-size", "21", "--images-per-class", "2"], "images_per_class: .*divisor"),
        (["train", "--batch-size", "40", "--images-per-class", "2"], "batch_size: .*at most"),
        (["train", "--device", "tpu"], "device: .*'tpu'"),
        (["train", "--device", "cuda:99"], "device: .*'cuda:99'"),
        (
            ["train", "--data", "cifar100"],
            r"root: expected the folder holding cifar-100.* data_root \(--data-root\)",
        ),
        (["train", "--data", "cifar100", "--data-root", "no"], "root: .*cifar-100-python.tar.gz"),
        (["train", "--image-size", "9"], "image_size: expected 16"),
        (["train", "--recipe", "lmcl"], "recipe: .*'lmcl'"),
        (["train", "--recipe", "no.yaml"], "recipe: .*no.yaml, found none"),
        (["train", "--resume", "no"], "resume: expected a run with config.yaml in no"),
        (
            ["train", "--resume", "no", "--recipe", "lmcl-cifar100"],
            "resume: expected no --recipe beside --resume",
        ),
        (["train", "--resume", "no", "--run-dir", "a"], "resume: expected no --run-dir beside"),
        (["train", "--resume", "no", "--overwrite"], "resume: expected no --overwrite beside"),
        (["eval", "no"], "path: expected backbone.json in no"),
        (["eval"], ".*path"),
        (["transfer", "--published"], "path: expected the folder of an exported backbone"),
        (
            ["transfer", "no", "--published"],
            "path: expected backbone.json in no or in its peer folders",
        ),
        (
            ["transfer", "no", "--published", "--mode", "finetune"],
            "mode: expected linear with --published, got finetune",
        ),
        (["linear", "no"], ".*invalid choice: 'linear'"),
        (["bench", "--budget", "x"], "--budget: expected a number, got 'x'"),
        (["eval", "no", "--device", "tpu"], "device: .*'tpu'"),
        (["eval", "no", "--fast"], "--fast: unknown argument"),
        (["export", "no"], "run_dir: expected a run with config.yaml in no"),
        (["export", "no", "--peer", "x"], "--peer: expected an integer, got 'x'"),
        (["env", "--all"], "--all: unknown argument"),
    ],
)
def test_mistakes(arguments, message, capsys, tmp_path):
    found = error_of(capsys, *arguments)
    assert re.match(message, found), found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("peer", ["2", "-1"])
def test_export_of_a_peer_that_is_not_there(finished, capsys, peer):
    message = error_of(capsys, "export", finished[0], f"--peer={peer}", "--out", "a")
    assert message == f"peer: expected 0 to 1, got {peer}"


def test_eval_of_a_run_without_exports(run_dir, capsys):
    for peer in ("peer0", "peer1"):
        shutil.rmtree(run_dir / peer)
    for command in (["eval"], ["transfer", "--published"]):
        message = error_of(capsys, *command, run_dir)
        assert message.endswith(f"; mclfast export {run_dir} writes one from the checkpoint there")


def test_export_of_a_run_without_a_checkpoint(run_dir, capsys):
    (run_dir / "checkpoint.pt").unlink()
    assert error_of(capsys, "export", run_dir).startswith("checkpoint: expected a file")


def test_damaged_files_of_a_run(run_dir, capsys):
    checkpoint = run_dir / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    for command in (["export", run_dir], ["train", "--resume", run_dir, "--no-progress"]):
        assert error_of(capsys, *command).startswith("checkpoint: expected an intact file")
    (run_dir / "config.yaml").write_text("a: [")
    for argument, command in (("run_dir", ["export"]), ("resume", ["train", "--resume"])):
        message = error_of(capsys, *command, run_dir)
        assert message.startswith(f"{argument}: expected YAML in")
    weights = run_dir / "peer0" / "backbone.safetensors"
    weights.write_bytes(weights.read_bytes()[:999])
    assert error_of(capsys, "eval", run_dir).startswith("export: expected intact weights")


def test_resume_with_another_setting(run_dir, capsys):
    before = contents(run_dir)
    message = error_of(capsys, "train", "--resume", run_dir, "--no-progress", "--lr", "0.25")
    assert message.startswith("lr: expected ") and message.endswith("got 0.25")
    assert contents(run_dir) == before


def test_eval_of_an_export_that_names_no_data(run_dir, capsys):
    edit(run_dir / "peer0", data=...)
    message = error_of(capsys, "eval", run_dir / "peer0")
    assert message.startswith("path: expected data (text) in ")


def test_damaged_archive(tmp_path, capsys):
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(b"no archive")
    message = error_of(capsys, "train", "--data", "cifar100", "--data-root", tmp_path)
    assert "cifar-100-python.tar.gz: damaged or another version, expected MD5" in message


def test_run_dir_that_is_a_file(tmp_path, capsys):
    (tmp_path / "a").write_text("")
    for folder in ("a", "a/b"):
        message = error_of(capsys, "train", *TINY, "--run-dir", folder)
        assert message == "run_dir: expected a folder, got the file a"


@pytest.mark.parametrize(
    "command", [["eval"], ["transfer", "--published"], ["transfer", "--data=digits"]], ids=str
)
def test_a_file_in_the_place_of_an_export(finished, capsys, command):
    weights = finished[0] / "peer0" / "backbone.safetensors"
    message = error_of(capsys, *command, weights)
    assert message == f"path: expected a folder with backbone.json, got the file {weights}"


def test_a_full_disk(capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for all but the checkpoint.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        message = error_of(capsys, "train", *TINY, "--epochs", "1", "--run-dir", "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert message.startswith("checkpoint: expected room on the disk for a/checkpoint.pt, got: ")
    assert not Path("a/checkpoint.pt").exists() and not list(Path("a").glob(".*"))
    assert call("train", "--resume", "a", "--no-progress") == 0


@pytest.mark.parametrize("method", ["[lmcl]", "{a: 1}", "[]"])
def test_a_method_that_is_no_text(tmp_path, capsys, method):
    (tmp_path / "r.yaml").write_text(f"method: {method}")
    for command in ("train", "plan"):
        message = error_of(capsys, command, "--recipe", "r.yaml")
        assert message.startswith("method: expected ")


def test_export_of_a_damaged_checkpoint_names_the_one_before(run_dir, capsys):
    path = run_dir / "checkpoint.pt"
    shutil.copy(path, run_dir / "checkpoint.previous.pt")
    path.write_bytes(path.read_bytes()[:-1])
    message = error_of(capsys, "export", run_dir)
    assert message.startswith("checkpoint: expected an intact file")
    assert message.endswith(f"goes on from the one before it, {run_dir}/checkpoint.previous.pt")


@pytest.mark.parametrize("size", [0, 1])
def test_a_damaged_checkpoint_gives_a_reason(run_dir, capsys, size):
    (run_dir / "checkpoint.pt").write_bytes(b"x" * size)
    for command in (["export", run_dir], ["train", "--resume", run_dir, "--no-progress"]):
        message = error_of(capsys, *command)
        assert message.startswith("checkpoint: expected an intact file")
        assert ("got: an empty file" if size == 0 else "got: no end of an archive") in message


def test_diverging_run(capsys):
    message = error_of(capsys, "train", *TINY, "--epochs", "2", "--run-dir", "a", "--lr", "1e38")
    assert message.startswith("non_finite: expected finite numbers, got step 1 (epoch 2): ")
    assert "nan in features of peer 0, then in term ce" in message
    assert message.endswith("; mclfast replay a shows the step again")


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("MCLFAST_TRACEBACK", "1")
    with pytest.raises(ValueError, match="^method"):
        main(["train", "--method", "lmlc"])


def test_a_defect_keeps_its_traceback(monkeypatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(Trainer, "_train_epoch", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["train", *TINY, "--run-dir", "a"])


def test_mistake_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "mclfast", "train", "--cohort", "resnet9"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mclfast train: error: cohort: ")
    assert len(done.stderr.splitlines()) == 1


def test_warnings_are_one_line(run_dir, capsys):
    path = run_dir / "checkpoint.pt"
    shutil.copy(path, run_dir / "checkpoint.previous.pt")
    path.write_bytes(path.read_bytes()[:-1])
    assert call("train", "--resume", run_dir, "--no-progress") == 0
    (line,) = (x for x in capsys.readouterr().err.splitlines() if "checkpoint.damaged.pt" in x)
    assert line.startswith("mclfast train: warning: checkpoint: expected an intact file")
