"""The picture of a training step against the size of the cohort: peak memory and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mclfast._base.files import replacing
from mclfast._base.optional import optional_import
from mclfast.bench.draw import COMPILED, EAGER, FUSED, SPARE, machine
from mclfast.bench.train_step import PUBLISHED, Row

# Name in the legend, colour and marker; those of the losses' pictures for the same things.
_LINES = {
    PUBLISHED: ("plain loop", *EAGER),
    "contiguous": ("fused loss alone", *SPARE),
    "ours": ("ours as it comes", *COMPILED),
    "sequential": ("ours, peer-sequential", *FUSED),
}


def draw(rows: Sequence[Row], about: Mapping[str, Any], path: Path) -> None:
    """Draws one line per variant in two panels.

    Args:
        rows: results of :func:`mclfast.bench.train_step.run_cases` for one network and batch.
        about: the environment of the run.
        path: PNG file.
    """
    # The object-oriented interface: no display and no global state of a user's own plots.
    agg = optional_import("matplotlib.backends.backend_agg", extra="train")
    figures = optional_import("matplotlib.figure", extra="train")
    figure = figures.Figure(figsize=(9.2, 4.0), layout="constrained")
    agg.FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    first = rows[0]
    where = about["gpu"] if first["device"] == "cuda" else machine(about)
    figure.suptitle(
        f"One training step of L-MCL, M x {first['network']} with auxiliary heads, "
        f"B = {first['batch']}, {where}",
        fontsize=10,
    )
    sizes = sorted({row["peers"] for row in rows})
    for axis, key, scale, label in (
        (panels[0], "peak_mib", 1 / 1024, "peak memory (GiB)"),
        (panels[1], "p50", 1 / 1000, "time of a step (s)"),
    ):
        for variant, (name, colour, marker) in _LINES.items():
            mine = sorted(
                (row["peers"], row[key] * scale)
                for row in rows
                if row["variant"] == variant and isinstance(row.get(key), float)
            )
            if mine:
                places, heights = zip(*mine, strict=True)
                axis.plot(places, heights, color=colour, marker=marker, ms=5, lw=1.6, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, labels=[str(size) for size in sizes])
        axis.set_xlabel("networks M")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.35)
    panels[0].legend(fontsize=9)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=130, format="png")
