"""Pictures of the results: time, memory and distance to the floor against M and against B."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mclfast._base.files import replacing
from mclfast._base.optional import optional_import
from mclfast.bench.problem import BOTH
from mclfast.bench.run import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colour-blind safe (Okabe and Ito), with a marker each: lines stay apart in grey too.
EAGER, FUSED, SPARE = ("#555555", "o"), ("#009E73", "D"), ("#0072B2", "v")
COMPILED = ("#E69F00", "s")
_STYLES = {
    "eager": EAGER,
    "compiled": COMPILED,
    "reference": ("#56B4E9", "^"),
    "cpu-rows": SPARE,
    "cpu-fused": FUSED,
    "cpu": FUSED,
    "triton-rows": ("#CC79A7", "<"),
    "triton-fused": ("#D55E00", "P"),
    "triton": ("#D55E00", "P"),
    "pml": ("#555555", "o"),
    "lightly": ("#E69F00", "s"),
}

Axis = Any


def draw(rows: Sequence[Row], folder: Path, about: dict[str, Any]) -> list[Path]:
    """Draws what the rows allow.

    Args:
        rows: the rows of a run's results.
        folder: the folder that the PNG files are written into.
        about: the environment of the run.

    Returns:
        The files written: ``layerwise_mcl.png`` and one for the special cases, where there are at
        least two sizes to join.
    """
    written = []
    kinds = sorted({(row["device"], row["dtype"]) for row in rows})
    for device, dtype in kinds:
        chosen = [
            r for r in rows if r["mode"] == BOTH and (r["device"], r["dtype"]) == (device, dtype)
        ]
        where = about["gpu"] if device == "cuda" else machine(about)
        title = f"forward + backward, {dtype}, D = 128, {where}"
        suffix = "" if len(kinds) == 1 else f"-{device}-{dtype}"
        for name, panels in (
            ("layerwise_mcl", _layerwise_panels(chosen)),
            ("special_cases", _special_panels(chosen)),
        ):
            panels = [panel for panel in panels if _sizes(panel[2], panel[1]) > 1]
            if panels:
                written.append(_figure(panels, title, folder / f"{name}{suffix}.png"))
    return written


def machine(about: Mapping[str, Any]) -> str:
    """A CPU and its threads, in words."""
    threads = about["threads"]
    return f"{about['cpu']}, {threads} {'thread' if threads == 1 else 'threads'}"


Panel = tuple[str, str, list[Row]]


def _layerwise_panels(rows: Sequence[Row]) -> list[Panel]:
    rows = [r for r in rows if r["op"] == "layerwise_mcl" and r["D"] == 128 and r["L"] == 1]
    against_m = [
        (f"layer-wise MCL, L = 1, B = {b}", "M", [r for r in rows if r["B"] == b])
        for b in (128, 512)
    ]
    return [*against_m, ("layer-wise MCL, L = 1, M = 2", "B", [r for r in rows if r["M"] == 2])]


def _special_panels(rows: Sequence[Row]) -> list[Panel]:
    titles = {"supcon": "SupCon", "nt_xent": "NT-Xent (two views)", "info_nce": "InfoNCE"}
    return [(title, "B", [r for r in rows if r["op"] == op]) for op, title in titles.items()]


def _sizes(rows: Sequence[Row], x: str) -> int:
    return len({row[x] for row in rows})


def _figure(panels: Sequence[Panel], title: str, path: Path) -> Path:
    # The object-oriented interface: no display and no global state of a user's own plots.
    agg = optional_import("matplotlib.backends.backend_agg", extra="train")
    figures = optional_import("matplotlib.figure", extra="train")
    figure = figures.Figure(figsize=(4.6 * len(panels), 10.2), layout="constrained")
    agg.FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(panels), squeeze=False, sharey="row", sharex="col")
    figure.suptitle(title, fontsize=11)
    quantities: list[tuple[str, str, Callable[[Row], float]]] = [
        ("time", "time (ms), median and 20-80 %", lambda row: row["p50"]),
        ("peak_extra", "peak extra memory (MiB)", lambda row: row["p50"]),
        ("time", "time / arithmetic floor", lambda row: row["ratio_floor"]),
    ]
    for column, (heading, x, rows) in enumerate(panels):
        axes[0][column].set_title(heading, fontsize=10)
        for line, (metric, label, value) in enumerate(quantities):
            axis = axes[line][column]
            chosen = [row for row in rows if row["metric"] == metric]
            _lines(axis, chosen, x, value, band=line == 0)
            if line == 0:
                _floor(axis, chosen, x)
            if line == 2:
                axis.axhline(1.0, color="black", lw=1, ls="--")
            if column == 0:
                axis.set_ylabel(label)
            _log_axis(axis, sorted({row[x] for row in rows}))
        axes[-1][column].set_xlabel({"M": "networks M", "B": "batch B"}[x])
    _legend(figure, axes)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=130, format="png")
    return path


def _lines(
    axis: Axis, rows: Sequence[Row], x: str, value: Callable[[Row], float], *, band: bool
) -> None:
    for provider, (color, marker) in _STYLES.items():
        # A memory of nothing has no place on a logarithmic axis.
        mine = [row for row in rows if row["provider"] == provider and value(row) > 0]
        mine.sort(key=lambda row: row[x])
        if not mine:
            continue
        places = [row[x] for row in mine]
        axis.plot(
            places,
            [value(row) for row in mine],
            color=color,
            marker=marker,
            ms=5,
            lw=1.6,
            label=provider,
        )
        if band:
            low, high = ([row[key] for row in mine] for key in ("p20", "p80"))
            axis.fill_between(places, low, high, color=color, alpha=0.2, lw=0)


def _floor(axis: Axis, rows: Sequence[Row], x: str) -> None:
    floors = sorted({row[x]: row["floor"] for row in rows}.items())
    if floors:
        places, heights = zip(*floors, strict=True)
        axis.plot(places, heights, color="black", lw=1, ls="--", label="arithmetic floor")


def _log_axis(axis: Axis, places: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(places, labels=[str(place) for place in places])
    axis.minorticks_on()
    axis.tick_params(axis="x", which="minor", bottom=False)
    axis.grid(which="major", alpha=0.35)
    axis.grid(which="minor", axis="y", alpha=0.12)


def _legend(figure: Figure, axes: Any) -> None:
    found = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        found.update(dict(zip(labels, handles, strict=True)))
    figure.legend(
        found.values(),
        found.keys(),
        loc="outside lower center",
        ncols=min(len(found), 8),
        frameon=False,
        fontsize=9,
    )
