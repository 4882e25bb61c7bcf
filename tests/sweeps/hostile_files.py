"""Files of a run that were made to deceive: each is refused in one line, or does no harm.

Lost is a file with which the reader did not end with one of its own errors in one line, or which
got code to run.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import tempfile
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml

from helpers import tiny_run
from helpers.exports import edit
from mclfast.cli.main import main
from mclfast.compare.runs import Run, load
from mclfast.train import checkpoint
from sweeps import tally

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    3.5,
    2**40,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../x",
    "a\nb",
    [],
    [1],
    ["x"],
    {},
    {"x": 1},
    {1: "x"},
]
#: Stands for a value that is removed.
GONE = object()


class Trap:
    """A pickle of this makes a folder when it is loaded with its code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def sweep(count: int, seed: int) -> dict[str, int]:
    """Reads hostile files, one at a time.

    Args:
        count: number of files.
        seed: seed that files and lies are drawn by.

    Returns:
        Numbers of files: tried, refused, survived (read, and no code ran), lost.
    """
    draw, found = random.Random(seed), Counter(tried=0, refused=0, survived=0, lost=0)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run, trap = tiny_run.finished(Path(name, "run")), Path(name, "trap")
        for _ in range(count):
            file = draw.choice(list(_READERS))
            content = (run / file).read_bytes()
            about = (run / "peer0" / "backbone.json").read_bytes()
            make = draw.choice([_lie, _lie, _lie, _code, _archive, _header, _text, _cut])
            try:
                make(draw, run / file, trap)
                outcome = _READERS[file](run)
            # A traceback for the user; the sweep has to go on.
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"
            if trap.exists():
                trap.rmdir()
                outcome = "code ran"
            (run / file).write_bytes(content)
            (run / "peer0" / "backbone.json").write_bytes(about)
            tally(found, outcome, f"{file} by {make.__name__} (seed {seed})")
    return dict(found)


def _command(*arguments: object) -> str:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = main([str(a) for a in arguments])
    lines = errors.getvalue().splitlines()
    if status == 0:
        return "survived"
    return "refused" if status == 2 and len(lines) == 1 else errors.getvalue()


def _load(run: Path) -> str:
    try:
        load(Run("mcl", 0, tiny_run.config(), run))
    except ValueError as error:
        text = str(error)
        return text if "\n" in text or not text.startswith("out: ") else "refused"
    return "survived"


def _export(run: Path) -> str:
    return _command("export", run, "--out", run / "again")


def _evaluate(run: Path) -> str:
    return _command("eval", run / "peer0", "--device", "cpu")


_READERS = {
    "config.yaml": _export,
    "checkpoint.pt": _export,
    "peer0/backbone.json": _evaluate,
    "peer0/backbone.safetensors": _evaluate,
    "result.json": _load,
    "metrics.csv": _load,
    "cost.json": _load,
    "environment.json": _load,
}


def _lie(draw: random.Random, path: Path, _: Path) -> None:
    """Well-formed content with a false value somewhere in it, and no digest."""
    if path.suffix == ".json":
        value = _changed(draw, json.loads(path.read_text()) | {"blake2b": GONE})
        path.write_text(json.dumps(_without_gone(value)))
    elif path.suffix == ".yaml":
        value = _changed(draw, yaml.safe_load(path.read_text()))
        path.write_text(yaml.safe_dump(_without_gone(value)))
    elif path.suffix == ".pt":
        state = torch.load(path, weights_only=True)
        torch.save(_without_gone(_changed(draw, state)), path)
    elif path.suffix == ".csv":
        lines = [line.split(",") for line in path.read_text().splitlines()]
        line = draw.choice(lines)
        line[draw.randrange(len(line))] = draw.choice(["", "x", "-1", "nan", "1e999", '"', "5,5"])
        path.write_text("\n".join(map(",".join, lines)))
    else:
        edit(path.parent)
        tensors = draw.randbytes(16)
        text = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + tensors)


def _changed(draw: random.Random, value: Any) -> Any:
    """A copy of nested values with another value at one place."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        return value | {key: _changed(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.9:
        index = draw.randrange(len(value))
        return [*value[:index], _changed(draw, value[index]), *value[index + 1 :]]
    if isinstance(value, torch.Tensor) and draw.random() < 0.5:
        return draw.choice([value[None], value.flatten()[:1], value.double() * float("nan")])
    return draw.choice([*VALUES, GONE])


def _without_gone(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_gone(v) for k, v in value.items() if v is not GONE}
    if isinstance(value, list):
        return [_without_gone(v) for v in value if v is not GONE]
    return None if value is GONE else value


def _code(draw: random.Random, path: Path, trap: Path) -> None:
    """A pickle that runs code, plain or in an archive of PyTorch, or a YAML tag that does."""
    if path.suffix == ".yaml":
        path.write_text(f"method: !!python/object/apply:os.mkdir [{str(trap)!r}]")
    elif draw.random() < 0.5:
        path.write_bytes(pickle.dumps({"format": 1, "step": Trap(trap)}, protocol=2))
    else:
        torch.save({"format": checkpoint.FORMAT, "step": Trap(trap)}, path)


def _archive(draw: random.Random, path: Path, trap: Path) -> None:
    """An archive with names that lead out of it, or a compressed member."""
    how = draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(path, "w", how) as archive:
        for name in ("../../trap/data.pkl", f"{trap}/data.pkl", "archive/../../trap"):
            archive.writestr(name, bytes(draw.randrange(100_000)))


def _header(draw: random.Random, path: Path, _: Path) -> None:
    """A header of safetensors that promises other sizes than the file has."""
    edit(path.parents[0] if path.parent.name == "peer0" else path.parent / "peer0")
    sizes = [draw.choice([0, 1, 2**31, 2**62, -1]) for _ in range(draw.randrange(4))]
    ends = [draw.choice([0, 4, 2**40, -4]) for _ in range(2)]
    tensor = {"dtype": draw.choice(["F32", "X1", 5]), "shape": sizes, "data_offsets": ends}
    text = json.dumps({"conv1.weight": tensor}).encode()
    length = draw.choice([len(text), 2**63, 5, 0])
    path.write_bytes(length.to_bytes(8, "little") + text + b"abcd")


def _text(draw: random.Random, path: Path, _: Path) -> None:
    """Bytes of no format."""
    path.write_bytes(draw.choice([b"", b"\0", b"x" * 100, draw.randbytes(500), b"[" * 50_000]))


def _cut(draw: random.Random, path: Path, _: Path) -> None:
    """The file without its end."""
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])
