"""The progress bar of a run."""

from __future__ import annotations

import sys
from typing import Any

from mclfast._base.optional import optional_import


def set_back(bar: Any, step: int) -> None:
    """Moves a bar back to a step from which a run goes on."""
    bar.n = step
    bar.refresh()


def progress_bar(label: str, *, steps: int, done: int, shown: bool) -> Any:
    """A bar of tqdm with the time left.

    Args:
        label: text before the bar.
        steps: number of steps of the whole run.
        done: number of steps already taken.
        shown: whether there is anything to see.
    """
    return optional_import("tqdm", extra="train").tqdm(
        total=steps,
        initial=done,
        disable=not shown,
        desc=label,
        unit="step",
        # A line now and then where there is no terminal to redraw.
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )
