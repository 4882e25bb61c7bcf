"""The baseline of the bilevel benchmark, and the command that measures."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mclfast import Batch, Cohort, bilevel_gradient, models
from mclfast.bench.published_forms.bilevel import PublishedBilevel
from mclfast.cohort.functions import cohort_function
from mclfast.methods import method_class

pytestmark = pytest.mark.usefixtures("one_thread")
COMMAND = Path(__file__).resolve().parents[2] / "bench" / "bench_bilevel.py"


def test_published_sequence_gives_the_same_gradient():
    torch.manual_seed(0)
    cohort = Cohort([models.create("resnet8", num_classes=5) for _ in range(2)], projection_dim=8)
    method = method_class("lmcl")(cohort.feature_dims)
    cohort.double()
    method.double()
    images, labels = torch.randn(6, 3, 8, 8).double(), torch.arange(6) % 3
    batch = Batch(labels, torch.arange(6), 0, 0)
    before = {k: v.clone() for k, v in cohort.state_dict().items()}
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "inner_steps": 1}
    published = PublishedBilevel(cohort, method, **settings)(images, labels)
    assert all(torch.equal(v, before[k]) for k, v in cohort.state_dict().items())
    assert all(p.grad is None for p in (*cohort.parameters(), *method.parameters()))
    ours = bilevel_gradient(
        lambda outputs: method.inner_loss(outputs, batch),
        lambda outputs: method.outer_loss(outputs, batch),
        dict(cohort.named_parameters()),
        method.meta_parameters(),
        network=cohort_function(cohort, images),
        **settings,
    ).grads
    for a, b in zip(ours, published, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * float(b.abs().max()))


def test_the_command_writes_times_and_peaks(tmp_path, monkeypatch, capsys):
    wanted = ("ordinary", "bilevel")
    arguments = [str(COMMAND), "--quick", "--out", str(tmp_path), "--kinds", *wanted]
    run, peaks = subprocess.run, {}

    def child(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        # Takes seconds to start: one that runs shows that they do.
        done = (
            run(command, **settings)
            if command[-1] == "ordinary"
            else subprocess.CompletedProcess(command, 0, stdout="123456789\n")
        )
        if "--peak" in command:
            peaks[command[-1]] = int(done.stdout)
        return done

    monkeypatch.setattr(subprocess, "run", child)
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(COMMAND), run_name="__main__")
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "bilevel.json").read_text())
    assert found["settings"]["batch"] == 8 and "torch" in json.dumps(found["environment"])
    assert set(found["steps"]) == set(wanted)
    for kind, row in found["steps"].items():
        assert row["median_ms"] > 0 and len(row["rounds_ms"]) == 1
        assert row["peak_bytes"] == peaks[kind] > 0
    assert found["steps"]["ordinary"]["times_ordinary"] == 1
    assert found["steps"]["bilevel"]["times_ordinary"] > 1
    assert all(f"{name} " in out for name in wanted)
