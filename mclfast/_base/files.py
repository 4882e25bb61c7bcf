"""Text, JSON and YAML files; a file is written beside its place and moved there when complete."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mclfast._base import yaml_text
from mclfast._base.checks import shortened

#: Key of a JSON object's own digest.
_SEAL = "blake2b"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path``, which its file replaces if the block succeeds.

    The content is on the disk before it gets its name, and the name before this returns, so that a
    loss of power leaves the old file or the new one. The file has the mode of any new file.
    """
    _make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    # A killed process may have left its file here; no two processes write to the same path.
    for stray in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        stray.unlink(missing_ok=True)
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        # Some writers make files that only their owner can read.
        if partial.stat().st_mode != mode:
            partial.chmod(mode)
        _flush(partial)
        os.replace(partial, path)
        flush_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def missing_folders(folder: Path) -> list[Path]:
    """The folder and those above it, as far as they do not exist, from the inside out."""
    return [place for place in (folder, *folder.parents) if not place.exists()]


def _make_folder(folder: Path) -> None:
    missing = missing_folders(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        flush_folder(place.parent)


def _flush(path: Path) -> None:
    # Opened for writing, as some systems flush nothing else.
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, where the system can do that."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def digest_of_bytes(content: bytes) -> str:
    """The digest of a file's content that descriptions and results record, as hexadecimal text."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically, indented."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_sealed_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object with a digest of itself, which :func:`read_json` compares."""
    plain = json.loads(json.dumps(value))
    write_json(path, plain | {_SEAL: _digest_of_object(plain)})


def _digest_of_object(value: dict[str, Any]) -> str:
    return digest_of_bytes(json.dumps(value, sort_keys=True).encode())


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Reads a JSON object; its own digest, where it has one, is compared and left out.

    Args:
        path: file to read.
        what: subject of the error message.

    Raises:
        ValueError: the file does not hold a JSON object, or not the one that was written; the text
            begins with ``what``.
        FileNotFoundError: there is no file at ``path``.
    """
    # A named pipe would be waited for.
    if not path.is_file():
        raise FileNotFoundError(f"{what}: expected a file {path}, found none")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    # A number of thousands of digits is a ValueError too, and deep nesting a RecursionError.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: expected JSON in {path}, got {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected a JSON object in {path}, got {type(value).__name__}")
    if _SEAL in value and value.pop(_SEAL) != _digest_of_object(value):
        raise ValueError(
            f"{what}: expected {path} as it was written, got other content than its {_SEAL} says; "
            f"if you changed it on purpose, remove the line {_SEAL}"
        )
    return value


def read_yaml(path: Path, argument: str) -> dict[str, Any]:
    """Reads a YAML mapping whose keys are text, each given once.

    Args:
        path: file to read.
        argument: subject of the error message.

    Raises:
        ValueError: the file does not hold such a mapping; the text begins with ``argument``.
        FileNotFoundError: there is no file at ``path``.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: expected a file {path}, found none")
    try:
        with path.open("rb") as file:
            # One byte more, so that a text that is too long is seen to be.
            values = yaml_text.parse(file.read(yaml_text.MAX_BYTES + 1).decode("utf-8"))
    # Text that is no UTF-8 and an impossible date are ValueErrors as well.
    except ValueError as error:
        problem = shortened(" ".join(str(error).split()), 500)
        raise ValueError(f"{argument}: expected YAML in {path}, got {problem}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(
            f"{argument}: expected `field: value` lines in {path}, got {type(values).__name__}"
        )
    return values
