"""Means and standard deviations over seeds, and the table of single runs they are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from mclfast.compare.design import Design
from mclfast.compare.runs import Finished
from mclfast.config import TrainConfig
from mclfast.train.plots import History


@dataclass(frozen=True)
class Summary:
    """Results of one entry of the design over all its finished runs.

    Attributes:
        label: label of the entry.
        config: settings of the entry; their seed has no meaning.
        seeds: seeds of the finished runs.
        values: values of each metric, one for each seed that has it. "gain" and "gain_peer<i>" are
            differences from the baseline's run with the same seed (see ``Design.baseline_of``) and
            are absent without one; "peak_memory_mib" is absent if it could not be measured.
        histories: records of all epochs of each run.
    """

    label: str
    config: TrainConfig
    seeds: tuple[int, ...]
    values: dict[str, list[float]]
    histories: list[History]

    def text(self, metric: str, *, digits: int = 2, sign: str = "") -> str:
        """Mean and standard deviation of a metric as text; a dash if the metric is absent.

        Args:
            metric: key of ``values``.
            digits: number of digits after the point.
            sign: "+" to show the sign of positive means too.
        """
        found = self.values.get(metric)
        return spread(found, digits=digits, sign=sign) if found else "-"


def summarize(design: Design, finished: Sequence[Finished]) -> list[Summary]:
    """Summaries of the entries with a finished run, in the order of the design.

    Args:
        design: entries of the comparison.
        finished: finished runs, in any order.
    """
    by_label = {
        label: sorted((f for f in finished if f.run.label == label), key=lambda f: f.run.seed)
        for label in design.configs
    }
    return [
        Summary(
            label,
            design.configs[label],
            tuple(f.run.seed for f in runs),
            _values(
                runs, {f.run.seed: f for f in by_label.get(design.baseline_of(label) or "", [])}
            ),
            [f.result.history for f in runs],
        )
        for label, runs in by_label.items()
        if runs
    ]


def _values(runs: Sequence[Finished], reference: dict[int, Finished]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for run in runs:
        found = _metrics(run)
        other = reference.get(run.run.seed)
        if other is not None:
            alone = _metrics(other)
            found["gain"] = found["mean_of_peers"] - alone["mean_of_peers"]
            for i in range(len(run.result.peers)):
                found[f"gain_peer{i}"] = found[f"peer{i}"] - alone[f"peer{i}"]
        for name, value in found.items():
            values.setdefault(name, []).append(value)
    return values


def _metrics(run: Finished) -> dict[str, float]:
    result, peak = run.result, run.cost.get("peak_memory_bytes")
    return {
        "mean_of_peers": mean(result.peers),
        **{f"peer{i}": accuracy for i, accuracy in enumerate(result.peers)},
        "ensemble": result.ensemble,
        "published_protocol": result.published_protocol,
        "seconds": result.seconds,
        **({} if peak is None else {"peak_memory_mib": peak / 2**20}),
    }


def spread(values: Sequence[float], *, digits: int = 2, sign: str = "") -> str:
    """Mean and sample standard deviation as text; a single value is shown without deviation.

    Args:
        values: at least one value.
        digits: number of digits after the point.
        sign: "+" to show the sign of positive means too.
    """
    # Adding 0.0 turns -0.0 into 0.0.
    text = f"{round(mean(values), digits) + 0.0:{sign}.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def tidy_rows(finished: Sequence[Finished]) -> list[dict[str, Any]]:
    """One row per entry, seed and peer; values of a whole run are repeated for each peer."""
    rows = []
    for f in finished:
        config, cost = f.run.config, f.cost
        for i, (network, accuracy) in enumerate(zip(config.cohort, f.result.peers, strict=True)):
            peak = cost.get("peak_memory_bytes")
            rows.append(
                {
                    "label": f.run.label,
                    "method": config.method,
                    "seed": f.run.seed,
                    "peer": i,
                    "network": network,
                    "topology": config.topology,
                    "accuracy": accuracy,
                    "mean_of_peers": mean(f.result.peers),
                    "ensemble": f.result.ensemble,
                    "published_protocol": f.result.published_protocol,
                    "epochs": config.epochs,
                    "seconds": f.result.seconds,
                    "peak_memory_mib": "" if peak is None else peak / 2**20,
                    "device": cost.get("device", ""),
                    "parameters": cost["parameters"][i] if cost else "",
                    "parameters_in_training": cost.get("parameters_in_training", ""),
                }
            )
    return rows


_UNITS = {"seconds": "s", "peak_memory_mib": "MiB"}


def summary_rows(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """One row per entry and metric: mean and standard deviation over the seeds that have it."""
    return [
        {
            "label": s.label,
            "method": s.config.method,
            "metric": metric,
            "unit": _UNITS.get(metric, "points" if metric.startswith("gain") else "%"),
            "mean": mean(values),
            "sd": stdev(values) if len(values) > 1 else "",
            "seeds": len(values),
        }
        for s in summaries
        for metric, values in s.values.items()
    ]
