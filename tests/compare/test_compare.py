"""Comparison of methods: design, runs, statistics, report, and what mistakes cost."""

from __future__ import annotations

import base64
import csv
import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from helpers.command import call, contents, error_of
from mclfast import models, recipe
from mclfast.cli import compare
from mclfast.compare import one_run, report
from mclfast.compare.design import Design, make_design, write_design
from mclfast.compare.published import published
from mclfast.compare.runs import Finished, Run, load
from mclfast.compare.summary import spread, summarize, summary_rows
from mclfast.config import TrainConfig
from mclfast.execution.step import TrainStep
from mclfast.methods import MCL
from mclfast.train import plots
from mclfast.train.folder import CHECKPOINT, METRICS
from mclfast.train.lock import LOCK
from mclfast.train.trainer import RunResult

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
    "--epochs",
    "1",
    "--no-progress",
]
PLAN = {
    "seeds": [0, 5],
    "methods": {
        "baseline": None,
        "mcl": {"projection_dim": 4},
        "narrow": {"method": "mcl", "topology": "shared_stem", "cohort": "resnet8,resnet8,resnet8"},
        "broken": {"method": "mcl", "topology": "shared_stem", "split_stage": 9},
    },
}
FILES = {
    "accuracy.png",
    "curves.png",
    "plan.yaml",
    "report.html",
    "report.md",
    "summary.csv",
    "table.csv",
}
HERE = ["--jobs", "0", "--out", "out"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MCLFAST_TRACEBACK", raising=False)


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """A comparison of two seeds, one method of which fails. Not to be changed."""
    folder = tmp_path_factory.mktemp("compared")
    (folder / "mine.yaml").write_text(yaml.safe_dump(PLAN))
    out = folder / "out"
    assert call("compare", *SMALL, "--plan", folder / "mine.yaml", "--jobs=0", "--out", out) == 1
    return out


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


# ---------------------------------------------------------------- what a comparison writes


def test_files_of_a_comparison(compared):
    assert {p.name for p in compared.iterdir() if p.is_file()} == FILES
    assert {p.name for p in compared.iterdir() if p.is_dir()} == set(PLAN["methods"])
    for label in ("baseline", "mcl", "narrow"):
        for seed in (0, 5):
            config = yaml.safe_load((compared / label / f"seed{seed}" / "config.yaml").read_text())
            assert config["seed"] == seed
            assert config["method"] == ("baseline" if label == "baseline" else "mcl")
            assert config["topology"] == ("shared_stem" if label == "narrow" else "independent")
    assert config["cohort"] == ["resnet8"] * 3
    assert not (compared / "broken" / "seed0" / "result.json").exists()


def test_table_has_a_row_per_run_and_peer(compared):
    rows = rows_of(compared / "table.csv")
    got = [(r["label"], int(r["seed"]), int(r["peer"]), float(r["accuracy"])) for r in rows]
    peers = {
        (label, seed): result_of(compared / label / f"seed{seed}")["peers"]
        for label in ("baseline", "mcl", "narrow")
        for seed in (0, 5)
    }
    want = [(*key, i, a) for key, accuracies in peers.items() for i, a in enumerate(accuracies)]
    assert sorted(got) == sorted(want) and len(got) == 2 * (2 + 2 + 3)
    assert {r["parameters"] for r in rows} == {
        str(models.parameter_count(models.create("resnet8", num_classes=10, in_channels=1)))
    }
    # In this process the peak memory of a run is unknown.
    assert {r["peak_memory_mib"] for r in rows} == {""}


def test_statistics_over_seeds(compared):
    rows = {(r["label"], r["metric"]): r for r in rows_of(compared / "summary.csv")}

    def check(label: str, metric: str, values: list[float]) -> None:
        row = rows[label, metric]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
        assert float(row["mean"]) == pytest.approx(mean, abs=1e-9)
        assert float(row["sd"]) == pytest.approx(math.sqrt(variance), abs=1e-9)
        assert row["seeds"] == "2"

    found = {
        label: [result_of(compared / label / f"seed{seed}") for seed in (0, 5)]
        for label in ("baseline", "mcl", "narrow")
    }
    for label, results in found.items():
        means = [sum(r["peers"]) / len(r["peers"]) for r in results]
        check(label, "mean_of_peers", means)
        for name in ("ensemble", "published_protocol", "seconds"):
            check(label, name, [r[name] for r in results])
        for i in range(len(results[0]["peers"])):
            check(label, f"peer{i}", [r["peers"][i] for r in results])
    base = [r["peers"] for r in found["baseline"]]
    mine = [r["peers"] for r in found["mcl"]]
    check("mcl", "gain", [(sum(m) - sum(b)) / 2 for m, b in zip(mine, base, strict=True)])
    check("mcl", "gain_peer1", [m[1] - b[1] for m, b in zip(mine, base, strict=True)])
    # Other networks, or the baseline itself: nothing to compare with.
    assert ("narrow", "gain") not in rows and ("baseline", "gain") not in rows


def test_report_says_it_all(compared):
    text = (compared / "report.md").read_text()
    results = [result_of(compared / "mcl" / f"seed{seed}") for seed in (0, 5)]
    for name in ("ensemble", "published_protocol"):
        values = np.array([r[name] for r in results])
        assert f"{values.mean():.2f} ± {values.std(ddof=1):.2f}" in text
    assert "train_per_class 2" in text and "projection_dim 4" in text
    assert "narrow: method mcl, cohort resnet8+resnet8+resnet8, topology shared_stem" in text
    # What most have is said once.
    assert "- cohort resnet8+resnet8, topology independent, " in text
    assert "unless stated otherwise\n" in text and "- baseline: " not in text
    assert "None for narrow: other networks." in text
    assert "| broken | 5 | split_stage: expected a value < 3" in text
    assert "published |" not in text.replace("published protocol |", "")
    assert "`mclfast compare --data digits-full" in text
    # The page holds the same words and the pictures themselves.
    page = (compared / "report.html").read_text()
    assert "split_stage: expected a value &lt; 3" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    for name in ("accuracy.png", "curves.png"):
        content = (compared / name).read_bytes()
        assert base64.b64encode(content).decode() in page
        with Image.open(compared / name) as picture:
            assert picture.format == "PNG" and picture.width > picture.height > 200
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 10


def test_plan_of_a_comparison_gives_the_same_runs(compared, capsys):
    before = contents(compared)
    arguments = ["compare", "--plan", compared / "plan.yaml", "--out", compared, "--jobs", "0"]
    assert call(*arguments, "--methods", "baseline,mcl,narrow", "--no-progress") == 0
    assert "6 of 6 runs are finished already" in capsys.readouterr().out
    assert contents(compared)["table.csv"] == before["table.csv"]
    for name, content in before.items():
        # All but the report, which is without the broken one now.
        if name not in FILES:
            assert contents(compared)[name] == content
    for name in FILES:
        (compared / name).write_bytes(before[name])


# ---------------------------------------------------------------- interruption, change, failure


def test_interrupted_comparison_goes_on(monkeypatch, capsys):
    arguments = ["compare", *SMALL, "--epochs", "3", "--methods", "baseline,mcl", "--seeds", "1"]
    assert call(*arguments, "--jobs", "0", "--out", "whole") == 0
    step, done = TrainStep.__call__, []

    def interrupted(self: TrainStep, *batch: Any) -> Any:
        done.append(self.config.method)
        if len(done) == 5:
            raise KeyboardInterrupt
        return step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", interrupted)
        assert call(*arguments, *HERE) == 130
        # One step an epoch: the second run has finished one epoch of three.
        assert done == ["baseline"] * 3 + ["mcl"] * 2
        assert "the same command goes on" in capsys.readouterr().err
    done.clear()
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", interrupted)
        assert call(*arguments, *HERE) == 0
    assert done == ["mcl"] * 2
    assert "1 of 2 runs are finished already" in capsys.readouterr().out
    for run in ("baseline/seed0", "mcl/seed0"):
        whole, cut = (result_of(Path(folder, run)) for folder in ("whole", "out"))
        # The records hold times, and so do their digests.
        for name in ("seconds", "blake2b", "metrics_blake2b"):
            del whole[name], cut[name]
        assert whole == cut


def test_changed_settings(capsys):
    arguments = ["compare", *SMALL, "--methods", "baseline,mcl", "--seeds", "1", *HERE]
    assert call(*arguments) == 0
    capsys.readouterr()
    before = contents(Path("out"))
    message = error_of(capsys, *arguments, "--set", "mcl.temperature=0.2")
    assert message == (
        "temperature: expected 0.1 as in the run in out/mcl/seed0, got 0.2; use --overwrite to "
        "replace runs with other settings, or another --out"
    )
    assert contents(Path("out")) == before
    assert call(*arguments, "--set", "mcl.temperature=0.2", "--overwrite") == 0
    after = contents(Path("out"))
    assert before["baseline/seed0/result.json"] == after["baseline/seed0/result.json"]
    assert before["mcl/seed0/checkpoint.pt"] != after["mcl/seed0/checkpoint.pt"]
    # Where it computes may change.
    assert call(*arguments, "--set", "mcl.temperature=0.2", "--eval-batch-size", "64") == 0


def test_runs_of_another_comparison_are_left_and_named(compared, capsys):
    out = Path(shutil.copytree(compared, "out"))
    plan = ["compare", "--plan", out / "plan.yaml", *HERE, "--no-progress"]
    assert call(*plan, "--methods", "mcl", "--seeds", "5,") == 0
    text = capsys.readouterr().out
    others = "baseline/seed0, baseline/seed5, mcl/seed0, narrow/seed0, narrow/seed5"
    assert f"not of this comparison, and not in its report: {others}\n" in text
    assert call(*plan[:2], compared / "plan.yaml", *plan[3:]) == 1
    text = capsys.readouterr().out
    assert "6 of 8 runs are finished already" in text and "not of this" not in text


def test_a_defect_of_a_method_does_not_stop_the_others(monkeypatch, capsys):
    def broken(*_: Any) -> None:
        raise RuntimeError("a defect\nof two lines")

    arguments = ["compare", *SMALL, "--methods", "mcl,baseline", "--seeds", "1", *HERE]
    with monkeypatch.context() as patch:
        patch.setattr(MCL, "loss", broken)
        assert call(*arguments) == 1
    text = capsys.readouterr().out
    assert "mcl, seed 0: failed: RuntimeError: a defect of two lines" in text
    assert "baseline, seed 0: mean of peers" in text and "Failed runs" in text
    assert "in broken" in Path("out/mcl/seed0/failure.txt").read_text()
    assert [r["label"] for r in rows_of(Path("out/table.csv"))] == ["baseline"] * 2
    assert call(*arguments) == 0
    assert "1 of 2 runs are finished already" in capsys.readouterr().out
    assert not Path("out/mcl/seed0/failure.txt").exists()
    assert "Failed" not in Path("out/report.md").read_text()


def test_no_run_finishes(capsys):
    arguments = ["--methods", "baseline", "--seeds", "1", "--topology", "shared_stem"]
    assert call("compare", *SMALL, *HERE, *arguments, "--split-stage", "9") == 1
    assert capsys.readouterr().err == "no run finished: nothing to report\n"


def test_a_folder_that_cannot_be_written_fails_alone(capfd):
    Path("out").mkdir()
    Path("out/mcl").write_text("in the way")
    arguments = ["compare", *SMALL, "--seeds", "1", "--out", "out"]
    # In a process of its own first.
    assert call(*arguments, "--methods", "mcl") == 1
    assert call(*arguments, "--methods", "mcl,baseline", "--jobs", "0") == 1
    captured = capfd.readouterr()
    assert captured.out.count("] mcl, seed 0: failed: ") == 2
    assert "[2/2] baseline, seed 0: mean of peers" in captured.out
    assert "Traceback" not in captured.err and "Not a directory" in captured.err
    assert [r["label"] for r in rows_of(Path("out/table.csv"))] == ["baseline"] * 2


@pytest.fixture
def damaged(compared) -> Path:
    """A copy of the comparison, with one run to be damaged."""
    return Path(shutil.copytree(compared, "out")) / "mcl" / "seed5"


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("result.json", "{}", r"run: expected peers \(a list .*\) in .*result.json, got none"),
        ("result.json", '{"peers": ["a"]}', "run: expected a list .* as peers in .*, got .'a'."),
        ("result.json", '{"peers": [', "run: expected JSON in"),
        ("result.json", "[]", "run: expected a JSON object"),
        ("metrics.csv", None, "metrics: expected a file .*metrics.csv, found none"),
        ("environment.json", None, "run: expected a file"),
    ],
)
def test_damaged_files_of_a_run(damaged, file, content, reason):
    (damaged / file).unlink()
    if content is not None:
        (damaged / file).write_text(content)
    message = f"^out: expected the files of a finished run in {damaged}, got: {reason}.*; remove "
    with pytest.raises(ValueError, match=message):
        load(run_in(damaged))


def run_in(folder: Path) -> Run:
    """The run of method mcl with seed 5 in a folder, with its settings."""
    values = yaml.safe_load((folder / "config.yaml").read_text())
    return Run("mcl", 5, TrainConfig.from_values(values), folder)


def lie(folder: Path, file: str, **changes: Any) -> None:
    """Changes values of a JSON file, which loses its digest; ``...`` removes a value."""
    value = json.loads((folder / file).read_text()) | {"blake2b": ...} | changes
    (folder / file).write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("result.json", {"ensemble": "good"}, "expected a number .* as ensemble in .*, got 'good'"),
        ("result.json", {"ensemble": None}, "expected a number .* as ensemble in .*, got None"),
        ("result.json", {"peers": [10.0]}, "expected 2 peers in .* as in .*, got 1"),
        ("result.json", {"peers": [1e400, 1.0]}, "as peers in .*, got .inf, 1.0."),
        ("result.json", {"published_protocol": 101}, "as published_protocol in .*, got 101"),
        ("result.json", {"seconds": -1}, "as seconds in .*, got -1"),
        ("result.json", {"ensemble": 3.25}, "expected ensemble .* as in the last .*, got 3.25"),
        ("cost.json", {"parameters": ...}, r"expected parameters \(a list of .*, got none"),
        ("cost.json", {"parameters": [5]}, "expected 2 numbers of parameters in .*, got 1"),
        ("cost.json", {"parameters": ["5", 5]}, "as parameters in .*, got .'5', 5."),
        ("cost.json", {"device": None}, "expected text as device in .*, got None"),
        ("cost.json", {"threads": "two"}, "as threads in .*, got 'two'"),
        ("cost.json", {"peak_memory_bytes": "much"}, "as peak_memory_bytes in .*, got 'much'"),
        ("environment.json", {"mclfast": "1.0"}, "expected names with values as mclfast in "),
        ("environment.json", {"torch": {}}, r"expected version \(text\) in .*, got none"),
    ],
)
def test_well_formed_lies_of_a_run(damaged, file, changes, reason):
    load(run_in(damaged))
    lie(damaged, file, **changes)
    with pytest.raises(ValueError, match=rf"^out: .* got: run: .*{reason}.*; remove ") as error:
        load(run_in(damaged))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("acc_mean", "acc_meen", r"run: expected acc_mean \(.*\) in record 1 of .*, got none"),
        ("epoch,", "epic,", r"run: expected epoch \(.*\) in record 1 of .*, got none"),
        ("\n1,", "\n2,", "run: expected epoch 1 in record 1 of .*, got 2.0"),
        ("\n1,", "\none,", "metrics: expected a table of numbers .*'one' in row 1"),
        ("\n1,", "\n1,1,", "metrics: expected a table .* 1 values without a column in row 1"),
        ("\n1,", "\n1\0,", "metrics: expected a table of numbers in .*row 1"),
        ("\n1,", '\n"1,', "metrics: expected a table of numbers in .*row 1"),
    ],
)
def test_well_formed_lies_of_records(damaged, old, new, reason):
    lie(damaged, "result.json", metrics_blake2b=...)
    text = (damaged / "metrics.csv").read_text()
    (damaged / "metrics.csv").write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"^out: .* got: {reason}.*; remove ") as error:
        load(run_in(damaged))
    assert "\n" not in str(error.value)


def test_records_that_were_changed_later(damaged):
    text = (damaged / "metrics.csv").read_text()
    (damaged / "metrics.csv").write_text(text.replace("train_loss", "train_lost"))
    with pytest.raises(ValueError, match="expected .*metrics.csv as it was written"):
        load(run_in(damaged))


def test_a_result_of_an_older_version_has_no_digest(damaged):
    before = load(run_in(damaged))
    lie(damaged, "result.json", metrics_blake2b=...)
    lie(damaged, "cost.json")
    assert load(run_in(damaged))[1:] == before[1:]


def test_bad_runs_are_named_and_the_others_are_reported(damaged, capsys):
    lie(damaged, "result.json", peers="many")
    lie(damaged.parent / "seed0", "cost.json", device=...)
    other = damaged.parents[1] / "baseline" / "seed5"
    (other / "config.yaml").write_text("a: [")
    plan = ["compare", "--plan", "out/plan.yaml", "--methods", "baseline,mcl,narrow", *HERE]
    assert call(*plan, "--no-progress") == 1
    assert f"baseline, seed 5: left out: out: expected YAML in {other}" in capsys.readouterr().out
    text = Path("out/report.md").read_text()
    assert "| baseline | 1 of 2 |" in text and "| narrow | 2 |" in text
    assert "| mcl | 0 | out: expected the files of a finished run in " in text
    assert "| mcl | 5 | out: expected the files of a finished run in " in text
    assert f"| baseline | 5 | out: expected YAML in {other}" in text
    # All runs whose settings are lost are trained again where that is allowed.
    assert call(*plan, "--no-progress", "--overwrite") == 1
    assert "| baseline | 2 |" in Path("out/report.md").read_text()


def test_a_damaged_run_is_reported_and_the_others_go_on(damaged, capsys):
    (damaged / "metrics.csv").unlink()
    plan = ["compare", "--plan", "out/plan.yaml", "--methods", "baseline,mcl", *HERE]
    assert call(*plan, "--no-progress") == 1
    assert "4 of 4 runs are finished already" in capsys.readouterr().out
    text = Path("out/report.md").read_text()
    assert "| mcl | 1 of 2 |" in text and "| baseline | 2 |" in text
    assert f"| mcl | 5 | out: expected the files of a finished run in {damaged}, " in text
    # Without its result it is gone on with, and the checkpoint has the records too.
    (damaged / "result.json").unlink()
    assert call(*plan, "--no-progress") == 0
    assert "[1/1] mcl, seed 5: mean of peers" in capsys.readouterr().out
    assert (damaged / "metrics.csv").is_file()


def test_a_run_cut_before_its_exports_writes_them(tmp_path):
    config = TrainConfig.from_values(
        {
            "data": "digits-full",
            "train_per_class": 2,
            "batch_size": 20,
            "images_per_class": 2,
            "method": "baseline",
            "cohort": "resnet8,resnet8",
            "epochs": 2,
            "device": "cpu",
        }
    )
    run = Run("baseline", 0, config, tmp_path / "run")

    def perform() -> None:
        assert (
            one_run.perform(
                config.to_values(), run.folder, replace=False, progress=False, alone=True
            )
            is None
        )

    perform()
    assert run.finished and load(run).cost["peak_memory_bytes"] > 2**20
    before = contents(run.folder)
    # As after an end between the result and the exports.
    for name in ("cost.json", "peer1/backbone.json", "peer1/backbone.safetensors"):
        (run.folder / name).unlink()
    assert not run.finished
    perform()
    after = contents(run.folder)
    assert run.finished
    for name in ("peer1/backbone.safetensors", "checkpoint.pt", "result.json", "metrics.csv"):
        assert before[name] == after[name]
    # Nothing was trained: what it would have needed is unknown.
    assert load(run).cost["peak_memory_bytes"] is None
    # Without its checkpoint it would be trained again.
    shutil.rmtree(run.folder / "peer0")
    (run.folder / "checkpoint.pt").unlink()
    assert run.finished


# ---------------------------------------------------------------- processes


def test_runs_in_processes_of_their_own(compared):
    arguments = ["--methods", "baseline,broken", "--seeds", "0,", "--jobs", "2", "--out", "out"]
    plan = ["--plan", str(compared.parent / "mine.yaml")]
    assert call("compare", *SMALL, *plan, *arguments) == 1
    mine, theirs = (result_of(folder / "baseline" / "seed0") for folder in (Path("out"), compared))
    assert mine["peers"] == pytest.approx(theirs["peers"], abs=1.0)
    memory = {float(r["peak_memory_mib"]) for r in rows_of(Path("out/table.csv"))}
    assert len(memory) == 1 and 50 < memory.pop() < 5000
    text = Path("out/report.md").read_text()
    assert "peak memory (MiB)" in text
    assert "| broken | 0 | split_stage: expected" in text


def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    values = TrainConfig.from_values(
        {"method": "baseline", "cohort": "resnet8", "epochs": 10**6, "device": "cpu"}
    ).to_values()
    task = {"values": values, "folder": str(tmp_path / "run"), "replace": False, "progress": False}
    child = subprocess.Popen(
        [sys.executable, "-m", "mclfast.compare.one_run"], stdin=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    child.stdin.write(json.dumps(task) + "\n")
    child.stdin.close()
    assert child.wait(timeout=60) == 1


def test_a_process_that_is_told_to_end_saves(tmp_path):
    small = {"data": "digits-full", "train_per_class": 60, "eval_every": 10**5}
    values = TrainConfig.from_values(
        {"method": "baseline", "cohort": "resnet8", "epochs": 10**6, "device": "cpu", **small}
    ).to_values()
    run = tmp_path / "run"
    task = {"values": values, "folder": str(run), "replace": False, "progress": False}
    child = subprocess.Popen(
        [sys.executable, "-m", "mclfast.compare.one_run"], stdin=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    child.stdin.write(json.dumps(task) + "\n")
    child.stdin.flush()
    until = time.monotonic() + 60
    while not (run / METRICS).exists() and time.monotonic() < until:
        assert child.poll() is None
        time.sleep(0.05)
    child.stdin.close()
    assert child.wait(timeout=60) == 143
    assert (run / CHECKPOINT).exists() and not (run / LOCK).exists()
    assert not (run / one_run.FAILURE).exists()


@pytest.mark.parametrize(
    ("script", "reason"),
    [("kill -9 $$", "the process was ended by signal 9"), ("exit 3", "left with status 3")],
)
def test_a_process_that_dies(script, reason, tmp_path, monkeypatch, capsys):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert call("compare", *SMALL, "--methods", "baseline", "--seeds", "2", "--out", "out") == 1
    assert capsys.readouterr().out.count(reason) == 2


# ---------------------------------------------------------------- design


def test_what_goes_before_what(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(
        "seeds: 2\ndefaults: {lr: 0.3, epochs: 7, amp: off, batch_size: 24}\n"
        "methods: {baseline: {batch_size: 36}, wide: {method: mcl, projection_dim: 9}}\n"
    )
    design = make_design(
        file, None, None, {"epochs": "8"}, ["wide.lr=0.4", "wide.kl-temperature=2"]
    )
    assert (list(design.configs), design.seeds) == (["baseline", "wide"], (0, 1))
    assert (design.baseline_of("wide"), design.baseline_of("baseline")) == ("baseline", None)
    baseline, wide = design.configs.values()
    assert (baseline.lr, baseline.epochs, baseline.batch_size) == (0.3, 8, 36)
    assert (wide.lr, wide.epochs, wide.batch_size, wide.projection_dim) == (0.4, 8, 24, 9)
    assert (wide.method, wide.options.kl_temperature, wide.amp) == ("mcl", 2.0, "off")
    chosen = make_design(file, "mcl,wide", "3,1", {}, [])
    assert (list(chosen.configs), chosen.seeds) == (["mcl", "wide"], (3, 1))
    assert chosen.baseline_of("wide") is None
    assert chosen.configs["mcl"].projection_dim == TrainConfig.projection_dim


def test_a_recipe_gives_the_defaults(capsys):
    Path("mine.yaml").write_text(
        "method: mcl\ncohort: [resnet8, resnet8]\ndata: digits\nlr: 0.3\nepochs: 1\n"
        "batch_size: 20\nimages_per_class: 2\nclip_grad_norm: 5.0\nkl_temperature: 2.0\n"
    )
    Path("plan.yaml").write_text("defaults: {clip_grad_norm: 4.0}\nmethods: [mcl, lmcl]\n")
    recipe_of = ("compare", "--recipe", "mine.yaml")
    given = ("--lr", "0.01", "--device", "cpu", "--no-progress", "--jobs", "0", "--seeds", "1")
    assert call(*recipe_of, *given, "--out", "alone") == 0
    assert sorted(p.name for p in Path("alone").iterdir() if p.is_dir()) == ["mcl"]
    config = yaml.safe_load(Path("alone/mcl/seed0/config.yaml").read_text())
    for name, value in {"lr": 0.01, "batch_size": 20, "kl_temperature": 2.0}.items():
        assert config[name] == value

    values = recipe.load("mine.yaml")
    design = make_design(Path("plan.yaml"), None, None, {}, ["lmcl.kl_temperature=3.5"], values)
    mcl, lmcl = design.configs["mcl"], design.configs["lmcl"]
    assert (mcl.lr, mcl.clip_grad_norm, lmcl.batch_size) == (0.3, 4.0, 20)
    assert (mcl.options.kl_temperature, lmcl.options.kl_temperature) == (2.0, 3.5)
    chosen = make_design(None, "lmcl,baseline", "1", {"lr": 0.2}, [], values).configs
    assert (chosen["lmcl"].options.kl_temperature, chosen["baseline"].lr) == (3.0, 0.2)

    capsys.readouterr()
    assert call(*recipe_of, "--help") == 0
    assert "initial learning rate (default: 0.3)" in " ".join(capsys.readouterr().out.split())
    Path("mine.yaml").write_text("method: mcl\nkl_temprature: 2.0\n")
    assert "'kl_temprature'" in error_of(capsys, *recipe_of, "--methods", "baseline")


def test_a_written_plan_is_the_same_plan(tmp_path):
    given = ["wide.milestones=3,5", "wide.data_root=/a"]
    (tmp_path / "given.yaml").write_text("methods: {lmcl: {}, wide: {method: mcl, workers: 0}}\n")
    design = make_design(tmp_path / "given.yaml", None, "4,2", {"schedule": "cosine"}, given)
    write_design(tmp_path / "plan.yaml", design, "mclfast compare")
    assert make_design(tmp_path / "plan.yaml", None, None, {}, []) == design


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "methods: expected names by --methods, or a --plan or --recipe, got none"),
        (["--methods", "baseline,lmlc"], "method: .*'lmlc'"),
        (["--methods", "mcl,mcl"], "methods: expected each once, got mcl twice"),
        (["--methods", "mcl,"], "methods: expected names separated by commas, got 'mcl,'"),
        (["--methods", ","], "methods: expected names separated by commas, got ','"),
        (["--methods", "../mcl"], "methods: expected a name fit for a folder, got '../mcl'"),
        (["--methods", "mcl", "--seeds", "0"], "seeds: expected a number >= 1, got 0"),
        (["--methods", "mcl", "--seeds", "1,1"], "seeds: expected different numbers"),
        (["--methods", "mcl", "--seeds", "x"], "seeds: expected an integer, got 'x'"),
        (["--methods", "mcl", "--seed", "3"], "seed: expected --seeds in a comparison"),
        (["--method", "mcl"], "method: expected --methods in a comparison"),
        (["--methods", "mcl", "--set", "mcl.seed=3"], "seed: expected --seeds"),
        (["--methods", "mcl", "--set", "lr=3"], "set: expected METHOD.setting=value, got 'lr=3'"),
        (["--methods", "mcl", "--set", "mlc.lr=3"], "set: .*'mlc' .did you mean 'mcl'"),
        (["--methods", "mcl", "--set", "mcl.lr=fast"], "lr: expected a number, got 'fast'"),
        (["--methods", "mcl", "--set", "mcl.matcher_dim=3"], "matcher_dim: .* method mcl, got"),
        (["--methods", "mcl", "--lr", "3", "4"], "lr: expected one value, got '4' after it"),
        (["--methods", "mcl", "--epoch", "3"], "setting: .*'epoch' .did you mean 'epochs'"),
        (["--methods", "mcl", "--jobs", "-1"], "jobs: expected a value >= 0, got -1"),
        (["--methods", "mcl", "--jobs", "x"], "--jobs: expected an integer, got 'x'"),
        (
            ["--methods", "mcl", "--matcher-dim", "3"],
            "matcher-dim: expected a setting of all methods, got one of method lmcl; use --set "
            "lmcl.matcher_dim=X",
        ),
        (["--plan", "no.yaml"], "plan: expected a file no.yaml, found none"),
    ],
)
def test_mistakes(arguments, message, capsys, tmp_path):
    found = error_of(capsys, "compare", *arguments)
    assert re.match(message, found), found
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_folder(capsys):
    Path("a").write_text("")
    for out in ("a", "a/b"):
        message = error_of(capsys, "compare", "--methods", "mcl", "--out", out)
        assert message == "out: expected a folder, got the file a"


def test_the_default_folder_has_no_part_of_a_name_as_a_folder(capsys):
    design = make_design(None, "mcl", "1", {"cohort": "timm:hub/a,resnet8"}, [])
    assert compare._default_folder(design) == Path("runs/compare-digits-timm-hub-a+resnet8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("method: mcl", "plan: .*'method' .did you mean 'methods'"),
        ("methods: mcl", "methods: expected `setting: value` lines, got 'mcl'"),
        ("methods: [mcl, {lmcl: {lr: 3}}]", "methods: expected names in a list, or .* a dict"),
        ("methods: {1: {}}", "method: expected one of .*; got '1'"),
        (
            "methods: {baseline: {}, slow: {method: mcl, lr: fast}}",
            r"lr: expected a number, got 'fast' \(settings of slow\)$",
        ),
        ("methods: {mcl: 3}", "methods.mcl: expected `setting: value` lines, got 3"),
        ("methods: [mcl]\nseeds: []", "seeds: expected different numbers"),
        ("methods: [mcl]\ndefaults: {lrr: 3}", "field: .*'lrr'"),
        ("methods: [", "plan: expected YAML in"),
    ],
)
def test_mistakes_in_a_plan(content, message, tmp_path):
    (tmp_path / "plan.yaml").write_text(content)
    with pytest.raises(ValueError, match=f"^{message}"):
        make_design(tmp_path / "plan.yaml", None, None, {}, [])


def test_help_shows_all_settings(capsys):
    assert call("compare", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--methods" in text and "initial learning rate (default: 0.05)" in text
    assert "--seed " not in text and "--matcher-dim" not in text
    assert "--topology {independent,shared_stem,tree}" in text
    assert "methods: afd, baseline, " in text


# ---------------------------------------------------------------- summary and pictures


def finished(label: str, seed: int, peers: list[float], **values: Any) -> Finished:
    """A run that reached what is given, without having run."""
    config = TrainConfig.from_values({"cohort": ["resnet32"] * len(peers), **values})
    history = [{"epoch": 1.0, "acc_mean": 1.0}, {"epoch": 2.0, "acc_mean": sum(peers) / len(peers)}]
    result = RunResult(tuple(peers), max(peers) + 1, max(peers) + 2, 3.0, history)
    cost = {
        "device": "cpu",
        "threads": 1,
        "peak_memory_bytes": 2**20 * (seed + 1),
        "parameters": [10] * len(peers),
        "parameters_in_training": 99,
    }
    about = {"mclfast": {"version": "0", "git": None}, "torch": {"version": "2"}}
    run = Run(label, seed, dataclasses.replace(config, seed=seed), Path(label))
    return Finished(run, result, cost, about)


def design_of(runs: list[Finished]) -> Design:
    return Design(
        {f.run.label: f.run.config for f in runs}, tuple(sorted({f.run.seed for f in runs}))
    )


def test_gain_is_paired_by_seed():
    runs = [
        finished("baseline", 0, [70.0, 72.0], method="baseline"),
        finished("baseline", 1, [60.0, 62.0], method="baseline"),
        finished("mcl", 2, [90.0, 90.0], method="mcl"),
        finished("mcl", 1, [64.0, 63.0], method="mcl"),
        finished("mcl", 0, [71.0, 75.0], method="mcl"),
    ]
    _, mcl = summarize(design_of(runs), runs)
    assert mcl.seeds == (0, 1, 2)
    assert mcl.values["mean_of_peers"] == [73.0, 63.5, 90.0]
    # The baseline has no run with seed 2.
    assert mcl.values["gain"] == [2.0, 2.5]
    assert (mcl.values["gain_peer0"], mcl.values["gain_peer1"]) == ([1.0, 4.0], [3.0, 1.0])
    assert mcl.values["peak_memory_mib"] == [1.0, 2.0, 3.0]
    row = next(r for r in summary_rows([mcl]) if r["metric"] == "gain")
    assert (row["mean"], row["sd"]) == (2.25, pytest.approx(math.sqrt(0.125)))
    assert (row["unit"], row["seeds"]) == ("points", 2)


def test_each_cohort_has_a_baseline_of_its_own(tmp_path):
    three = [60.0, 60.0, 66.0]
    runs = [
        finished("two", 0, [70.0, 72.0], method="baseline"),
        finished("three", 0, three, method="baseline"),
        finished("mcl", 0, [72.0, 72.0], method="mcl"),
        finished("mcl-three", 0, [a + 4 for a in three], method="mcl"),
        finished("other-data", 0, [72.0, 72.0], method="mcl", data="cifar10"),
    ]
    found = {s.label: s.values.get("gain") for s in summarize(design_of(runs), runs)}
    assert found == {
        "two": None,
        "three": None,
        "mcl": [1.0],
        "mcl-three": [4.0],
        "other-data": None,
    }
    report.write_report(tmp_path, design_of(runs), runs, {}, "mclfast compare")
    text = (tmp_path / "report.md").read_text()
    assert "points over the baseline of the same networks" in text
    assert "None for other-data: other networks" in text
    assert "resnet32 + resnet32 (two, mcl, other-data); 3 x resnet32 (three, mcl-three)" in text


def test_spread_of_one_value_has_no_deviation():
    assert spread([1.0, 3.0]) == "2.00 ± 1.41"
    assert spread([2.0], sign="+", digits=1) == "+2.0"
    # Rounded to nothing, it has no side.
    assert spread([-1.0, 0.999]) == "0.00 ± 1.41" and spread([-0.001], sign="+") == "+0.00"


def test_what_learned_without_labels_is_said(tmp_path):
    runs = [
        finished("baseline", 0, [70.0, 71.0], method="baseline"),
        finished("moco", 0, [40.0, 41.0], method="moco-mcl", sampler="shuffle"),
    ]
    report.write_report(tmp_path, design_of(runs), runs, {}, "mclfast compare")
    text = (tmp_path / "report.md").read_text()
    assert "moco: trained without labels. The classifiers are class means" in text
    report.write_report(tmp_path, design_of(runs[:1]), runs[:1], {}, "mclfast compare")
    assert "without labels" not in (tmp_path / "report.md").read_text()


def test_what_others_wrote_is_text(tmp_path):
    runs = [finished("baseline", 0, [70.0, 71.0], method="baseline")]
    failed = {runs[0].run: "TypeError: got <class 'int'> | 3 < 4"}
    report.write_report(
        tmp_path, design_of(runs), runs, failed, "mclfast compare --out 'a`b<i>\nc'"
    )
    text = (tmp_path / "report.md").read_text()
    assert "| baseline | 0 | TypeError: got &lt;class 'int'> \\| 3 < 4 |" in text
    # A fence that the command does not hold, in one line.
    assert "- `` mclfast compare --out 'a`b<i> c' ``\n" in text
    page = (tmp_path / "report.html").read_text()
    assert "<code>mclfast compare --out &#x27;a`b&lt;i&gt;" in page and "<class" not in page


def test_numbers_are_flush_right(tmp_path):
    runs = [
        finished("baseline", seed, [a, a], method="baseline") for seed, a in ((0, 5.0), (1, 71.0))
    ]
    made = report.write_report(tmp_path, design_of(runs), runs, {}, "mclfast compare")
    assert made.tables[0].numeric == [False, True, True, True, True]
    text = (tmp_path / "report.md").read_text()
    assert "| --- | ---: | ---: | ---: | ---: |" in text
    assert '<td>baseline</td><td class="n">2</td>' in (tmp_path / "report.html").read_text()
    head, row = report.text(made.tables[0]).splitlines()
    assert head.index("mean of peers") + len("mean of peers") == row.index("46.67") + len("46.67")


class Tags(HTMLParser):
    """Checks that every tag that is opened is closed, in the right order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed(compared):
    tags = Tags()
    tags.feed((compared / "report.html").read_text())
    tags.close()
    assert tags.open == []


@pytest.fixture
def figures(monkeypatch) -> list[Any]:
    """Collects the figures in place of their files."""
    kept: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
    return kept


def test_bars_show_the_numbers(figures, tmp_path):
    bars = {
        "baseline": plots.Bar([70.0, 74.0], [75.0, 75.0], None),
        "mcl": plots.Bar([75.0, 77.0], [78.0, 80.0], [5.0, 3.0]),
    }
    plots.accuracy_bars(bars, tmp_path / "a.png", "title", "baseline")
    left, right = figures[0].axes
    start = left.get_xlim()[0]
    assert 0 < start < 70 and f"axis from {start:g}" in left.get_xlabel()
    assert [p.get_x() + p.get_width() for p in left.patches] == [72.0, 76.0]
    assert [p.get_width() for p in right.patches] == [4.0]
    dots = [list(line.get_xdata()) for line in left.lines if line.get_marker() == "o"]
    assert dots == [[70.0, 74.0], [75.0, 77.0]]
    ensembles = [float(line.get_xdata()[0]) for line in left.lines if line.get_marker() == "D"]
    assert ensembles == [75.0, 79.0]
    (bar,) = (c for c in right.containers if hasattr(c, "has_xerr"))
    ends = bar[2][0].get_segments()[0][:, 0]
    assert list(ends) == pytest.approx([4 - math.sqrt(2), 4 + math.sqrt(2)])
    assert [t.get_text() for t in left.get_yticklabels()] == ["baseline", "mcl"]
    # The first is on top in both.
    assert left.yaxis_inverted() and left.get_ylim() == right.get_ylim()


def test_curves_show_the_numbers(figures, tmp_path):
    runs = ([1, 5], [3, 5])
    histories = [[{"epoch": e, "acc_mean": a} for e, a in enumerate(run, 1)] for run in runs]
    plots.accuracy_bands({"mcl": histories, "one": histories[:1]}, tmp_path / "a.png", "title")
    (axis,) = figures[0].axes
    assert [list(line.get_ydata()) for line in axis.lines] == [[2, 5], [1, 5]]
    corners = axis.collections[0].get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(2 - math.sqrt(2))
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert texts == ["mcl (2 seeds)", "one (1 seed)"]


def test_a_single_epoch_is_a_point_at_a_whole_number(figures, tmp_path):
    row = {"epoch": 1, "acc_mean": 3.0, "acc_peer0": 3.0, "train_loss": 1.0}
    plots.accuracy_bands({str(i): [[row]] for i in range(9)}, tmp_path / "a.png", "title")
    plots.run_curves([row], ["resnet8"], tmp_path / "b.png", "title")
    for figure in figures:
        figure.canvas.draw()
        for axis in figure.axes:
            low, high = axis.get_xlim()
            assert [t for t in axis.get_xticks() if low <= t <= high] == [1]
            looks = {(line.get_color(), line.get_marker()) for line in axis.lines}
            assert len(looks) == len(axis.lines) and not {m for _, m in looks} & {None, "None"}


@pytest.mark.parametrize("count", [1, 4, 16])
def test_nothing_covers_anything(figures, tmp_path, count):
    """Titles and legends lie inside of the picture and outside of the axes."""
    rows = [
        {
            "epoch": e,
            "acc_mean": 3.0,
            "acc_ensemble": 4.0,
            "train_loss": 1.0,
            **{f"acc_peer{i}": 3.0 for i in range(count)},
        }
        for e in (1, 2)
    ]
    labels = [f"{i}-a-rather-long-name-of-an-entry-of-a-plan" for i in range(count)]
    title = "Training methods on digits-full: " + " or ".join(["resnet110 + wrn_40_2"] * 8)
    values = [70.0, 74.0]
    bars = {label: plots.Bar(values, values, values) for label in labels}
    plots.accuracy_bars(bars, tmp_path / "a.png", title, "baseline")
    plots.accuracy_bands({label: [rows] for label in labels}, tmp_path / "b.png", title)
    plots.run_curves(rows, labels, tmp_path / "c.png", title)
    for figure in figures:
        figure.canvas.draw()
        around = figure.bbox.padded(1)
        plotted = [axis.get_window_extent() for axis in figure.axes]
        legends = [axis.get_legend() for axis in figure.axes] + figure.legends
        texts = [*filter(None, legends), figure._suptitle]
        for box in (text.get_window_extent() for text in texts):
            assert around.containsx(box.x0) and around.containsx(box.x1)
            assert around.containsy(box.y0) and around.containsy(box.y1)
            assert not any(box.overlaps(axis.padded(-2)) for axis in plotted)
        for axis in plotted:
            assert axis.width > 250 and axis.height > 80


def test_colours_differ_for_the_colour_blind():
    from matplotlib.colors import to_rgb

    # Of Machado, Oliveira and Fernandes (2009): no green cones, no red ones; linear light.
    blind = np.array(
        [
            [
                [0.367322, 0.860646, -0.227968],
                [0.280085, 0.672501, 0.047413],
                [-0.011820, 0.042940, 0.968881],
            ],
            [
                [0.152286, 1.052583, -0.204868],
                [0.114503, 0.786281, 0.099216],
                [-0.003882, -0.048116, 1.051998],
            ],
        ]
    )
    colours = np.array([to_rgb(c) for c in plots._COLOURS])
    linear = np.where(colours > 0.04045, ((colours + 0.055) / 1.055) ** 2.4, colours / 12.92)
    for matrix in (np.eye(3), *blind):
        seen = np.clip(linear @ matrix.T, 0, 1)
        shown = np.where(seen > 0.0031308, 1.055 * seen ** (1 / 2.4) - 0.055, 12.92 * seen)
        apart = np.linalg.norm(shown[:, None] - shown, axis=-1) + np.eye(len(shown))
        # Matplotlib's own colours come as near as 0.05.
        assert apart.min() > 0.12


def test_curves_of_many_methods(figures, tmp_path):
    rows = [[{"epoch": e, "acc_mean": 10.0 * i + e} for e in range(1, 10)] for i in range(12)]
    plots.accuracy_bands({str(i): [row] for i, row in enumerate(rows)}, tmp_path / "a.png", "t")
    whole, late = figures[0].axes
    assert len({(line.get_color(), line.get_linestyle()) for line in whole.lines}) == 12
    assert late.get_xlim() == (6, 9) and late.get_ylim() == (6, 119)
    assert whole.get_legend() is None and len(late.get_legend().get_texts()) == 12


def test_published_column_in_a_report(tmp_path):
    settings, alone = recipe.load("lmcl-cifar100"), recipe.load("baseline-cifar100")
    runs = [
        finished("baseline", 0, [70.0, 71.0], **alone | {"cohort": ["resnet32"] * 2}),
        finished("lmcl", 0, [75.0, 76.0], **settings),
        finished("short", 0, [75.0, 76.0], **settings | {"epochs": 3}),
    ]
    report.write_report(tmp_path, design_of(runs), runs, {}, "mclfast compare")
    text = (tmp_path / "report.md").read_text()
    assert "| published protocol | published |" in text
    assert "| baseline | 1 | 70.50 | 72.00 | 73.00 | 70.91 ± 0.14 |" in text.replace("| - |", "|")
    assert "| lmcl | 1 | 75.50 | +5.00 | 77.00 | 78.00 | 75.82 (alone 70.91) |" in text
    assert "| short | 1 | 75.50 | +5.00 | 77.00 | 78.00 | - |" in text
    assert "Only where all settings that decide the outcome are those of the published" in text
    assert "lmcl: layer-wise MCL (arXiv 2207.11518)" in text
    assert (
        "short: the published number is not shown, as its settings differ: epochs 3 "
        "(published 300)." in text
    )
    several = published(TrainConfig.from_values(recipe.load("dml-cifar100")))
    assert report._published(several) == "75.08 (ensemble 77.03, alone 71.09)"
    pair = {"cohort": ["resnet32", "resnet110"]}
    assert report._published(published(TrainConfig.from_values(settings | pair))) == "75.82 & 79.71"
    assert report._published(None) == "-"
