"""The per-epoch record of a run, as ``metrics.csv``."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from mclfast._files import write_text


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
