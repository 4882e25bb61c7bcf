"""One run in a folder at a time: a lock that dies with the process that holds it."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mclfast._base.files import missing_folders

try:
    import fcntl
except ImportError:  # Windows has other locks.
    fcntl = None  # type: ignore[assignment]

#: The file that is locked. It holds the number of the process, and goes with the lock.
LOCK = ".lock"

# Folders that a thread of this process has locked, each with its open file and how often it asked.
_held: dict[tuple[int, int, Path], list[int]] = {}


@contextmanager
def hold(folder: Path, argument: str = "run_dir") -> Iterator[None]:
    """Locks a folder for the block, which may be within another block of the same thread.

    Args:
        folder: folder to be written; made if absent.
        argument: name of the argument that gave the folder, for errors.

    Raises:
        ValueError: another run writes into the folder.
        OSError: the folder cannot be written.
    """
    key = _key(folder)
    made = missing_folders(folder)
    if key in _held:
        _held[key][1] += 1
    else:
        _held[key] = [_locked_file(folder, argument), 1]
    try:
        yield
    finally:
        entry = _held[key]
        entry[1] -= 1
        if entry[1] == 0:
            del _held[key]
            _release(folder / LOCK, entry[0])
            # A run that could not begin leaves no empty folder.
            with suppress(OSError):
                for place in made:
                    place.rmdir()


def check_held(folder: Path) -> None:
    """Raises OSError where a locked folder is no longer at its place, before it is written to."""
    entry = _held.get(_key(folder))
    if entry is not None and not _same_file(folder / LOCK, entry[0]):
        raise FileNotFoundError(
            f"run_dir: expected the folder {folder} as at the start, found it moved or deleted; "
            "if it was moved, go on from its new place with --resume"
        )


def _key(folder: Path) -> tuple[int, int, Path]:
    # Not resolved: a folder that has been moved has no true path any more.
    return os.getpid(), threading.get_ident(), Path(os.path.abspath(folder))


def _locked_file(folder: Path, argument: str) -> int:
    """Opens and locks the file of a folder, which its holder may remove at any moment."""
    path = folder / LOCK
    while True:
        # Another run that could not begin may have removed the empty folder again.
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue
        try:
            _lock(file, folder, argument)
        except BaseException:
            os.close(file)
            raise
        # The file may have been removed by its last holder between the two calls.
        if _same_file(path, file):
            break
        os.close(file)
    os.ftruncate(file, 0)
    os.write(file, f"{os.getpid()}\n".encode())
    return file


def _lock(file: int, folder: Path, argument: str) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.pread(file, 20, 0).decode("ascii", "replace").strip()
        process = f"process {who}" if who.isdigit() else "another process"
        raise ValueError(
            f"{argument}: expected a folder that no other run writes into, got {folder}, which "
            f"{process} is writing into"
        ) from None
    except OSError as error:
        # A file system without locks is no reason not to train there.
        warnings.warn(f"{argument}: {folder} cannot be locked ({error.strerror})", stacklevel=2)


def _same_file(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except OSError:
        return False


def _release(path: Path, file: int) -> None:
    # Removed while it is locked, so that nobody's new file is.
    if _same_file(path, file):
        with suppress(OSError):
            path.unlink()
    os.close(file)
