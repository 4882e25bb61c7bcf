"""The measurement library behind ``mclfast bench``: baselines, floor, probes, files."""

from __future__ import annotations

import csv
import io
import json
import math
import time

import pytest
import torch

import mclfast
from mclfast import cli
from mclfast.benchmark import cases, draw, floor, measure, published, report
from mclfast.benchmark import run as runner
from mclfast.benchmark.cases import BOTH, FORWARD, MODES, SECOND, WEIGHTS, Case, Provider

ABOUT = {"cpu": "a CPU", "threads": 2, "gpu": ""}


def layerwise(mode: str = BOTH, m: int = 2, l: int = 1, b: int = 16, **more) -> Case:  # noqa: E741
    return Case("layerwise_mcl", mode, m, l, b, more.pop("d", 8), **more)


@pytest.mark.parametrize(("m", "stages"), [(2, 1), (3, 2)])
def test_published_form_equals_the_loss(m, stages):
    generator = torch.Generator().manual_seed(1)
    # One class has a single sample: an anchor without a positive.
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 0])
    nodes = torch.randn(m * stages, 9, 5, dtype=torch.float64, generator=generator)
    nodes = torch.nn.functional.normalize(nodes, dim=-1).requires_grad_()
    shape = (m * stages, m * stages, 9)
    weights = torch.rand(shape, dtype=torch.float64, generator=generator).requires_grad_()
    ours = mclfast.layerwise_mcl_loss(
        nodes.unflatten(0, (m, stages)), labels, weights, temperature=0.2, kl_temperature=2.0
    )
    networks = [a // stages for a in range(m * stages)]
    theirs = published.layerwise_mcl_loss(
        nodes, networks, labels, weights, temperature=0.2, kl_temperature=2.0
    )
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=0)
        expected = torch.autograd.grad(x, (nodes, weights), retain_graph=True)
        found = torch.autograd.grad(y, (nodes, weights), retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_eager_baseline_passes_its_check(mode, dtype):
    case = layerwise(mode, m=3, l=2, b=70, dtype=dtype)
    inputs = cases.make_inputs(case)
    eager = cases.PROVIDERS["layerwise_mcl"][0]
    ready = runner.prepare(case, eager, inputs, cases.truth(case, inputs))
    assert ready.error <= cases.TOLERANCE[dtype]


def test_truth_does_not_depend_on_the_blocks():
    case = layerwise(SECOND, m=2, l=2, b=10)
    inputs = cases.make_inputs(case)
    for x, y in zip(
        cases.truth(case, inputs, rows=3), cases.truth(case, inputs, rows=10), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("op", ["supcon", "nt_xent", "info_nce"])
def test_pytorch_metric_learning_computes_the_same(op):
    case = Case(op, BOTH, 1 if op == "supcon" else 2, 1, 12, 8, "float64")
    inputs = cases.make_inputs(case)
    (pml,) = (p for p in cases.PROVIDERS[op] if p.name == "pml")
    try:
        # It adds a constant of about 1e-16 to a denominator in float64.
        ready = runner.prepare(case, pml, inputs, cases.truth(case, inputs))
    except cases.Unavailable as reason:
        pytest.skip(str(reason))
    assert ready.error <= 1e-10


def test_wrong_result_gives_no_number(monkeypatch):
    def build(case, inputs):
        return lambda leaves: 1.00002 * cases.PROVIDERS["supcon"][0].build(case, inputs)(leaves)

    def broken(case, inputs):
        def loss(leaves):
            raise RuntimeError("no kernel")

        return loss

    entries = [*cases.PROVIDERS["supcon"][:1], Provider("off", build), Provider("bad", broken)]
    monkeypatch.setitem(cases.PROVIDERS, "supcon", entries)
    outcome = runner.Outcome()
    case = Case("supcon", BOTH, 1, 1, 16, 8)
    runner.run_case(case, outcome, budget=0, memory=False)
    assert [row["provider"] for row in outcome.rows] == ["reference"]
    assert [(skip.provider, skip.red) for skip in outcome.skipped] == [("off", True), ("bad", True)]
    text = report.skipped_table(outcome)
    assert f"off ({case.name}): WRONG: differs from the reference in float64 by 2.0e-05" in text
    assert "no kernel" in text


def test_nan_is_a_wrong_result():
    case = Case("supcon", FORWARD, 1, 1, 4, 4)
    inputs = cases.make_inputs(case)
    one, nan = (torch.tensor(value) for value in (1.0, math.nan))
    provider = cases.PROVIDERS["supcon"][0]
    assert math.isnan(cases.difference(case, provider, inputs, (nan, one), (one, one)))
    with pytest.raises(ArithmeticError, match="by nan"):
        runner.prepare(case, provider, inputs, (nan,))


def test_unavailable_provider_is_listed_with_its_reason(monkeypatch):
    def build(case, inputs):
        raise cases.Unavailable("there is no such chip")

    monkeypatch.setitem(cases.PROVIDERS, "supcon", [Provider("chip", build)])
    outcome = runner.Outcome()
    for batch in (4, 8):
        runner.run_case(Case("supcon", BOTH, 1, 1, batch, 4), outcome)
    assert outcome.rows == []
    assert "chip (2 cases): there is no such chip" in report.skipped_table(outcome)


def test_case_that_does_not_fit_into_memory():
    case = layerwise(m=2, b=16)
    huge = Provider("huge", cases.PROVIDERS["layerwise_mcl"][0].build, lambda case: 2.0**60)
    with pytest.raises(cases.Unavailable, match=r"expected to need 1073741824\.0 GiB"):
        runner.prepare(case, huge, cases.make_inputs(case), ())


def test_floor_counts():
    rates = floor.Rates({"nt": 1e9, "nn": 1e9, "tn": 1e9}, 1e9)

    def units(case: Case) -> float:
        return sum(floor.work(case).units.values())

    # 9 pairs, 6 nodes: 3 * 9 + 1.5 * 6, and 6^2 / 128 for each of Gram and mix.
    case = layerwise(m=2, l=3, b=128, d=128)
    assert units(case) == pytest.approx(36 + 2 * 36 / 128)
    assert floor.work(case).exps == 15 * 128**2
    expected = (36 + 2 * 36 / 128) * 2 * 128**3 + 15 * 128**2
    assert floor.floor_ms(case, rates) == pytest.approx(expected / 1e9 * 1e3)
    forward = layerwise(FORWARD, m=2, l=3, b=128, d=128)
    assert units(forward) == pytest.approx(9 + 3 + 36 / 128)
    second = layerwise(SECOND, m=2, l=3, b=128, d=128)
    assert units(second) == pytest.approx(10 * 9 + 5 * 6 + 4 * 36 / 128)
    assert units(Case("supcon", BOTH, 1, 1, 64)) == 1.5
    assert units(Case("info_nce", BOTH, 2, 1, 64)) == 3
    assert floor.work(Case("nt_xent", BOTH, 2, 1, 64)).batch == 128


def test_interleaved_timing():
    order = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.02)

    timings = measure.interleaved(
        {"slow": slow, "fast": lambda: order.append("fast")},
        device="cpu", budget=0, min_rounds=4,
    )  # fmt: skip
    slow_, fast = timings["slow"], timings["fast"]
    assert len(slow_.samples) == len(slow_.rounds) == len(fast.rounds) == 4
    assert len(fast.samples) == 4 * 20
    # Each round begins with another call; the first two entries are the estimates.
    turns = [name for i, name in enumerate(order[2:]) if i == 0 or order[i + 1] != name]
    assert turns[:5] == ["slow", "fast", "slow", "fast", "slow"]
    assert fast.ratio(slow_) > 20
    assert slow_.quantile(0) >= 20


def test_quantiles():
    timing = measure.Timing([4.0, 1.0, 3.0, 2.0, 5.0], [1.0])
    assert [timing.quantile(q) for q in (0, 0.2, 0.5, 1)] == [1, 1.8, 3, 5]


def test_saved_bytes():
    x = torch.randn(100, 10, requires_grad=True)
    assert measure.saved_bytes(lambda: x.exp().sum(), [x]) == 4000
    assert measure.saved_bytes(lambda: (x * x).sum(), [x]) == 0
    # Twice the same tensor counts once.
    assert measure.saved_bytes(lambda: x.exp().exp().sum(), [x]) == 8000


def test_memory_probe_sees_a_known_allocation():
    try:
        found = measure.probe_peak(64 * measure.MIB) / measure.MIB
    except cases.Unavailable as reason:
        pytest.skip(str(reason))
    assert 63 <= found <= 68


def test_targets_are_judged():
    case = layerwise(m=2, l=4, b=512, d=128)
    base = {
        "op": case.op, "mode": BOTH, "M": 2, "L": 4, "B": 512, "D": 128, "dtype": "float32",
        "device": "cpu", "ours": True, "provider": "cpu-fused",
    }  # fmt: skip
    row = base | {
        "metric": "time", "p50": 30.0, "p20": 29.0, "p80": 31.0, "ratio_eager": 36.0,
        "ratio_compiled": 34.0, "floor": 20.0, "ratio_floor": 1.5,
    }  # fmt: skip
    peak = base | {"metric": "peak_extra", "p50": 19.0}
    assert report.verdicts(row, [row, peak], threads=2) == [
        ("35x eager", True), ("35x compiled", False), ("20 MiB", True), ("1.6x floor", True),
    ]  # fmt: skip
    # Stated for two threads; the floor is the machine's own.
    assert report.verdicts(row, [row, peak], threads=1) == [("1.6x floor", True)]
    second = row | {"mode": SECOND, "ratio_first_order": 4.2}
    assert report.verdicts(second, [second], threads=2) == [("4x first order", False)]
    text = report.table(runner.Outcome(rows=[row, peak]), threads=2)
    assert "35x compiled: NOT MET; 20 MiB: met" in text
    assert report.verdicts(row | {"ours": False}, [row], threads=2) == []


def test_presets_cover_the_targets():
    paper = cases.preset("paper")
    assert len(paper) == len(set(paper))
    judged = {(c.m, c.l, c.b) for c in paper if cases.target(c) is not None}
    assert judged == set(cases.TARGETS)
    assert {c.mode for c in paper} == {FORWARD, BOTH, WEIGHTS, SECOND}
    assert all(c.device == "cuda" for c in cases.preset("gpu"))
    with pytest.raises(ValueError, match="preset: expected one of .*got .large."):
        cases.preset("large")


def test_pictures(tmp_path):
    outcome = runner.Outcome()
    for batch in (4, 8):
        runner.run_case(
            Case("layerwise_mcl", BOTH, 2, 1, batch, 128),
            outcome, wanted=["eager", "reference"], budget=0, memory=False,
        )  # fmt: skip
    (path,) = draw.draw(outcome.rows, tmp_path, ABOUT)
    assert path.name == "layerwise_mcl.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert draw.draw(outcome.rows[:2], tmp_path, ABOUT) == []


def test_command(tmp_path, capsys):
    wanted = [f"--provider={name}" for name in ("eager", "reference", "cpu-fused", "cpu", "pml")]
    status = cli.main(["bench", "--preset", "smoke", "--out", str(tmp_path), "--plot", *wanted])
    output = capsys.readouterr().out
    assert status == 0, output
    assert "layerwise_mcl, second_order, float32, cpu" in output
    assert "x eager" in output and "x floor" in output

    results = json.loads((tmp_path / "results.json").read_text())
    assert results["schema"] == report.SCHEMA
    assert {"cpu", "cores", "threads", "torch", "python", "commit", "date"} <= set(
        results["environment"]
    )
    assert results["rates"]["B=16 D=16 float32 cpu"]["gemm_flop_per_s"]["nt"] > 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert list(rows[0]) == list(report.COLUMNS)
    assert len(rows) == len(results["rows"])
    for row in rows:
        assert row["metric"] == "time" and row["unit"] == "ms"
        assert 0 < float(row["min"]) <= float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert float(row["error"]) <= 1e-5
        assert float(row["ratio_floor"]) > 0
        assert (row["ratio_first_order"] != "") == (row["mode"] == SECOND)
    assert {row["provider"] for row in rows} >= {"eager", "reference"}

    json_path = tmp_path / "results.json"
    assert cli.main(["bench", "--replot", str(json_path)]) == 0
    assert "layerwise_mcl, second_order" in capsys.readouterr().out
    json_path.write_text('{"schema": 0}')
    assert cli.main(["bench", "--replot", str(json_path)]) == 2
    assert "expected schema 1" in capsys.readouterr().err


def test_command_refuses_what_it_cannot_do(capsys):
    assert cli.main(["bench", "--plot"]) == 2
    assert "plot: expected a folder given by --out" in capsys.readouterr().err
    assert cli.main(["bench", "--preset", "smoke", "--op", "supcon", "--mode", FORWARD]) == 2
    assert "the choice leaves none" in capsys.readouterr().err


def test_better_rates_lower_the_floors_of_earlier_rows(monkeypatch):
    speeds = iter((1e9, 2e9))

    def rates(case: Case) -> floor.Rates:
        speed = next(speeds)
        return floor.Rates(dict.fromkeys(floor.LAYOUTS, speed), math.inf, {})

    monkeypatch.setattr(floor, "measure_rates", rates)
    outcome = runner.Outcome()
    for op in ("supcon", "info_nce"):
        case = Case(op, BOTH, 1 if op == "supcon" else 2, 1, 8, 8)
        runner.run_case(case, outcome, wanted=["reference"], budget=0, memory=False)
    unit = 2 * 8**3
    assert [row["floor"] for row in outcome.rows] == pytest.approx(
        [1.5 * unit / 2e9 * 1e3, 3 * unit / 2e9 * 1e3]
    )
