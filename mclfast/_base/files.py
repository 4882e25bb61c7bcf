"""Text, JSON and YAML files; a file is written beside its place and moved there when complete."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mclfast._base.optional import optional_import


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path``, which its file replaces if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    # A killed process may have left its file here; no two processes write to the same path.
    for stray in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        stray.unlink(missing_ok=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically, indented."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: file to read.
        what: subject of the error message.

    Raises:
        ValueError: the file does not hold a JSON object; the text begins with ``what``.
        FileNotFoundError: there is no file at ``path``.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{what}: expected a file {path}, found none") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{what}: expected JSON in {path}, got {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected a JSON object in {path}, got {type(value).__name__}")
    return value


def read_yaml(path: Path, argument: str) -> dict[str, Any]:
    """Reads a YAML mapping whose keys are text.

    Args:
        path: file to read.
        argument: subject of the error message.

    Raises:
        ValueError: the file does not hold such a mapping; the text begins with ``argument``.
        FileNotFoundError: there is no file at ``path``.
    """
    yaml = optional_import("yaml", extra="train")
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: expected a file {path}, found none")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{argument}: expected YAML in {path}, got {problem}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(
            f"{argument}: expected `field: value` lines in {path}, got {type(values).__name__}"
        )
    return values
