"""The history of a run: one record per epoch, kept as ``metrics.csv``, and its result."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mclfast._base.files import write_text
from mclfast._base.schema import MAPPING, check_fields, number

if TYPE_CHECKING:
    from mclfast.train.evaluation import CohortAccuracy


def accuracies(
    found: CohortAccuracy | None, history: Sequence[Mapping[str, float]], peers: int
) -> dict[str, float]:
    """The accuracies of an epoch's record, in percent.

    Args:
        found: accuracies of the epoch; None if it was not evaluated, which gives NaN.
        history: the records before it.
        peers: number of networks.
    """
    best = [row["acc_best_head_so_far"] for row in history[-1:]]
    if found is None:
        names = [*(f"acc_peer{i}" for i in range(peers)), "acc_mean", "acc_ensemble"]
        return dict.fromkeys(names, math.nan) | {"acc_best_head_so_far": max(best, default=0.0)}
    return {
        **{f"acc_peer{i}": accuracy for i, accuracy in enumerate(found.peers)},
        "acc_mean": sum(found.peers) / len(found.peers),
        "acc_ensemble": found.ensemble,
        "acc_best_head_so_far": max([found.best_head, *best]),
    }


def evaluated(history: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """The records of the epochs that were evaluated."""
    return [row for row in history if not math.isnan(row["acc_mean"])]


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Writes all rows anew, with a column for every name in any of them.

    A run writes them before the checkpoint of the same epoch: one that is killed between the two
    leaves a row too many, which the resumed run writes over.
    """
    text = io.StringIO()
    # A run that another version began may have columns that its later epochs lack, or the reverse.
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, float]]:
    """Reads a file of :func:`write_csv`; a value that an epoch lacks is left out.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: the file is no such table, or holds text where a number should be; the text
            begins with ``metrics``.
    """
    rows: list[dict[str, float]] = []
    # A named pipe would be waited for.
    if not path.is_file():
        raise FileNotFoundError(f"metrics: expected a file {path}, found none")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file, strict=True):
                # Values beyond the header have no name.
                if None in row:
                    raise ValueError(f"{len(row[None])} values without a column")
                rows.append({k: float(v) for k, v in row.items() if v})
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"metrics: expected a table of numbers in {path}, got {error} in row {len(rows) + 1}"
        ) from None
    return rows


_ACCURACY = number(0, 100, or_nan=True)
_RECORD = {
    "epoch": number(1),
    "seconds": number(0),
    "acc_mean": _ACCURACY,
    "acc_ensemble": _ACCURACY,
    "acc_best_head_so_far": number(0, 100),
}
_WHERE_GIVEN = {"lr": number(0), "train_loss": number(-math.inf), "step": number(1)}
_ANY_NUMBER = number(-math.inf, or_nan=True)


def check_history(subject: str, place: object, rows: Sequence[object], peers: int) -> None:
    """Accepts the records of a run's epochs, from the first on.

    Args:
        subject: begins the error message.
        place: where they were read.
        rows: one record per epoch.
        peers: number of networks.

    Raises:
        ValueError: a record lacks a value, or has one that no run writes.
    """
    fields = _RECORD | {f"acc_peer{i}": _ACCURACY for i in range(peers)}
    first: Mapping[str, float] = {}
    seconds = best = 0.0
    for number_, row in enumerate(rows, start=1):
        where = f"record {number_} of {place}"
        check_fields(subject, where, {"record": row}, {"record": MAPPING})
        assert isinstance(row, dict)
        known = {name: kind for name, kind in _WHERE_GIVEN.items() if name in row}
        check_fields(subject, where, row, dict.fromkeys(row, _ANY_NUMBER) | known | fields)
        first = first or row
        # An older run has no count of steps.
        wanted = {"epoch": number_, "step": number_ * first.get("step", 0)}
        for name, value in wanted.items():
            if name in first and row.get(name) != value:
                raise ValueError(
                    f"{subject}: expected {name} {value:g} in {where}, got {row.get(name)}"
                )
        reached = [row[f"acc_peer{i}"] for i in range(peers)]
        mean = sum(reached) / peers
        # All accuracies of an epoch are there, or none is.
        if math.isnan(mean + row["acc_ensemble"]) != math.isnan(row["acc_mean"]) or (
            abs(row["acc_mean"] - mean) > 1e-6
        ):
            raise ValueError(
                f"{subject}: expected acc_mean {mean:g} of the peers in {where}, and NaN for all "
                f"or none, got {row['acc_mean']:g}"
            )
        if not math.isnan(mean):
            best = max(best, *reached)
        least = {"seconds": seconds, "acc_best_head_so_far": best}
        for name, value in least.items():
            if row[name] < value:
                raise ValueError(
                    f"{subject}: expected {name} >= {value} in {where}, got {row[name]}"
                )
        seconds, best = row["seconds"], row["acc_best_head_so_far"]


@dataclass(frozen=True)
class RunResult:
    """The accuracies that a finished run reached, and its time.

    Attributes:
        peers: final test accuracy in percent of each peer's own classifier, at the last epoch.
        ensemble: accuracy of the mean of the peers' logits, at the last epoch.
        published_protocol: best accuracy of any classifier of any peer at any evaluated epoch on
            the test set, as the published code reports it. It selects on the test set: for
            comparison only.
        seconds: training and evaluation time, over all resumed parts.
        history: one record per epoch.
    """

    peers: tuple[float, ...]
    ensemble: float
    published_protocol: float
    seconds: float
    history: list[dict[str, float]]


def result_of(history: list[dict[str, float]], peers: int) -> RunResult:
    """The result of a run of that many peers, from its records."""
    row = history[-1]
    return RunResult(
        peers=tuple(row[f"acc_peer{i}"] for i in range(peers)),
        ensemble=row["acc_ensemble"],
        published_protocol=row["acc_best_head_so_far"],
        seconds=row["seconds"],
        history=history,
    )
