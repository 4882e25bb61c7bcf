"""The measurement of whole training steps: the baseline is right, the commands run."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from mclfast.bench import draw_cohort, train_step
from mclfast.bench.problem import Unavailable
from mclfast.bench.published_forms.train_step import PublishedStep
from mclfast.bench.train_step import PUBLISHED, StepCase, make_batch, make_step

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
SMALL = StepCase("ours", network="resnet8", peers=3, batch=8, side=8, classes=4)


def test_published_steps_equal_ours():
    """Losses, all weights after two ordinary steps and a bilevel one, in float64."""
    images, batch = make_batch(SMALL)
    ours, theirs = make_step(SMALL), make_step(SMALL)
    for trainer in (ours, theirs):
        trainer.cohort.double().train()
        trainer.method.double().train()
    plain = PublishedStep(theirs.cohort, theirs.method, theirs.config)
    for _ in range(2):
        want = ours(images.double(), batch)
        found = plain(images.double(), batch.labels)
        for name, value in want.items():
            assert found[name] == pytest.approx(float(value.detach()), rel=1e-9, abs=1e-9), name
        assert {name for name in found if name not in want} == {f"accuracy{i}" for i in range(12)}
    ours.bilevel(images.double(), batch)
    plain.bilevel(images.double(), batch.labels)
    for a, b in ((ours.cohort, theirs.cohort), (ours.method, theirs.method)):
        for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
            torch.testing.assert_close(y, x, rtol=1e-7, atol=1e-8, msg=name)


def test_every_variant_is_a_step():
    for name, settings in (train_step.PLAIN | train_step.OURS).items():
        if name != "compiled":
            config = make_step(dataclasses.replace(SMALL, variant=name)).config
            assert {key: getattr(config, key) for key in settings} == settings


def row(variant: str, ms: float, **more: object) -> train_step.Row:
    case = dataclasses.replace(SMALL, variant=variant, batch=100, **more)
    return dataclasses.asdict(case) | {
        "p20": ms,
        "p50": ms,
        "p80": ms,
        "samples": 1,
        "peak_mib": 1024.0 * case.peers,
    }


def test_rates_with_a_bilevel_step_at_every_50th():
    rows = [
        row("ours", 10.0),
        row("ours", 50.0, bilevel=True),
        row(PUBLISHED, 12.0),
        row(PUBLISHED, 300.0, bilevel=True),
        row("sequential", 9.0),
    ]
    ours, published = train_step.with_bilevel(rows)
    assert ours["seconds"] == pytest.approx(0.55)
    assert ours["images_per_s"] == pytest.approx(50 * 100 / 0.55)
    assert ours["added_percent"] == pytest.approx(10) and ours["ordinary_steps"] == 5
    assert ours["ratio_published"] == pytest.approx(0.9 / 0.55)
    assert published["ratio_published"] == 1
    assert "ours" in train_step.bilevel_table([ours, published])


def test_picture_of_the_cohort_sizes(tmp_path: Path):
    rows = [row(v, 5.0 * m, peers=m) for v in (PUBLISHED, "sequential") for m in (1, 2, 4)]
    # A peak that could not be measured leaves a gap.
    rows[0] |= {"peak_mib": None}
    path = tmp_path / "sizes.png"
    draw_cohort.draw(rows, {"cpu": "a CPU", "gpu": "", "threads": 1}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("command", "name"), [("bench_train_step", "train-step"), ("bench_cohort_size", "cohort-size")]
)
def test_the_commands_run(command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Processes that take seconds to start, see the test of one of them.
    monkeypatch.setattr(train_step, "peak", lambda case: case.peers * 2**20)
    arguments = [command, "--quick", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(ROOT / "bench" / f"{command}.py"), run_name="__main__")
    results = json.loads((tmp_path / f"{name}.json").read_text())
    assert {found["variant"] for found in results["rows"]} >= {PUBLISHED, "ours"}
    for found in results["rows"]:
        assert found["p50"] > 0 and found["peak_mib"] == found["peers"]
        assert found["ratio_published"] == 1 or found["variant"] != PUBLISHED
    if name == "train-step":
        assert [r["variant"] for r in results["bilevel_every_50"]][:2] == [PUBLISHED, "ours"]
    else:
        monkeypatch.setattr(sys, "argv", [command, "--draw", str(tmp_path / f"{name}.json")])
        (tmp_path / f"{name}.png").unlink()
        runpy.run_path(str(ROOT / "bench" / f"{command}.py"), run_name="__main__")
        assert (tmp_path / f"{name}.png").exists()


@pytest.mark.parametrize("name", ["train-step", "cohort-size", "bilevel", "bilevel-contiguous"])
def test_committed_results_still_load(name: str, tmp_path: Path):
    paths = sorted((ROOT / "bench" / "results").glob(f"*/train-step/{name}.json"))
    assert paths
    for path in paths:
        results = json.loads(path.read_text())
        if name.startswith("bilevel"):
            steps = results["steps"]
            assert steps["bilevel"]["peak_over_ordinary"] == pytest.approx(
                steps["bilevel"]["peak_bytes"] / steps["ordinary"]["peak_bytes"]
            )
            continue
        assert PUBLISHED in train_step.table(results["rows"])
        if name == "train-step":
            assert results["bilevel_every_50"] == train_step.with_bilevel(results["rows"])
        else:
            draw_cohort.draw(results["rows"], results["environment"], tmp_path / "sizes.png")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measured on Linux only")
def test_peak_counts_all_that_training_needs():
    """Weights, gradients, momentum and the activations of a step, of three networks."""
    case = dataclasses.replace(SMALL, batch=64, side=16, classes=32)
    parameters = sum(p.numel() for p in make_step(case).cohort.parameters())
    found = train_step.peak(case)
    assert 3 * 4 * parameters < found < 2**30


def test_peak_that_cannot_be_measured(monkeypatch: pytest.MonkeyPatch):
    def broken(case: StepCase) -> int:
        raise Unavailable("no such system")

    monkeypatch.setattr(train_step, "peak", broken)
    (found,) = train_step.run_cases([SMALL], budget=0, rounds=(1, 1))
    assert found["peak_error"] == "no such system" and "peak_mib" not in found
    assert "no such system" not in train_step.table([found])
