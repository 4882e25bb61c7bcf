"""Checkpoints that hold everything a run changes, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mclfast._base.files import replacing

#: Raised when the layout of a checkpoint changes.
FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint atomically; the old one stays until the new one is complete.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as partial:
        try:
            torch.save({"format": FORMAT, **state}, partial)
        except RuntimeError as error:
            # torch's writer of files does not say what the system said.
            if "inline_container" not in str(error):
                raise
            reason = str(error).split("\n", 1)[0]
            raise OSError(
                f"checkpoint: expected room on the disk for {path}, got: {reason}"
            ) from None


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint; tensors and plain values only, no code is executed.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged, or written by another version of the format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: expected a file {path}, found none")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    # A pickle is a program: what a damaged one raises has no common type.
    except Exception as error:
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"checkpoint: expected an intact file {path}, got: {reason}") from None
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise ValueError(f"checkpoint: expected format {FORMAT} in {path}, got {found}")
    return state
