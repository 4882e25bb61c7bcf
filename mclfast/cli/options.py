"""Options and checks shared by the commands that write a run or read its exported backbones."""

from __future__ import annotations

import argparse
import hashlib
import re
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mclfast.cli.settings import dashed, shown

if TYPE_CHECKING:
    from mclfast.config import TrainConfig
    from mclfast.train.history import RunResult
    from mclfast.train.trainer import Trainer

_LONGEST_NAME = 200


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


@contextmanager
def run_folder_of(known: argparse.Namespace, default: str) -> Iterator[Path]:
    """The folder that a run is written into, locked for the block.

    Args:
        known: arguments of the command.
        default: name of the folder under ``runs`` if the arguments name none.

    Raises:
        ValueError: another run writes into the folder, or it holds a run that is not to be
            replaced, or is a file.
    """
    from mclfast.train.folder import refuse_old_run
    from mclfast.train.lock import hold

    folder: Path = known.resume or known.run_dir or Path("runs") / default
    check_folder("run_dir", folder)
    with hold(folder, "resume" if known.resume else "run_dir"):
        if not known.resume and not known.overwrite:
            refuse_old_run(folder)
        yield folder


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


def run_name(
    config: TrainConfig, usual: Mapping[str, Any], *parts: str, leave_out: Collection[str] = ()
) -> str:
    """The name of a run's folder: its main settings, then every other one that is not usual.

    Runs that compute different things thereby get different folders.

    Args:
        config: settings of the run.
        usual: settings that need not be told, by name; a name that is missing is told.
        parts: first parts of the name.
        leave_out: names of settings that the parts tell already.
    """
    from mclfast.train.state import FREE_SETTINGS

    told = [
        f"{dashed(name)}={shown(tuple(value) if isinstance(value, list) else value)}"
        for name, value in config.to_values().items()
        if name not in FREE_SETTINGS and name not in leave_out and usual.get(name) != value
    ]
    whole = "-".join(_fit_for_a_name(part) for part in (*parts, *told))
    if len(whole) <= _LONGEST_NAME:
        return whole
    # File systems take 255 bytes; the digest keeps long names apart.
    digest = hashlib.sha256(whole.encode()).hexdigest()[:12]
    return f"{whole[: _LONGEST_NAME - 13]}-{digest}"


def _fit_for_a_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+=,-]", "-", text)


def fit(known: argparse.Namespace, trainer: Trainer) -> RunResult | int:
    """Trains a run to its end; the exit status if it was interrupted, after saying how to go on.

    Raises:
        KeyboardInterrupt: a run without a folder was interrupted: there is nothing to go on from.
    """
    from mclfast.train.signals import described, heeded, status_of

    if trainer.run_dir is None:
        return trainer.fit(progress=not known.no_progress)
    try:
        with heeded(trainer.stop):
            if known.resume:
                print(f"resume {_place(trainer)}", flush=True)
            return trainer.fit(progress=not known.no_progress)
    except KeyboardInterrupt as error:
        folder = shlex.quote(str(trainer.run_dir))
        print(
            f"\n{described(error)}; go on with: mclfast {known.command} --resume {folder}",
            file=sys.stderr,
        )
        return status_of(error)


def _place(trainer: Trainer) -> str:
    """Brings a trainer to its checkpoint, and tells where that is.

    Raises:
        ValueError: there is no checkpoint of a run that had come to one.
    """
    from mclfast.train.folder import CHECKPOINT, resumable

    run_dir, epochs = trainer.run_dir, trainer.config.epochs
    assert run_dir is not None
    if not resumable(run_dir):
        return f"from the first step, as {run_dir} has no {CHECKPOINT} yet"
    trainer.resume()
    if len(trainer.history) == epochs:
        return f"after step {trainer.step}, the last of {epochs} epochs: only results are written"
    steps = epochs * len(trainer.sampler)
    epoch = len(trainer.history) + 1
    return f"after step {trainer.step} of {steps}, in epoch {epoch} of {epochs}"


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
