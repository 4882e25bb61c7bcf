"""The losses under pytest-benchmark: ``pytest bench --benchmark-only``.

Each test measures one provider at one case. The baselines run once before each of its rounds, so
that both are timed at the same moment of the machine. A wrong result fails the test and gives no
number.
"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from mclfast.bench import measure
from mclfast.bench.cases import PROVIDERS, make_inputs
from mclfast.bench.cases import truth as reference_result
from mclfast.bench.problem import Case, Inputs, Provider, Unavailable
from mclfast.bench.run import BASELINES, Rates, Ready, measure_rates, prepare, rate_key

#: Rates measured so far, by :func:`mclfast.bench.run.rate_key`.
_RATES: dict[str, Rates] = {}


@functools.lru_cache(maxsize=1)
def problem(case: Case) -> tuple[Inputs, tuple[Tensor, ...]]:
    """Inputs and right result of a case, kept for the next test, which often has the same case."""
    inputs = make_inputs(case)
    return inputs, reference_result(case, inputs)


def floor_ms(case: Case) -> float:
    """Floor of a case in milliseconds; the rates of a shape are measured once."""
    key = rate_key(case)
    if key not in _RATES:
        _RATES[key] = measure_rates(case)
    return _RATES[key].floors(case)["floor"]


def baselines(case: Case, provider: Provider) -> dict[str, Ready]:
    """Baselines other than the provider that can run a case here, by name."""
    inputs, expected = problem(case)
    found = {}
    for other in PROVIDERS[case.op]:
        if other.name in BASELINES and other.name != provider.name:
            try:
                found[other.name] = prepare(case, other, inputs, expected)
            except Unavailable:
                # The test of this baseline is skipped with the reason.
                continue
    return found


def test_loss(benchmark: Any, case: Case, provider: Provider) -> None:
    inputs, expected = problem(case)
    try:
        ready = prepare(case, provider, inputs, expected)
    except Unavailable as reason:
        pytest.skip(str(reason))
    others = baselines(case, provider) if provider.ours else {}
    theirs: dict[str, list[float]] = {name: [] for name in others}

    def before_round() -> None:
        for name, other in others.items():
            theirs[name].append(measure.timed(other.call, case.device))

    def call() -> None:
        ready.call()
        if case.device == "cuda":
            torch.cuda.synchronize()

    before_round()
    slowest = max((times[0] for times in theirs.values()), default=0.0)
    rounds = 3 if slowest > 1000 else 10
    benchmark.group = case.name
    benchmark.pedantic(call, setup=before_round, rounds=rounds, warmup_rounds=1)

    if benchmark.stats is None:
        return
    own = [seconds * 1e3 for seconds in benchmark.stats.stats.data]
    limit = floor_ms(case)
    benchmark.extra_info.update(
        op=case.op,
        mode=case.mode,
        M=case.m,
        L=case.l,
        B=case.b,
        D=case.d,
        dtype=case.dtype,
        device=case.device,
        K=case.k,
        n=case.n,
        bank_dtype=case.bank_dtype,
        shared_negatives=case.shared_negatives,
        provider=provider.name,
        threads=torch.get_num_threads(),
        error=ready.error,
        floor_ms=limit,
        ratio_floor=statistics.median(own) / limit,
    )
    for name, times in theirs.items():
        pairs = zip(times[-len(own) :], own, strict=True)
        benchmark.extra_info[BASELINES[name]] = statistics.median(t / o for t, o in pairs)
    saved = measure.saved_bytes(functools.partial(ready.loss, inputs.leaves), inputs.held())
    benchmark.extra_info["saved_mib"] = saved / measure.MIB
    measure.release()
    try:
        on_gpu = case.device == "cuda"
        peak = measure.cuda_peak(call) if on_gpu else measure.process_peak(case, provider.name)
        benchmark.extra_info["peak_mib"] = peak / measure.MIB
    except Unavailable as reason:
        benchmark.extra_info["peak_mib"] = str(reason)
