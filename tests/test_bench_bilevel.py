"""The baseline of the bilevel benchmark, and the command that measures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mclfast import Batch, Cohort, bilevel_gradient, models
from mclfast.benchmark.published_bilevel import PublishedBilevel
from mclfast.cohort_functions import cohort_function
from mclfast.methods import method_class

pytestmark = pytest.mark.usefixtures("one_thread")
COMMAND = Path(__file__).resolve().parents[1] / "bench" / "bench_bilevel.py"


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


def test_the_command_writes_times_and_peaks(tmp_path):
    wanted = ("ordinary", "bilevel")
    command = [sys.executable, str(COMMAND), "--quick", "--out", str(tmp_path), "--kinds", *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bilevel.json").read_text())
    assert found["settings"]["batch"] == 8 and "torch" in json.dumps(found["environment"])
    assert set(found["steps"]) == set(wanted)
    for row in found["steps"].values():
        assert row["median_ms"] > 0 and row["peak_bytes"] > 0 and len(row["rounds_ms"]) == 1
    assert found["steps"]["ordinary"]["times_ordinary"] == 1
    assert found["steps"]["bilevel"]["times_ordinary"] > 1
    assert all(f"{name} " in done.stdout for name in wanted)
