"""Pictures of runs, drawn from their metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mclfast._files import replacing
from mclfast.metrics import evaluated

if TYPE_CHECKING:
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, float]]

# Matplotlib's, in an order that keeps purple, pink and red apart in a run of L-MCL.
_COLOURS = [f"C{i}" for i in (0, 1, 2, 3, 4, 5, 9, 7, 8, 6)]


def _figure(columns: int, extra: float = 0.0) -> tuple[Figure, Any]:
    # The object-oriented interface: no display and no global state of a user's own plots.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns + extra, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, dpi=130, format="png")


def _finish(axis: Any, ylabel: str, **legend: Any) -> None:
    axis.set_xlabel("epoch")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, **legend)


def run_curves(history: History, names: Sequence[str], path: Path, title: str) -> None:
    """Test accuracy of every peer and the parts of the training loss against the epoch.

    Args:
        history: one mapping per epoch, as in ``metrics.csv``.
        names: name of each peer.
        path: PNG file.
        title: heading.
    """
    # The legend of the losses takes the width of some more.
    figure, (left, right) = _figure(2, extra=1.2)
    figure.suptitle(title, fontsize=10)
    tested = evaluated(history)
    epochs = [row["epoch"] for row in tested]
    for i, name in enumerate(names):
        label = f"peer {i}: {name}" if len(names) > 1 else name
        left.plot(epochs, [row[f"acc_peer{i}"] for row in tested], label=label)
    if len(names) > 1:
        ensemble = [row["acc_ensemble"] for row in tested]
        left.plot(epochs, ensemble, "k--", lw=1, label="ensemble")
    _finish(left, "test accuracy (%)")
    epochs = [row["epoch"] for row in history]
    for i, key in enumerate(k for k in history[0] if k.startswith("train_")):
        values = [row[key] for row in history]
        # Parts can lie on one another: dashes let the one below be seen.
        right.plot(
            epochs, values, color=_COLOURS[i % len(_COLOURS)], ls=("-", "--", "-.", ":")[i % 4],
            lw=2 if i == 0 else 1.3, label=key.removeprefix("train_"),
        )
    right.set_yscale("symlog", linthresh=0.1)
    # Outside: the curves take up the whole height.
    _finish(right, "training loss and its parts, unweighted", loc="upper left",
            bbox_to_anchor=(1.0, 1.0))  # fmt: skip
    _save(figure, path)


def accuracy_bands(groups: Mapping[str, Sequence[History]], path: Path, title: str) -> None:
    """Mean test accuracy of the peers against the epoch, with a band of one standard deviation.

    Many methods get the last third of the epochs as a second, larger view, and a legend beside.

    Args:
        groups: histories of the runs (seeds) of each method, by label.
        path: PNG file.
        title: heading.
    """
    longest = max(len(history) for histories in groups.values() for history in histories)
    many = len(groups) > 4
    enlarged = many and longest >= 6
    figure, axes = _figure(2 if enlarged else 1, extra=2.2 if many else 0.0)
    figure.suptitle(title, fontsize=10)
    late = longest - longest // 3
    shown: list[float] = []
    for i, (label, histories) in enumerate(groups.items()):
        tested = [evaluated(history) for history in histories]
        epochs = [row["epoch"] for row in tested[0]]
        runs = np.array([[row["acc_mean"] for row in rows] for rows in tested])
        mean = runs.mean(0)
        spread = runs.std(0, ddof=1) if len(runs) > 1 else np.zeros_like(mean)
        shown += [v for e, m, s in zip(epochs, mean, spread, strict=True) if e >= late
                  for v in (m - s, m + s)]  # fmt: skip
        seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
        style = _line(i)
        for axis in axes:
            axis.plot(
                epochs, mean, label=f"{label} ({seeds})", lw=1.2 if many else 1.5,
                # A single epoch is a point.
                marker="o" if len(epochs) == 1 else None, **style,
            )  # fmt: skip
            axis.fill_between(
                epochs, mean - spread, mean + spread, color=style["color"], lw=0,
                alpha=0.1 if many else 0.2,
            )  # fmt: skip
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if many else {}
    for axis in axes:
        _finish(axis, "test accuracy, mean of peers (%)", **beside)
    if enlarged:
        axes[0].get_legend().remove()
        axes[1].set(xlim=(late, longest), ylim=(min(shown), max(shown)), ylabel="")
    _save(figure, path)


def _line(number: int) -> dict[str, str]:
    """Colour and dashes of a method; the dashes tell those of one colour apart."""
    ways = len(_COLOURS)
    return {"color": _COLOURS[number % ways], "ls": ("-", "--", ":")[number // ways % 3]}


class Bar(NamedTuple):
    """A method in :func:`accuracy_bars`, one value per seed in each.

    Attributes:
        accuracy: mean of peers in percent.
        ensemble: its accuracy in percent.
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
        bars: by label, drawn from top to bottom.
        path: PNG file.
        title: heading.
        baseline: label of what the gains are over.
    """
    gains = any(bar.gain for bar in bars.values())
    figure, axes = _figure(2 if gains else 1, extra=0.6)
    figure.set_figheight(max(2.4, 1.3 + 0.42 * len(bars)))
    figure.suptitle(title, fontsize=10)
    labels = list(bars)
    values = [v for bar in bars.values() for v in (*bar.accuracy, *bar.ensemble)]
    # From zero, differences of interest are too small to be seen; the gains start at zero.
    start = _start(min(values), max(values))
    _bars(axes[0], [bar.accuracy for bar in bars.values()], start)
    for y, bar in enumerate(bars.values()):
        axes[0].plot(
            np.mean(bar.ensemble), y, "D", ms=5, mfc="none", mec="black", ls="none",
            label="ensemble, mean" if y == 0 else None,
        )  # fmt: skip
    axes[0].set_xlim(left=start)
    note = f"; axis from {start:g}" if start else ""
    axes[0].set_xlabel(f"test accuracy, mean of peers, last epoch (%){note}")
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    # Above the bars: no place among them is free for sure.
    axes[0].legend(fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False)
    if gains:
        _bars(axes[1], [bar.gain or () for bar in bars.values()], 0.0)
        axes[1].axvline(0, color="black", lw=0.8)
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
                mean, y, xerr=np.std(values, ddof=1), fmt="none", ecolor="black", capsize=4,
                label="mean ± standard deviation" if first else None,
            )  # fmt: skip
        # A little apart: equal values would hide one another.
        offsets = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else [0.0]
        axis.plot(
            values, y + np.asarray(offsets), "o", ms=3.5, color=colour, mec="black", mew=0.5,
            label="one seed" if first else None,
        )  # fmt: skip
        first = False
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
