"""Pictures of runs, drawn from their metrics."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mclfast._base.files import replacing
from mclfast._base.optional import optional_import
from mclfast.train.history import evaluated

if TYPE_CHECKING:
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, float]]

# Colours of Okabe and Ito, for colour-blind readers too; wine in the place of yellow, which is too
# light for a line.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#882255", "#000000")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")


def _figure(title: str, columns: int, extra: float = 0.0) -> tuple[Figure, Any]:
    # The object-oriented interface: no display and no global state of a user's own plots.
    agg = optional_import("matplotlib.backends.backend_agg", extra="train")
    figures = optional_import("matplotlib.figure", extra="train")
    figure = figures.Figure(figsize=(5.2 * columns + extra, 3.8), layout="constrained")
    agg.FigureCanvasAgg(figure)
    # About 13 letters to the inch.
    figure.suptitle(textwrap.fill(_literal(title), int(13 * figure.get_figwidth())), fontsize=10)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _literal(text: str) -> str:
    """A name of a user's own as it is: two dollar signs would be a formula, which may not parse."""
    return text.replace("$", r"\$")


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, dpi=130, format="png")


def _finish(axis: Any, ylabel: str, **legend: Any) -> None:
    axis.set_xlabel("epoch")
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, **legend)


#: A legend that hides no curve.
_BESIDE = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}


def _room(labels: Iterable[str]) -> float:
    """Inches that a legend with these labels takes beside an axis."""
    return 0.6 + 0.07 * max(map(len, labels))


def _marker(epochs: Sequence[float], number: int, ways: int = len(_COLOURS)) -> str | None:
    """A single epoch is a point; its form tells those of one colour apart."""
    return _MARKERS[number // ways % len(_MARKERS)] if len(epochs) == 1 else None


def run_curves(history: History, names: Sequence[str], path: Path, title: str) -> None:
    """Test accuracy of every peer and the parts of the training loss against the epoch.

    Args:
        history: one mapping per epoch, as in ``metrics.csv``.
        names: name of each peer.
        path: PNG file.
        title: heading.
    """
    names = [_literal(name) for name in names]
    labels = [f"peer {i}: {name}" if len(names) > 1 else name for i, name in enumerate(names)]
    parts = [key for key in history[0] if key.startswith("train_")]
    # Many rows: the lines get no room between them, and more height.
    figure, (left, right) = _figure(title, 2, extra=_room(labels) + _room(parts) - 0.5)
    figure.set_figheight(max(3.8, 1.0 + 0.19 * len(labels)))
    tested = evaluated(history)
    epochs = [row["epoch"] for row in tested]
    for i, label in enumerate(labels):
        accuracies = [row[f"acc_peer{i}"] for row in tested]
        # Black is the ensemble.
        style, marker = _line(i, _COLOURS[:-1]), _marker(epochs, i, len(_COLOURS) - 1)
        left.plot(epochs, accuracies, label=label, marker=marker, **style)
    if len(names) > 1:
        ensemble = [row["acc_ensemble"] for row in tested]
        left.plot(epochs, ensemble, "k--", lw=1, label="ensemble", marker=_marker(epochs, 0))
    _finish(left, "test accuracy (%)", **_BESIDE)
    epochs = [row["epoch"] for row in history]
    for i, key in enumerate(parts):
        # A run that another version began may have parts that later epochs lack.
        values = [row.get(key, math.nan) for row in history]
        # Parts can lie on one another: dashes let the one below be seen.
        right.plot(
            epochs,
            values,
            color=_COLOURS[i % len(_COLOURS)],
            ls=_DASHES[(i + i // len(_COLOURS)) % len(_DASHES)],
            lw=2 if i == 0 else 1.3,
            label=_literal(key.removeprefix("train_")),
            marker=_marker(epochs, i),
        )
    right.set_yscale("symlog", linthresh=0.1)
    _finish(right, "training loss and its parts, unweighted", **_BESIDE)
    _save(figure, path)


def accuracy_bands(groups: Mapping[str, Sequence[History]], path: Path, title: str) -> None:
    """Mean test accuracy of the peers against the epoch, with a band of one standard deviation.

    Many methods get the last third of the epochs as a second, larger view.

    Args:
        groups: histories of the runs (seeds) of each method, by label.
        path: PNG file.
        title: heading.
    """
    longest = max(len(history) for histories in groups.values() for history in histories)
    many = len(groups) > 4
    enlarged = many and longest >= 6
    labels = [
        f"{_literal(label)} ({len(runs)} seed{'s' if len(runs) > 1 else ''})"
        for label, runs in groups.items()
    ]
    figure, axes = _figure(title, 2 if enlarged else 1, extra=_room(labels))
    figure.set_figheight(max(3.8, 1.0 + 0.19 * len(labels)))
    late = longest - longest // 3
    shown: list[float] = []
    for i, (label, histories) in enumerate(zip(labels, groups.values(), strict=True)):
        tested = [evaluated(history) for history in histories]
        epochs = [row["epoch"] for row in tested[0]]
        runs = np.array([[row["acc_mean"] for row in rows] for rows in tested])
        mean = runs.mean(0)
        spread = runs.std(0, ddof=1) if len(runs) > 1 else np.zeros_like(mean)
        shown += [
            v
            for e, m, s in zip(epochs, mean, spread, strict=True)
            if e >= late
            for v in (m - s, m + s)
        ]
        style = _line(i)
        for axis in axes:
            axis.plot(
                epochs,
                mean,
                label=label,
                lw=1.2 if many else 1.5,
                marker=_marker(epochs, i),
                **style,
            )
            axis.fill_between(
                epochs,
                mean - spread,
                mean + spread,
                color=style["color"],
                lw=0,
                alpha=0.1 if many else 0.2,
            )
    for axis in axes:
        _finish(axis, "test accuracy, mean of peers (%)", **_BESIDE)
    if enlarged:
        axes[0].get_legend().remove()
        axes[1].set(xlim=(late, longest), ylim=(min(shown), max(shown)), ylabel="")
    _save(figure, path)


def _line(number: int, colours: Sequence[str] = _COLOURS) -> dict[str, str]:
    """Colour and dashes of a method; the dashes tell those of one colour apart."""
    ways = len(colours)
    return {"color": colours[number % ways], "ls": _DASHES[number // ways % len(_DASHES)]}


class Bar(NamedTuple):
    """A method in :func:`accuracy_bars`, one value per seed in each.

    Attributes:
        accuracy: mean of peers in percent.
        ensemble: accuracy of the ensemble in percent.
        gain: points over the baseline, None where there is nothing to compare with.
    """

    accuracy: Sequence[float]
    ensemble: Sequence[float]
    gain: Sequence[float] | None


def accuracy_bars(
    bars: Mapping[str, Bar], path: Path, title: str, baseline: str | None = None
) -> None:
    """Accuracy of methods as bars, with one standard deviation and every seed; gains beside them.

    Args:
        bars: the bars by their labels, drawn from top to bottom.
        path: PNG file.
        title: heading.
        baseline: label of what the gains are over.
    """
    gains = any(bar.gain for bar in bars.values())
    labels = list(bars)
    figure, axes = _figure(title, 2 if gains else 1, extra=_room(labels))
    figure.set_figheight(max(2.6, 1.5 + 0.42 * len(bars)))
    values = [v for bar in bars.values() for v in (*bar.accuracy, *bar.ensemble)]
    # From zero, differences of interest are too small to be seen; the gains start at zero.
    start = _start(min(values), max(values))
    _bars(axes[0], [bar.accuracy for bar in bars.values()], start)
    for y, bar in enumerate(bars.values()):
        axes[0].plot(
            np.mean(bar.ensemble),
            y,
            "D",
            ms=5,
            mfc="none",
            mec="black",
            ls="none",
            label="ensemble, mean" if y == 0 else None,
        )
    axes[0].set_xlim(left=start)
    note = f"; axis from {start:g}" if start else ""
    axes[0].set_xlabel(f"test accuracy, mean of peers, last epoch (%){note}")
    axes[0].set_yticks(range(len(labels)), labels)
    # A lone bar is not to fill the axis.
    axes[0].set_ylim(len(labels) - 0.3, -0.7)
    # Below the axes: no place among the bars is free for sure.
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        fontsize=8,
        ncols=4,
        loc="outside lower center",
        frameon=False,
    )
    if gains:
        _bars(axes[1], [bar.gain or () for bar in bars.values()], 0.0)
        axes[1].axvline(0, color="black", lw=0.8)
        for y, bar in enumerate(bars.values()):
            if not bar.gain:
                axes[1].text(0, y, " –", va="center", color="grey")
        axes[1].set_xlabel(f"gain over {baseline}, same seed (points)")
        axes[1].set_yticks([])
        axes[1].set_ylim(axes[0].get_ylim())
    _save(figure, path)


def _start(least: float, most: float) -> float:
    """A round place below all values that leaves them most of the axis."""
    step = 10.0 if most - least > 20 else 5.0 if most - least > 5 else 1.0
    return max(0.0, float(np.floor((least - 0.5 * (most - least)) / step) * step - step))


def _bars(axis: Any, groups: Sequence[Sequence[float]], start: float) -> None:
    """Horizontal bars of means from ``start``; nothing for an empty group."""
    first = True
    for y, values in enumerate(groups):
        if not values:
            continue
        mean = float(np.mean(values))
        colour = _COLOURS[y % len(_COLOURS)]
        axis.barh(y, mean - start, left=start, height=0.62, color=colour, alpha=0.45)
        if len(values) > 1:
            axis.errorbar(
                mean,
                y,
                xerr=np.std(values, ddof=1),
                fmt="none",
                ecolor="black",
                capsize=4,
                label="mean ± standard deviation" if first else None,
            )
        # A little apart: equal values would hide one another.
        offsets = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else [0.0]
        axis.plot(
            values,
            y + np.asarray(offsets),
            "o",
            ms=3.5,
            color=colour,
            mec="black",
            mew=0.5,
            label="one seed" if first else None,
        )
        first = False
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
