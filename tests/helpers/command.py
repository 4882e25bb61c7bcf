"""Commands as a user calls them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mclfast.cli.main import main


def call(*arguments: str | Path) -> int:
    """The exit status; argparse leaves by an exception."""
    try:
        return main([str(a) for a in arguments])
    except SystemExit as leave:
        return int(leave.code or 0)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line of a command that fails for a mistake of the user; warnings may precede it."""
    assert call(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if ": warning: " not in line]
    assert len(lines) == 1, lines
    assert "error: " in lines[0] and "Traceback" not in lines[0]
    return lines[0].split("error: ", 1)[1]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
