"""Checkpoints that hold everything a run changes, written whole or not at all.

The checkpoint before the last one stays beside it. A file that the disk damaged later is found by
its checksums, and the run goes on from the other one.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mclfast._base.archives import damage_of, seal
from mclfast._base.files import flush_folder, replacing

#: Raised when the layout of a checkpoint changes.
FORMAT = 1


def previous_of(path: Path) -> Path:
    """Place of the checkpoint before the one at ``path``."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def damaged_of(path: Path) -> Path:
    """Place that a damaged checkpoint is moved to from ``path``."""
    return path.with_name(f"{path.stem}.damaged{path.suffix}")


def all_of(path: Path) -> tuple[Path, Path, Path]:
    """All files that saving and loading a checkpoint at ``path`` leaves."""
    return path, previous_of(path), damaged_of(path)


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint atomically; the one that was there becomes the previous one.

    Args:
        path: file to write.
        state: tensors and plain values.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as partial:
        try:
            with _checksums():
                torch.save({"format": FORMAT, **state}, partial)
        except RuntimeError as error:
            # torch's writer of files does not say what the system said.
            if "inline_container" not in str(error):
                raise
            reason = str(error).split("\n", 1)[0]
            raise OSError(
                f"checkpoint: expected room on the disk for {path}, got: {reason}"
            ) from None
        seal(partial)
        if path.is_file():
            _second_name(path, previous_of(path))


@contextmanager
def _checksums() -> Iterator[None]:
    """Has torch write checksums, even in a program that told it not to."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _second_name(path: Path, other: Path) -> None:
    """Puts the file at ``path`` at ``other`` too, which at no moment is missing or incomplete."""
    partial = other.with_name(f".{other.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    try:
        try:
            os.link(path, partial)
        # Some file systems have no second names.
        except OSError:
            shutil.copyfile(path, partial)
        os.replace(partial, other)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint; tensors and plain values only, no code is executed.

    Args:
        path: file to read.
        device: device of the tensors.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged, or written by another version of the format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: expected a file {path}, found none")
    damage = damage_of(path)
    if damage is None:
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        # A pickle is a program: what a damaged one raises has no common type.
        except Exception as error:
            damage = str(error).split("\n", 1)[0] or type(error).__name__
    if damage is not None:
        raise DamagedError(f"checkpoint: expected an intact file {path}, got: {damage}") from None
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise ValueError(f"checkpoint: expected format {FORMAT} in {path}, got {found}")
    return state


class DamagedError(ValueError):
    """A checkpoint that is not as it was written."""


def exists(path: Path) -> bool:
    """Whether :func:`load_newest` finds a checkpoint at ``path``, or the one before it."""
    return path.exists() or previous_of(path).exists()


def load_newest(path: Path) -> dict[str, Any]:
    """Reads the newest intact checkpoint of a run: the last one, or else the one before it.

    A file that is damaged or gone is named in a warning, a damaged one moved to
    ``checkpoint.damaged.pt``, and the previous checkpoint takes its place, so that the next one
    does not displace the only intact one.

    Args:
        path: the last checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: neither is intact, or the intact one is of another version of the format.
    """
    try:
        return load(path)
    except FileNotFoundError as error:
        if not previous_of(path).is_file():
            raise
        damage, kept = str(error), ""
    except DamagedError as error:
        damage, kept = str(error), f"it is kept as {damaged_of(path).name}, and "
    previous = previous_of(path)
    if not previous.is_file():
        raise ValueError(
            f"{damage}; there is no earlier one beside it, and --overwrite starts anew"
        )
    try:
        state = load(previous)
    except DamagedError as error:
        raise ValueError(f"{damage}; and {error}") from None
    if kept:
        _second_name(path, damaged_of(path))
    _second_name(previous, path)
    flush_folder(path.parent)
    warnings.warn(
        f"{damage}; {kept}the run goes on from the checkpoint before it, step {state.get('step')}",
        RuntimeWarning,
        stacklevel=2,
    )
    return state
