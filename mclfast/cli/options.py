"""What the commands that train a run into a folder have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mclfast.cli.settings import dashed

if TYPE_CHECKING:
    from mclfast.train.history import RunResult
    from mclfast.train.trainer import Trainer


def add_run_options(parser: argparse.ArgumentParser, resume_help: str) -> None:
    """Adds the options that say where a run is written, and what of a run that is there."""
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="folder of the run (default: under runs/)"
    )
    parser.add_argument("--resume", type=Path, metavar="DIR", help=resume_help)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a run that is already in the folder"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def settings_to_resume(known: argparse.Namespace, refused: tuple[str, ...]) -> dict[str, Any]:
    """The settings of the run that ``--resume`` names.

    Args:
        known: the arguments of the command.
        refused: those that cannot be given beside it, besides ``--run-dir`` and ``--overwrite``.
    """
    from mclfast.train.folder import read_settings

    for name in (*refused, "run_dir", "overwrite"):
        if getattr(known, name):
            given = name if name == "path" else f"--{dashed(name)}"
            raise ValueError(f"resume: expected no {given} beside --resume, got both")
    return read_settings(known.resume, "resume")


def run_folder_of(known: argparse.Namespace, default: str) -> Path:
    """The folder that a run is written into; ``default`` names one under ``runs``.

    Raises:
        ValueError: another run is there, and is not to be replaced; or a file.
    """
    from mclfast.train.folder import refuse_old_run

    folder: Path = known.resume or known.run_dir or Path("runs") / default
    check_folder("run_dir", folder)
    if not known.resume and not known.overwrite:
        refuse_old_run(folder)
    return folder


def check_folder(argument: str, folder: Path) -> None:
    """Raises ValueError where a file lies in the place of a folder that is to be written."""
    for place in (folder, *folder.parents):
        if place.exists():
            if not place.is_dir():
                raise ValueError(f"{argument}: expected a folder, got the file {place}")
            return


def cohort_name(cohort: Sequence[str]) -> str:
    """Networks as a part of a folder's name."""
    # A name of another package has a colon, that of a hub a slash.
    return "+".join(cohort).replace(":", "-").replace("/", "-")


def fit(known: argparse.Namespace, trainer: Trainer) -> RunResult | None:
    """Trains a run to its end; None if it was interrupted, after saying how to go on.

    Raises:
        KeyboardInterrupt: a run without a folder was interrupted: there is nothing to go on from.
    """
    try:
        return trainer.fit(progress=not known.no_progress)
    except KeyboardInterrupt:
        if trainer.run_dir is None:
            raise
        print(
            f"\ninterrupted; go on with: mclfast {known.command} --resume {trainer.run_dir}",
            file=sys.stderr,
        )
        return None


def exports_in(path: Path) -> list[Path]:
    """The folder itself where it is an export, else the peers of the run in it, in order.

    Raises:
        FileNotFoundError: neither is there; the text begins with ``path``.
        ValueError: a file; likewise.
    """
    from mclfast.train.export import DESCRIPTION
    from mclfast.train.folder import CHECKPOINT

    if (path / DESCRIPTION).is_file():
        return [path]
    if path.is_file():
        raise ValueError(f"path: expected a folder with {DESCRIPTION}, got the file {path}")
    found = [file.parent for file in path.glob(f"peer*/{DESCRIPTION}")]
    if not found:
        remedy = ""
        if (path / CHECKPOINT).is_file():
            remedy = f"; mclfast export {path} writes one from the checkpoint there"
        raise FileNotFoundError(
            f"path: expected {DESCRIPTION} in {path} or in its peer folders, found none{remedy}"
        )
    return sorted(found, key=lambda folder: (len(folder.name), folder.name))


def one_export_in(path: Path) -> Path:
    """The folder of an export, or of a run with a single peer: that peer.

    Raises:
        FileNotFoundError, ValueError: see :func:`exports_in`; ValueError also for a run of several
            peers. The text begins with ``path``.
    """
    first, *others = exports_in(path)
    if others:
        names = ", ".join(str(folder) for folder in (first, *others))
        raise ValueError(f"path: expected one exported backbone, got a run; name one of {names}")
    return first
