"""The per-epoch record of a run, as ``metrics.csv``."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mclfast._files import write_text

if TYPE_CHECKING:
    from mclfast.evaluate import CohortAccuracy


def accuracies(
    found: CohortAccuracy, history: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """The accuracies of an epoch's record, in percent; ``history`` has the records before it."""
    best = max([found.best_head, *(row["acc_best_head_so_far"] for row in history[-1:])])
    return {
        **{f"acc_peer{i}": accuracy for i, accuracy in enumerate(found.peers)},
        "acc_mean": sum(found.peers) / len(found.peers),
        "acc_ensemble": found.ensemble,
        "acc_best_head_so_far": best,
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Writes all rows anew.

    A run writes them before the checkpoint of the same epoch: one that is killed between the two
    leaves a row too many, which the resumed run writes over.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, float]]:
    """Reads what :func:`write_csv` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
