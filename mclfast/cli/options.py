"""Options and checks shared by the commands that write a run or read its exported backbones."""

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
    """Adds --run-dir, --resume, --overwrite and --no-progress.

    Args:
        parser: parser of the command.
        resume_help: help text of --resume.
    """
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="folder of the run (default: under runs/)"
    )
    parser.add_argument("--resume", type=Path, metavar="DIR", help=resume_help)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a run that is already in the folder"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def add_allow_external(parser: argparse.ArgumentParser) -> None:
    """Adds --allow-external, for commands that build the network of an export.

    Args:
        parser: parser of the command.
    """
    parser.add_argument(
        "--allow-external",
        action="store_true",
        help="build a network of timm or torchvision that the export names, which imports that "
        "package; for exports that you trust",
    )


def settings_to_resume(known: argparse.Namespace, refused: tuple[str, ...]) -> dict[str, Any]:
    """The settings of the run that ``--resume`` names.

    Args:
        known: arguments of the command.
        refused: names of arguments that exclude ``--resume``, in addition to ``--run-dir`` and
            ``--overwrite``.
    """
    from mclfast.train.folder import read_settings

    for name in (*refused, "run_dir", "overwrite"):
        if getattr(known, name):
            given = name if name == "path" else f"--{dashed(name)}"
            raise ValueError(f"resume: expected no {given} beside --resume, got both")
    return read_settings(known.resume, "resume")


def run_folder_of(known: argparse.Namespace, default: str) -> Path:
    """The folder that a run is written into.

    Args:
        known: arguments of the command.
        default: name of the folder under ``runs`` if the arguments name none.

    Raises:
        ValueError: the folder holds a run that is not to be replaced, or is a file.
    """
    from mclfast.train.folder import refuse_old_run

    folder: Path = known.resume or known.run_dir or Path("runs") / default
    check_folder("run_dir", folder)
    if not known.resume and not known.overwrite:
        refuse_old_run(folder)
    return folder


def check_folder(argument: str, folder: Path) -> None:
    """Raises ValueError if a folder cannot be written because it, or a parent, is a file.

    Args:
        argument: argument that named the folder, for the error message.
        folder: folder to be written.
    """
    for place in (folder, *folder.parents):
        if place.exists():
            if not place.is_dir():
                raise ValueError(f"{argument}: expected a folder, got the file {place}")
            return


def cohort_name(cohort: Sequence[str]) -> str:
    """The names of networks, joined and made fit for a part of a folder's name."""
    # Networks of other packages have a colon in their names, networks of a hub a slash.
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
    """Folders of the exported backbones in a folder: the folder itself, or all peers of a run.

    Args:
        path: folder of an exported backbone, or of a run.

    Returns:
        The folders, in the order of the peers.

    Raises:
        FileNotFoundError: there is no exported backbone; the text begins with ``path``.
        ValueError: ``path`` is a file; the text begins with ``path``.
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
    """Folder of the only exported backbone in a folder.

    Args:
        path: folder of an exported backbone, or of a run with one peer.

    Raises:
        FileNotFoundError, ValueError: see :func:`exports_in`; ValueError also if the run has
            several peers. The text begins with ``path``.
    """
    first, *others = exports_in(path)
    if others:
        names = ", ".join(str(folder) for folder in (first, *others))
        raise ValueError(f"path: expected one exported backbone, got a run; name one of {names}")
    return first
