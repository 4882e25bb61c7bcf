"""Pictures of runs, drawn from their metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mclfast._files import replacing

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
    epochs = [row["epoch"] for row in history]
    for i, name in enumerate(names):
        label = f"peer {i}: {name}" if len(names) > 1 else name
        left.plot(epochs, [row[f"acc_peer{i}"] for row in history], label=label)
    if len(names) > 1:
        ensemble = [row["acc_ensemble"] for row in history]
        left.plot(epochs, ensemble, "k--", lw=1, label="ensemble")
    _finish(left, "test accuracy (%)")
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

    Args:
        groups: histories of the runs (seeds) of each method, by label.
        path: PNG file.
        title: heading.
    """
    figure, (axis,) = _figure(1)
    axis.set_title(title, fontsize=10)
    for label, histories in groups.items():
        epochs = [row["epoch"] for row in histories[0]]
        runs = np.array([[row["acc_mean"] for row in history] for history in histories])
        mean = runs.mean(0)
        spread = runs.std(0, ddof=1) if len(runs) > 1 else np.zeros_like(mean)
        axis.plot(epochs, mean, label=f"{label} ({len(runs)} seeds)")
        axis.fill_between(epochs, mean - spread, mean + spread, alpha=0.2)
    _finish(axis, "test accuracy, mean of peers (%)")
    _save(figure, path)
