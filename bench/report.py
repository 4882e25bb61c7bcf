"""Results as JSON, tidy CSV and an aligned table with the targets."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import io
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mclfast import env
from mclfast._base.files import write_json, write_text
from mclfast._version import __version__
from mclfast.bench.cases import (
    BANK_GPU_TARGETS,
    BANK_MEMORY_TARGET,
    BANK_TARGETS,
    FLOOR_TARGET,
    SECOND_ORDER_TARGET,
    TARGETS,
    bank_target,
    gpu_target,
    target,
)
from mclfast.bench.problem import BOTH, SECOND, Case
from mclfast.bench.run import BASELINES, Outcome, Row, case_of

SCHEMA = 1
#: Threads that the targets are stated for.
TARGET_THREADS = 2

CASE_COLUMNS = (
    "op",
    "provider",
    "mode",
    "metric",
    "unit",
    "M",
    "L",
    "B",
    "D",
    "dtype",
    "device",
    "K",
    "n",
    "bank_dtype",
    "shared_negatives",
)
VALUE_COLUMNS = ("p20", "p50", "p80", "min", "samples", "error")
RATIO_COLUMNS = (*BASELINES.values(), "floor", "ratio_floor", "floor_gather", "ratio_first_order")
MACHINE_COLUMNS = ("cpu", "cores", "threads", "gpu", "os")
VERSION_COLUMNS = ("mclfast", "python", "torch", "cuda", "triton", "pytorch_metric_learning")
COLUMNS = (
    *CASE_COLUMNS,
    *VALUE_COLUMNS,
    *RATIO_COLUMNS,
    *MACHINE_COLUMNS,
    *VERSION_COLUMNS,
    "commit",
    "date",
)

_BANK_POINT = ("op", "M", "L", "B", "K")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def environment() -> dict[str, Any]:
    """Machine, versions, commit and date of a run, by column."""
    root = env.root()
    return {
        "cpu": _cpu_name(),
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "os": f"{platform.system()} {platform.machine()}",
        "mclfast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": _version("triton"),
        "pytorch_metric_learning": _version("pytorch-metric-learning"),
        # An installed package may lie inside the checkout of another project.
        "commit": (env.git_hash(root) if (root / ".git").exists() else None) or "",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def as_json(outcome: Outcome, about: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Everything of a run, fit for JSON."""
    return {
        "schema": SCHEMA,
        "environment": about,
        "settings": settings,
        "rates": {key: rates.as_json() for key, rates in outcome.rates.items()},
        "targets": {
            "layerwise_mcl": [
                {**dict(zip("MLB", shape, strict=True)), **asdict(goal)}
                for shape, goal in TARGETS.items()
            ],
            "bank": [
                {**dict(zip(_BANK_POINT, point, strict=True)), "eager": eager}
                for point, eager in BANK_TARGETS.items()
            ],
            "bank_memory": BANK_MEMORY_TARGET,
            "bank_gpu": [
                {**dict(zip(_BANK_POINT, point, strict=True)), **asdict(goal)}
                for point, goal in BANK_GPU_TARGETS.items()
            ],
            "floor": FLOOR_TARGET,
            "second_order": SECOND_ORDER_TARGET,
            "threads": TARGET_THREADS,
        },
        "rows": outcome.rows,
        "skipped": [asdict(skip) for skip in outcome.skipped],
        "verdicts": [
            {"provider": row["provider"], "case": case_of(row).name, "goal": goal, "met": met}
            for row in outcome.rows
            for goal, met in verdicts(row, outcome.rows, about["threads"])
        ],
    }


def as_csv(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """One line per measurement."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        line = {**about, **row}
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()})
    return buffer.getvalue()


def write(folder: Path, outcome: Outcome, about: dict[str, Any], settings: dict[str, Any]) -> None:
    """Writes ``results.json`` and ``results.csv``."""
    write_json(folder / "results.json", as_json(outcome, about, settings))
    write_text(folder / "results.csv", as_csv(outcome.rows, about))


def _find(rows: Sequence[Row], like: Row, provider: str, metric: str) -> Row | None:
    """The row of another provider or metric of the same case."""
    for row in rows:
        same = row["provider"] == provider and row["metric"] == metric
        if same and case_of(row) == case_of(like):
            return row
    return None


def verdicts(row: Row, rows: Sequence[Row], threads: int) -> list[tuple[str, bool]]:
    """The goals that apply to a provider of ours at a case, and whether each is met.

    Args:
        row: a row of metric "time"; other metrics have their goals judged with it.
        rows: all rows.
        threads: number of threads of the run; the targets of the shapes hold for two.
    """
    if not row["ours"] or row["metric"] != "time":
        return []
    case, found = case_of(row), []
    peak = _find(rows, row, row["provider"], "peak_extra")
    goal = target(case) if threads == TARGET_THREADS else None
    if goal is not None:
        for column, least in (("ratio_eager", goal.eager), ("ratio_compiled", goal.compiled)):
            if column in row:
                name = column.removeprefix("ratio_")
                found.append((f"{least:g}x {name}", row[column] >= least))
        if peak is not None:
            found.append((f"{goal.memory:g} MiB", peak["p50"] <= goal.memory))
    found += _bank_verdicts(case, row, rows, peak, threads)
    if case.op == "layerwise_mcl" and case.mode == BOTH and case.b >= 256 and case.device == "cpu":
        found.append((f"{FLOOR_TARGET:g}x floor", row["ratio_floor"] <= FLOOR_TARGET))
    if case.mode == SECOND and not case.k:
        met = row["ratio_first_order"] <= SECOND_ORDER_TARGET
        found.append((f"{SECOND_ORDER_TARGET:g}x first order", met))
    for library in ("pml", "lightly"):
        if f"ratio_{library}" in row:
            found.append((f"faster than {library}", row[f"ratio_{library}"] > 1))
            theirs = _find(rows, row, library, "peak_extra")
            if peak is not None and theirs is not None:
                found.append((f"leaner than {library}", peak["p50"] < theirs["p50"]))
    return found


def _bank_verdicts(
    case: Case, row: Row, rows: Sequence[Row], peak: Row | None, threads: int
) -> list[tuple[str, bool]]:
    """The goals of the memory-bank operations."""
    found = []
    eager = bank_target(case) if threads == TARGET_THREADS else None
    if eager is not None:
        if "ratio_eager" in row:
            found.append((f"{eager:g}x eager", row["ratio_eager"] >= eager))
        theirs = _find(rows, row, "eager", "peak_extra")
        if peak is not None and theirs is not None:
            met = peak["p50"] <= BANK_MEMORY_TARGET * theirs["p50"]
            found.append((f"{BANK_MEMORY_TARGET:.0%} of eager's memory", met))
    goal = gpu_target(case)
    if goal is not None:
        found.append((f"{goal.ms:g} ms", row["p50"] <= goal.ms))
        share = row["floor_gather"] / row["p50"]
        found.append((f"{goal.bandwidth:.0%} of copy bandwidth", share >= goal.bandwidth))
        if peak is not None:
            found.append((f"{goal.memory:g} MiB", peak["p50"] <= goal.memory))
    return found


def _number(value: float | None, suffix: str = "") -> str:
    if value is None:
        return "-"
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}{suffix}"


def _aligned(lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """Columns of equal width; the first ``left`` and the last are flush left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if i < left or i == last else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def table(outcome: Outcome, threads: int) -> str:
    """The times of all cases, one block per operation and mode."""
    rows = [row for row in outcome.rows if row["metric"] == "time"]
    baselines = [b for b, column in BASELINES.items() if any(column in row for row in rows)]
    blocks: dict[str, list[Row]] = {}
    for row in rows:
        title = ", ".join([row["op"], row["mode"], *case_of(row).kind])
        blocks.setdefault(title, []).append(row)
    text: list[str] = []
    for title, block in blocks.items():
        second, banks = block[0]["mode"] == SECOND, case_of(block[0]).k > 0
        used = [b for b in baselines if any(BASELINES[b] in row for row in block)]
        lines = [
            [
                "M,L,B,D,K" if banks else "M,L,B,D",
                "provider",
                "ms",
                "20-80 %",
                *(f"x {b}" for b in used),
                "x floor",
                *(["x first"] if second else []),
                "peak MiB",
                "saved MiB",
                "goals",
            ]
        ]
        for row in block:
            peak = _find(outcome.rows, row, row["provider"], "peak_extra")
            saved = _find(outcome.rows, row, row["provider"], "saved_for_backward")
            goals = [
                f"{goal}: {'met' if met else 'NOT MET'}"
                for goal, met in verdicts(row, outcome.rows, threads)
            ]
            lines.append(
                [
                    ",".join(str(row[x]) for x in ("MLBDK" if banks else "MLBD")),
                    row["provider"],
                    _number(row["p50"]),
                    f"{_number(row['p20'])}-{_number(row['p80'])}",
                    *(_number(row.get(BASELINES[b])) for b in used),
                    _number(row["ratio_floor"]),
                    *([_number(row["ratio_first_order"])] if second else []),
                    *(_number(None if x is None else x["p50"]) for x in (peak, saved)),
                    "; ".join(goals),
                ]
            )
        text += [title, *_aligned(lines, 2), ""]
    return "\n".join(text)


def skipped_table(outcome: Outcome) -> str:
    """Providers without numbers, those with the same reason on one line."""
    groups: dict[tuple[str, str, bool], list[str]] = {}
    for skip in outcome.skipped:
        groups.setdefault((skip.provider, skip.reason, skip.red), []).append(skip.case)
    lines = []
    for (provider, reason, red), names in groups.items():
        where = names[0] if len(names) == 1 else f"{len(names)} cases"
        lines.append(f"  {provider} ({where}): {'WRONG: ' if red else ''}{reason}")
    return "\n".join(["no numbers for", *lines]) if lines else ""


def legend(threads: int) -> str:
    """The meaning of the table's columns."""
    judged = (
        ""
        if threads == TARGET_THREADS
        else (
            f"\nTargets of shapes on a CPU are stated for {TARGET_THREADS} threads and not judged "
            f"with {threads}."
        )
    )
    return (
        "ms: median of the interleaved calls. x NAME: how many times as long NAME takes (median "
        "over rounds).\nx floor: times the floor at the rates measured in this run: GEMM and exp; "
        "for memory banks, the reads of their rows.\nx first: over forward + backward of the same "
        f"provider.{judged}"
    )
