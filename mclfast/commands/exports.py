"""The exported backbones that a path given to a command means."""

from __future__ import annotations

from pathlib import Path


def exports_in(path: Path) -> list[Path]:
    """The folder itself where it is an export, else the peers of the run in it, in order.

    Raises:
        FileNotFoundError: neither is there; the text begins with ``path``.
        ValueError: a file; likewise.
    """
    from mclfast.export import DESCRIPTION
    from mclfast.run_folder import CHECKPOINT

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
