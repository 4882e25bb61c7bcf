"""The measurement library behind ``mclfast bench``: baselines, floor, probes, files."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import math
import re
import time
from pathlib import Path

import pytest
import torch

import mclfast
from mclfast import cli
from mclfast.bench import cases, draw, floor, floor_banks, measure, problem, report
from mclfast.bench import run as runner
from mclfast.bench.problem import (
    BOTH,
    FORWARD,
    MODES,
    SECOND,
    TOLERANCE,
    WEIGHTS,
    Case,
    Provider,
    Unavailable,
)
from mclfast.bench.providers import banks, in_batch
from mclfast.bench.published_forms import banks as published_bank
from mclfast.bench.published_forms import in_batch as published

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
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
    ours = mclfast.layerwise_mcl_terms(
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


def mcl_bank(mode: str = BOTH, m: int = 2, l: int = 2, b: int = 5, **more) -> Case:  # noqa: E741
    shape = {"d": 6, "k": 9, "n": 40} | more
    return Case("bank_layerwise_mcl", mode, m, l, b, **shape)


def nce_bank(mode: str = BOTH, m: int = 3, b: int = 5, **more) -> Case:
    return Case("bank_nce", mode, m, 1, b, **({"d": 6, "k": 9, "n": 40} | more))


def wide_leaves(case: Case) -> tuple[problem.Inputs, problem.Keys, torch.Tensor]:
    inputs = cases.make_inputs(case).double()
    keys = dataclasses.replace(inputs.keys, banks=inputs.keys.banks.double())
    return inputs, keys, inputs.leaves[0]


@pytest.mark.parametrize(("m", "stages"), [(2, 1), (3, 2)])
def test_published_bank_form_equals_the_loss(m, stages):
    case = mcl_bank(m=m, l=stages)
    inputs, keys, nodes = wide_leaves(case)
    weights = inputs.pair_weights.requires_grad_()
    settings = {"temperature": 0.2, "kl_temperature": 2.0}
    ours = mclfast.layerwise_bank_mcl_terms(
        nodes.unflatten(0, (m, stages)),
        keys.banks,
        keys.pos_idx,
        keys.neg_idx,
        weights,
        backend="reference",
        **settings,
    )
    theirs = published_bank.layerwise_bank_mcl_loss(
        nodes, inputs.networks, keys.banks, keys.rows, 1, weights, **settings
    )
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=0)
        expected = torch.autograd.grad(x, (nodes, weights), retain_graph=True)
        found = torch.autograd.grad(y, (nodes, weights), retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_published_nce_equals_the_loss():
    _, keys, nodes = wide_leaves(nce_bank())
    ours = mclfast.bank_nce_loss(
        nodes, keys.banks, keys.rows, temperature=0.2, eps=1e-3, backend="reference"
    )
    theirs = published_bank.bank_nce_loss(nodes, keys.banks, keys.rows, temperature=0.2, eps=1e-3)
    torch.testing.assert_close(theirs, ours, rtol=1e-12, atol=0)
    (expected,), (found,) = (torch.autograd.grad(x, nodes) for x in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shared", [False, True])
def test_bank_providers_pass_their_check(mode, shared):
    found = [mcl_bank(mode, dtype="float64", bank_dtype="float64", shared_negatives=shared)]
    if not shared and mode != WEIGHTS:
        found.append(nce_bank(mode, dtype="float64", bank_dtype="float64"))
    for case in found:
        inputs = cases.make_inputs(case)
        expected = cases.truth(case, inputs)
        for provider in cases.PROVIDERS[case.op]:
            if provider.name in ("eager", "reference"):
                assert runner.prepare(case, provider, inputs, expected).error <= 1e-10


@pytest.mark.parametrize("case", [mcl_bank(SECOND), mcl_bank(WEIGHTS), nce_bank(SECOND)])
def test_bank_truth_does_not_depend_on_the_blocks(case):
    inputs = cases.make_inputs(case)
    for x, y in zip(banks.truth(case, inputs, rows=2), banks.truth(case, inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_bank_inputs():
    case = mcl_bank(b=6, k=30, bank_dtype="bfloat16", shared_negatives=True)
    keys = cases.make_inputs(case).keys
    assert keys.banks.shape == (2, 40, 6) and keys.banks.dtype == torch.bfloat16
    assert keys.pos_idx.shape == (6, 2) and keys.neg_idx.shape == (30,)
    assert keys.rows.shape == (6, case.keys) == (6, 32)
    # An anchor's own row is no negative of any anchor.
    assert len(set(keys.pos_idx.flatten().tolist())) == 12
    assert not set(keys.pos_idx.flatten().tolist()) & set(keys.neg_idx.tolist())
    torch.testing.assert_close(
        keys.banks.float().norm(dim=-1), torch.ones(2, 40), rtol=0.01, atol=0
    )


def test_published_bank_form_has_no_mixed_dtypes():
    case = mcl_bank(bank_dtype="bfloat16")
    eager = cases.PROVIDERS[case.op][0]
    with pytest.raises(Unavailable, match="in the dtype of the embeddings"):
        eager.build(case, cases.make_inputs(case))


def test_expected_memory_of_the_published_bank_form():
    for case in (mcl_bank(d=64, k=200, n=512), nce_bank(d=64, k=200, n=512)):
        inputs = cases.make_inputs(case)
        for provider in cases.PROVIDERS[case.op]:
            if provider.name in ("eager", "reference"):
                forward = functools.partial(provider.build(case, inputs), inputs.leaves)
                saved = measure.saved_bytes(forward, inputs.held())
                assert saved < provider.kept(case) < 1.6 * saved
    # At the batch of a GPU the gathered rows alone take 128 times 256 * 8194 * 128 * 4 bytes.
    gpu = mcl_bank(l=4, b=256, d=128, k=8192, n=2**20)
    assert cases.PROVIDERS[gpu.op][0].kept(gpu) > 128 * 256 * 8194 * 128 * 4


def test_rounding_of_a_provider_holds_in_float32_only():
    provider = Provider("rounds", cases.PROVIDERS["bank_nce"][0].build, rounding=1e-3)
    assert problem.tolerance(nce_bank(), provider) == 1e-3
    assert problem.tolerance(nce_bank(dtype="float64"), provider) == TOLERANCE["float64"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_eager_baseline_passes_its_check(mode, dtype):
    case = layerwise(mode, m=3, l=2, b=70, dtype=dtype)
    inputs = cases.make_inputs(case)
    eager = cases.PROVIDERS["layerwise_mcl"][0]
    ready = runner.prepare(case, eager, inputs, cases.truth(case, inputs))
    assert ready.error <= TOLERANCE[dtype]


def test_truth_does_not_depend_on_the_blocks():
    case = layerwise(SECOND, m=2, l=2, b=10)
    inputs = cases.make_inputs(case)
    for x, y in zip(
        in_batch.truth(case, inputs, rows=3), in_batch.truth(case, inputs, rows=10), strict=True
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
    except Unavailable as reason:
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
    assert math.isnan(problem.difference(case, provider, inputs, (nan, one), (one, one)))
    with pytest.raises(ArithmeticError, match="by nan"):
        runner.prepare(case, provider, inputs, (nan,))


def test_unavailable_provider_is_listed_with_its_reason(monkeypatch):
    def build(case, inputs):
        raise Unavailable("there is no such chip")

    monkeypatch.setitem(cases.PROVIDERS, "supcon", [Provider("chip", build)])
    outcome = runner.Outcome()
    for batch in (4, 8):
        runner.run_case(Case("supcon", BOTH, 1, 1, batch, 4), outcome)
    assert outcome.rows == []
    assert "chip (2 cases): there is no such chip" in report.skipped_table(outcome)


def test_case_that_does_not_fit_into_memory():
    case = layerwise(m=2, b=16)
    huge = Provider("huge", cases.PROVIDERS["layerwise_mcl"][0].build, lambda case: 2.0**60)
    with pytest.raises(Unavailable, match=r"expected to need 1073741824\.0 GiB"):
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


def test_bank_floor_counts():
    rates = floor_banks.BankRates(gather=1e9, gemm=1e12, exp=math.inf)
    case = mcl_bank(l=4, b=8, d=128, k=8192, n=2**17)
    row_bytes = 128 * 4
    assert floor_banks.gathered_bytes(case) == 2 * 8 * 8194 * row_bytes
    assert floor_banks.logits(case) == 2 * 8 * 8 * 8194
    assert floor_banks.floor_ms(case, rates) == pytest.approx(2 * 8 * 8194 * row_bytes / 1e6)
    # Two products per logit of 2 * 128 operations, where they take longer than the reads.
    slow = floor_banks.BankRates(gather=1e15, gemm=1e9, exp=1e9)
    amount = floor_banks.logits(case) * (2 * 2 * 128 + 1)
    assert floor_banks.floor_ms(case, slow) == pytest.approx(amount / 1e9 * 1e3)
    assert floor_banks.gather_ms(case, slow) == pytest.approx(2 * 8 * 8194 * row_bytes / 1e12)
    half = dataclasses.replace(case, bank_dtype="bfloat16", shared_negatives=True)
    assert floor_banks.gathered_bytes(half) == 2 * (8192 + 8 * 2) * row_bytes / 2
    second = dataclasses.replace(case, mode=SECOND)
    assert floor_banks.gathered_bytes(second) == 2 * floor_banks.gathered_bytes(case)
    nce = nce_bank(m=4, b=64, d=128, k=16384, n=2**17)
    # The normalising constants are known after a pass of their own.
    assert floor_banks.gathered_bytes(nce) == 2 * 4 * 64 * 16385 * row_bytes
    assert floor_banks.logits(nce) == 12 * 64 * 16385


def test_better_bank_rates():
    slow = floor_banks.BankRates(1.0, 4.0, 5.0, {"gather": "a", "gemm": "b"})
    fast = floor_banks.BankRates(2.0, 3.0, math.inf, {"gather": "c", "gemm": "d"})
    best = slow.best(fast)
    assert best == floor_banks.BankRates(2.0, 4.0, math.inf, {"gather": "c", "gemm": "b"})
    assert best.as_json()["exp_per_s"] is None


def test_interleaved_timing():
    order = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.02)

    timings = measure.interleaved(
        {"slow": slow, "fast": lambda: order.append("fast")}, device="cpu", budget=0, min_rounds=4
    )
    slow_, fast = timings["slow"], timings["fast"]
    assert len(slow_.samples) == len(slow_.rounds) == len(fast.rounds) == 4
    assert len(fast.samples) == 4 * 20
    # Each round begins with another call; the first four entries are the estimates.
    assert order[:4] == ["slow", "slow", "fast", "fast"]
    turns = [name for i, name in enumerate(order[4:]) if i == 0 or order[i + 3] != name]
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
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert 63 <= found <= 68


def test_targets_are_judged():
    case = layerwise(m=2, l=4, b=512, d=128)
    base = {
        "op": case.op,
        "mode": BOTH,
        "M": 2,
        "L": 4,
        "B": 512,
        "D": 128,
        "dtype": "float32",
        "device": "cpu",
        "ours": True,
        "provider": "cpu-fused",
    }
    row = base | {
        "metric": "time",
        "p50": 30.0,
        "p20": 29.0,
        "p80": 31.0,
        "ratio_eager": 36.0,
        "ratio_compiled": 34.0,
        "floor": 20.0,
        "ratio_floor": 1.5,
    }
    peak = base | {"metric": "peak_extra", "p50": 19.0}
    assert report.verdicts(row, [row, peak], threads=2) == [
        ("35x eager", True),
        ("35x compiled", False),
        ("20 MiB", True),
        ("1.6x floor", True),
    ]
    # Stated for two threads; the floor is the machine's own.
    assert report.verdicts(row, [row, peak], threads=1) == [("1.6x floor", True)]
    second = row | {"mode": SECOND, "ratio_first_order": 4.2}
    assert report.verdicts(second, [second], threads=2) == [("4x first order", False)]
    text = report.table(runner.Outcome(rows=[row, peak]), threads=2)
    assert "35x compiled: NOT MET; 20 MiB: met" in text
    assert report.verdicts(row | {"ours": False}, [row], threads=2) == []


def bank_row(case: Case, provider: str = "cpu-fused", **values) -> dict:
    return {
        "op": case.op,
        "mode": case.mode,
        "M": case.m,
        "L": case.l,
        "B": case.b,
        "D": case.d,
        "dtype": case.dtype,
        "device": case.device,
        "K": case.k,
        "n": case.n,
        "bank_dtype": case.bank_dtype,
        "shared_negatives": case.shared_negatives,
        "ours": provider != "eager",
        "provider": provider,
        "metric": "time",
        **values,
    }


def test_bank_targets_are_judged():
    case = cases.preset("bank")[0]
    assert (case.m, case.l, case.b, case.keys) == (2, 4, 8, 8194)
    row = bank_row(case, p50=30.0, ratio_eager=79.0, floor=20.0, ratio_floor=1.5, floor_gather=20.0)
    theirs = bank_row(case, "eager", metric="peak_extra", p50=4000.0)
    for peak, met in ((79.0, True), (81.0, False)):
        ours = bank_row(case, metric="peak_extra", p50=peak)
        assert report.verdicts(row, [row, theirs, ours], threads=2) == [
            ("80x eager", False),
            ("2% of eager's memory", met),
        ]
    assert report.verdicts(row, [row], threads=1) == []
    for other in ({"bank_dtype": "bfloat16"}, {"n": 1000}, {"mode": SECOND}):
        assert report.verdicts(row | other, [row], threads=2) == []


def test_bank_target_on_a_gpu_is_judged():
    case = cases.preset("bank-gpu")[0]
    row = bank_row(case, "cuda-fused", p50=1.0, floor=0.7, ratio_floor=1.4, floor_gather=0.59)
    peak = bank_row(case, "cuda-fused", metric="peak_extra", p50=301.0)
    assert report.verdicts(row, [row, peak], threads=16) == [
        ("2 ms", True),
        ("60% of copy bandwidth", False),
        ("300 MiB", False),
    ]
    quick = row | {"p50": 0.95}
    assert report.verdicts(quick, [quick], threads=16)[1] == ("60% of copy bandwidth", True)


def test_bank_presets():
    found = cases.preset("bank")
    assert len(found) == len(set(found))
    stated = [cases.bank_target(case) for case in found if cases.bank_target(case) is not None]
    assert sorted(stated) == sorted(cases.BANK_TARGETS.values())
    assert any(case.shared_negatives for case in found)
    assert {case.bank_dtype for case in found} == {"float32", "bfloat16"}
    on_gpu = cases.preset("bank-gpu")
    assert set(on_gpu) <= set(cases.preset("gpu"))
    assert any(cases.gpu_target(case) is not None for case in on_gpu)


def test_rows_name_their_case():
    case = mcl_bank(bank_dtype="bfloat16", shared_negatives=True)
    row = json.loads(json.dumps(bank_row(case)))
    assert runner.case_of(row) == case
    text = "bank_layerwise_mcl[forward_backward,2,2,5,6,K=9,float32,cpu,n=40,bfloat16 bank,"
    assert case.name == text + "shared negatives]"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*.json")), ids=lambda p: p.stem)
def test_committed_results_still_load(path, tmp_path, capsys):
    assert cli.main(["bench", "--replot", str(path), "--out", str(tmp_path)]) == 0
    assert "layerwise_mcl, forward_backward, float32, cpu" in capsys.readouterr().out


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
            outcome,
            wanted=["eager", "reference"],
            budget=0,
            memory=False,
        )
    (path,) = draw.draw(outcome.rows, tmp_path, ABOUT)
    assert path.name == "layerwise_mcl.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert draw.draw(outcome.rows[:2], tmp_path, ABOUT) == []


def test_command(tmp_path, capsys):
    names = ("eager", "reference", "cpu-rows", "cpu-fused", "cpu", "pml")
    wanted = [f"--provider={name}" for name in names]
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
        assert (row["floor_gather"] != "") == (int(row["K"]) > 0)
        assert float(row["ratio_floor"]) > 0
        assert (row["ratio_first_order"] != "") == (row["mode"] == SECOND)
    assert {row["provider"] for row in rows} >= {"eager", "reference"}
    with_banks = {(row["op"], row["provider"]) for row in rows if int(row["K"])}
    expected = {("bank_layerwise_mcl", "eager"), ("bank_layerwise_mcl", "reference")}
    expected |= {("bank_nce", "eager"), ("bank_nce", "reference")}
    if hasattr(torch.ops.mclfast_cpu, "bank_mcl_forward"):
        expected |= {("bank_layerwise_mcl", "cpu-rows"), ("bank_layerwise_mcl", "cpu-fused")}
        expected.add(("bank_nce", "cpu"))
    assert with_banks == expected

    json_path = tmp_path / "results.json"
    assert cli.main(["bench", "--replot", str(json_path)]) == 0
    assert "layerwise_mcl, second_order" in capsys.readouterr().out
    json_path.write_text('{"schema": 0}')
    assert cli.main(["bench", "--replot", str(json_path)]) == 2
    assert "expected schema 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("rows"), r"expected rows \(a list of .*\) in .*, got none"),
        (lambda r: r["environment"].pop("threads"), r"expected threads \(.*\) in .*, got none"),
        (lambda r: r["rows"][1].pop("op"), r"expected op \(text\) in row 2 of .*, got none"),
        (lambda r: r["rows"][0].update(p50="fast"), "as p50 in row 1 of .*, got 'fast'"),
        (
            lambda r: r["rows"][0].update(ratio_floor=None),
            "as ratio_floor in row 1 of .*, got None",
        ),
    ],
)
def test_results_that_lie(tmp_path, capsys, change, message):
    results = json.loads(next(RESULTS.glob("*/banks.json")).read_text())
    change(results)
    (tmp_path / "r.json").write_text(json.dumps(results))
    assert cli.main(["bench", "--replot", str(tmp_path / "r.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^mclfast bench: error: replot: .*{message}$", line)


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
