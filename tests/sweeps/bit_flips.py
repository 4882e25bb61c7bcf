"""Single flipped bits in the files of a run: each is refused, or what is read is what was written.

Lost is a flipped bit with which other content was read, or with which an error came that no one can
act on.
"""

from __future__ import annotations

import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers import tiny_run
from mclfast.compare.runs import Run, load
from mclfast.train import checkpoint
from mclfast.train.export import DESCRIPTION, WEIGHTS, load_backbone

#: Files of a run, and how often each is chosen.
FILES = {
    "checkpoint.pt": 8,
    f"peer0/{WEIGHTS}": 8,
    f"peer0/{DESCRIPTION}": 4,
    "result.json": 2,
    "metrics.csv": 2,
    "cost.json": 1,
}


def sweep(count: int, seed: int) -> dict[str, int]:
    """Flips bits, one at a time.

    Args:
        count: number of bits.
        seed: seed that files and bits are drawn by.

    Returns:
        Numbers of bits: tried, refused, survived (read unchanged), lost; and recovered, the
        damaged checkpoints in whose place the one before was found.
    """
    draw, found = random.Random(seed), Counter(tried=0, refused=0, survived=0, lost=0, recovered=0)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        finished = tiny_run.finished(Path(name, "finished"))
        unfinished = tiny_run.unfinished(Path(name, "unfinished"))
        for _ in range(count):
            file = draw.choices(list(FILES), list(FILES.values()))[0]
            run = unfinished if file == "checkpoint.pt" else finished
            content = (run / file).read_bytes()
            bit = draw.randrange(8 * len(content))
            outcome = _try(run, file, content, bit)
            if outcome == "lost":
                print(f"lost: bit {bit} of {file} (seed {seed})")
            found["tried"] += 1
            found[outcome] += 1
            if file == "checkpoint.pt" and outcome == "refused":
                found["recovered"] += _recovers(run, content, bit)
    return dict(found)


def _try(run: Path, file: str, content: bytes, bit: int) -> str:
    reader = _reader(run, file)
    before = reader()
    (run / file).write_bytes(flipped(content, bit))
    try:
        return "survived" if same(reader(), before) else "lost"
    except ValueError as error:
        return "lost" if "\n" in str(error) else "refused"
    # Anything else is a traceback for the user, and the sweep has to go on.
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        return "lost"
    finally:
        (run / file).write_bytes(content)


def _reader(run: Path, file: str) -> Callable[[], Any]:
    """The function that reads a file, to plain values and tensors."""
    if file == "checkpoint.pt":
        return lambda: checkpoint.load(run / file)
    if file.startswith("peer0"):

        def read_export() -> Any:
            export = load_backbone(run / "peer0")
            return [export.network.state_dict(), export.description]

        return read_export
    return lambda: load(Run("mcl", 0, tiny_run.config(), run))[1:]


def _recovers(run: Path, content: bytes, bit: int) -> bool:
    """Whether the checkpoint before a damaged one is found; the folder is left as it was."""
    path = run / "checkpoint.pt"
    path.write_bytes(flipped(content, bit))
    try:
        return len(checkpoint.load_newest(path)["history"]) == 1
    finally:
        # Written anew, as it now shares its content with the previous one.
        path.unlink()
        path.write_bytes(content)


def flipped(content: bytes, bit: int) -> bytes:
    """Content with one other bit."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def same(found: Any, before: Any) -> bool:
    """Whether nested values and tensors are as before, bit by bit; NaN equals NaN.

    A mapping may have another name beside those of before: a digest whose own name was hit.
    """
    if isinstance(before, Tensor):
        alike = isinstance(found, Tensor) and found.dtype == before.dtype
        return alike and torch.equal(found, before)
    if isinstance(before, dict):
        return before.keys() <= found.keys() and all(same(found[k], v) for k, v in before.items())
    if isinstance(before, (list, tuple)):
        return len(found) == len(before) and all(map(same, found, before))
    # Results compare by their fields, and NaN is not equal to itself.
    return bool(found == before) or repr(found) == repr(before)
