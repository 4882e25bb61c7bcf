"""Measures a case with every provider: check first, then time in turn, then memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mclfast.bench import floor, floor_banks, measure
from mclfast.bench.cases import PROVIDERS, make_inputs, truth
from mclfast.bench.problem import (
    BOTH,
    SECOND,
    Case,
    Inputs,
    Loss,
    Provider,
    Unavailable,
    difference,
    step,
    tolerance,
)

Row = dict[str, Any]

#: Providers that the others are compared with, and the column of the ratio.
BASELINES = {
    "eager": "ratio_eager",
    "compiled": "ratio_compiled",
    "reference": "ratio_reference",
    "pml": "ratio_pml",
    "lightly": "ratio_lightly",
}


class Rates(Protocol):
    """Measured rates of this machine: :class:`floor.Rates` or :class:`floor_banks.BankRates`."""

    def best(self, other: Any) -> Any: ...

    def as_json(self) -> dict[str, Any]: ...

    def floors(self, case: Case) -> dict[str, float]: ...


@dataclass(frozen=True)
class Skip:
    """A provider without numbers for a case.

    Attributes:
        case: name of the case.
        provider: name of the provider.
        reason: why the case was skipped, in words.
        red: whether its result is wrong or it failed, as opposed to not being available.
    """

    case: str
    provider: str
    reason: str
    red: bool = False


@dataclass
class Outcome:
    """Rows and skipped providers of one or more cases."""

    rows: list[Row] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    rates: dict[str, Rates] = field(default_factory=dict)


@dataclass(frozen=True)
class Ready:
    """A provider whose result was found right, ready to be timed."""

    provider: Provider
    loss: Loss
    call: Callable[[], tuple[Tensor, ...]]
    error: float


def prepare(case: Case, provider: Provider, inputs: Inputs, expected: Sequence[Tensor]) -> Ready:
    """Builds a provider and compares its result with the reference in float64.

    Raises:
        Unavailable: it cannot run here.
        ArithmeticError: its result differs by more than :func:`problem.tolerance`.
    """
    needed, free = provider.kept(case), measure.available_bytes(case.device)
    if needed > 0.85 * free:
        raise Unavailable(
            f"expected to need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        )
    loss = provider.build(case, inputs)
    call = step(case, inputs, loss)
    try:
        found = call()
    except torch.OutOfMemoryError:
        raise Unavailable("out of memory") from None
    error = difference(case, provider, inputs, found, expected)
    allowed = tolerance(case, provider)
    if not error <= allowed:
        raise ArithmeticError(
            f"differs from the reference in float64 by {error:.1e}, more than {allowed:.0e}"
        )
    return Ready(provider, loss, call, error)


def ready_providers(
    case: Case, inputs: Inputs, wanted: Sequence[str], outcome: Outcome
) -> list[Ready]:
    """The providers that can be timed; the others are added to ``outcome.skipped``."""
    expected: tuple[Tensor, ...] | None = None
    ready = []
    for provider in PROVIDERS[case.op]:
        if wanted and provider.name not in wanted:
            continue
        try:
            expected = expected or truth(case, inputs)
            ready.append(prepare(case, provider, inputs, expected))
        except Unavailable as reason:
            outcome.skipped.append(Skip(case.name, provider.name, str(reason)))
        # A provider that is broken must not cost the numbers of the others.
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
            text = str(error) if isinstance(error, ArithmeticError) else repr(error)
            outcome.skipped.append(Skip(case.name, provider.name, text, red=True))
    return ready


def run_case(
    case: Case,
    outcome: Outcome,
    *,
    wanted: Sequence[str] = (),
    budget: float = 20.0,
    memory: bool = True,
    rounds: tuple[int, int] = (3, 30),
) -> None:
    """Measures one case and adds to ``outcome``.

    Args:
        case: the case to measure.
        outcome: gets the rows, the skipped providers and the rates behind the floor.
        wanted: names of providers; all without any.
        budget: seconds for the timing of the case (never fewer than the least rounds).
        memory: measure peak memory as well.
        rounds: least and most rounds of timing.
    """
    inputs = make_inputs(case)
    ready = ready_providers(case, inputs, wanted, outcome)
    if not ready:
        return
    calls = {item.provider.name: item.call for item in ready}
    if case.mode == SECOND:
        # The same provider's forward + backward, in the same rounds.
        for item in ready:
            calls[f"{item.provider.name} {BOTH}"] = _first_order(case, item, inputs)
    timings = measure.interleaved(
        calls, device=case.device, budget=budget, min_rounds=rounds[0], max_rounds=rounds[1]
    )
    for item in ready:
        name = item.provider.name
        timing = timings[name]
        row = _row(case, item, "time", "ms")
        for key, q in (("p20", 0.2), ("p50", 0.5), ("p80", 0.8), ("min", 0.0)):
            row[key] = timing.quantile(q)
        row["samples"] = len(timing.samples)
        for baseline, column in BASELINES.items():
            if baseline in timings and baseline != name:
                row[column] = timing.ratio(timings[baseline])
        if case.mode == SECOND:
            row["ratio_first_order"] = 1 / timing.ratio(timings[f"{name} {BOTH}"])
        outcome.rows.append(row)
    _add_floors(case, outcome)
    if memory:
        _memory_rows(case, ready, inputs, outcome)


def _first_order(case: Case, item: Ready, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    first = Case(**{**asdict(case), "mode": BOTH})
    return step(first, inputs, item.loss)


def _row(case: Case, item: Ready, metric: str, unit: str) -> Row:
    values = asdict(case)
    return {
        "op": values["op"],
        "provider": item.provider.name,
        "ours": item.provider.ours,
        "mode": case.mode,
        "metric": metric,
        "unit": unit,
        "M": case.m,
        "L": case.l,
        "B": case.b,
        "D": case.d,
        "dtype": case.dtype,
        "device": case.device,
        "K": case.k,
        "n": case.n,
        "bank_dtype": case.bank_dtype if case.k else "",
        "shared_negatives": case.shared_negatives,
        "error": item.error,
    }


def _memory_rows(case: Case, ready: Sequence[Ready], inputs: Inputs, outcome: Outcome) -> None:
    rows = []
    for item in ready:
        name = item.provider.name
        forward = functools.partial(item.loss, inputs.leaves)
        saved = measure.saved_bytes(forward, inputs.held())
        rows.append(_exact(_row(case, item, "saved_for_backward", "MiB"), saved))
        try:
            if case.device == "cuda":
                peak = measure.cuda_peak(item.call)
            else:
                measure.release()
                peak = measure.process_peak(case, name)
        except Unavailable as reason:
            outcome.skipped.append(Skip(case.name, name, str(reason)))
            continue
        rows.append(_exact(_row(case, item, "peak_extra", "MiB"), peak))
    for metric in ("saved_for_backward", "peak_extra"):
        of = {row["provider"]: row["p50"] for row in rows if row["metric"] == metric}
        for row in rows:
            for baseline, column in BASELINES.items():
                different = row["metric"] == metric and row["provider"] != baseline
                if different and baseline in of and row["p50"] > 0:
                    row[column] = of[baseline] / row["p50"]
    outcome.rows.extend(rows)


def _exact(row: Row, size: int) -> Row:
    value = size / measure.MIB
    return row | {"p20": value, "p50": value, "p80": value, "min": value, "samples": 1}


def case_of(row: Row) -> Case:
    """The case that a row belongs to; rows of before the memory banks lack their columns."""
    return Case(
        row["op"],
        row["mode"],
        row["M"],
        row["L"],
        row["B"],
        row["D"],
        row["dtype"],
        row["device"],
        row.get("K", 0),
        row.get("n", 0),
        row.get("bank_dtype") or "float32",
        row.get("shared_negatives", False),
    )


def rate_key(case: Case) -> str:
    """Names the shape at which the rates of a case are measured."""
    return (floor_banks if case.k else floor).rate_key(case)


def measure_rates(case: Case) -> Rates:
    """The rates behind the floor of a case, on this machine."""
    return floor_banks.measure_rates(case) if case.k else floor.measure_rates(case)


def _add_floors(case: Case, outcome: Outcome) -> None:
    """Measures the rates again and sets the floors of all rows at this shape to the best so far."""
    key = rate_key(case)
    rates = measure_rates(case)
    if key in outcome.rates:
        rates = rates.best(outcome.rates[key])
    outcome.rates[key] = rates
    for row in outcome.rows:
        if row["metric"] == "time" and rate_key(case_of(row)) == key:
            row |= rates.floors(case_of(row))
            row["ratio_floor"] = row["p50"] / row["floor"]
