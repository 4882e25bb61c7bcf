"""``mclfast replay``: makes the step again in which a run met numbers that are not finite."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "make the step again in which a run met infinite or NaN numbers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``mclfast replay``."""
    parser.add_argument("path", type=Path, help="folder of the run")
    parser.add_argument("--device", metavar="NAME", help="device (default: that of the run)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(known: argparse.Namespace, _: list[str]) -> int:
    """Runs the command.

    Returns:
        1 if all numbers are finite this time, else 0.
    """
    from mclfast._base.checks import shortened
    from mclfast.train.replay import replay

    done = replay(known.path, device=known.device, progress=not known.no_progress)
    kept = done.kept
    print(f"found    {kept.finding}")
    numbers = ", ".join(map(str, kept.batch.index.tolist()))
    print(f"batch    {len(kept.batch.index)} images, numbers {shortened(numbers, 200)}")
    if not done.same_images:
        print("images   other ones in the data by now; those of the run are used")
    if done.begun < kept.finding.step:
        print(f"again    from the state before step {done.begun}")
    if done.again is None:
        print("replay   all numbers are finite: not reproduced")
        return 1
    print("replay   reproduced" if done.again == kept.finding else f"replay   {done.again}")
    if done.module is not None:
        print(f"module   {done.module}")
    if done.operation is not None:
        print(f"backward {done.operation}")
    return 0
