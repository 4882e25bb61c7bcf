"""Runs the long sweeps, each in a process of its own, and writes their figures.

    PYTHONPATH=tests python -m sweeps                        # all, with the counts of a night
    PYTHONPATH=tests python -m sweeps bit_flips --count 100 --seed 3
    PYTHONPATH=tests python -m sweeps --share 0.01           # a hundredth of each

Exits with 1 if a sweep lost a case or did not end. The seed of every failure is printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mclfast

#: Cases of a night, by sweep.
NIGHTLY = {
    "fuzz_losses": 100_000,
    "bilevel_layers": 5_000,
    "bit_flips": 1_000,
    "hostile_files": 5_000,
    "image_files": 1_500,
    "yaml_files": 10_000,
    "kills": 400,
    "soak": 20_000,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sweeps", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"sweeps to run: {', '.join(NIGHTLY)}; default: all",
    )
    add("--count", type=int, help="number of cases, in place of those of a night")
    add("--share", type=float, default=1.0, help="share of the cases of a night")
    add("--seed", type=int, help="seed of the cases; drawn and printed by default")
    add("--json", type=Path, help="file for the figures, one sweep after the other")
    given = parser.parse_args(arguments)
    unknown = set(given.names) - set(NIGHTLY)
    if unknown:
        parser.error(
            f"expected sweeps among {', '.join(NIGHTLY)}; got {', '.join(sorted(unknown))}"
        )
    seed = random.SystemRandom().randrange(2**31) if given.seed is None else given.seed
    lost = False
    found = _before(given.json)
    for name in given.names or NIGHTLY:
        count = given.count or max(1, round(given.share * NIGHTLY[name]))
        print(f"{name}: {count} cases, seed {seed}", flush=True)
        result = _run(name, count, seed)
        lost |= result is None or result["counts"].get("lost", 0) > 0
        if result is None:
            print(f"{name}: did not end (seed {seed})", flush=True)
            continue
        print(f"{name}: {result['counts']} in {result['seconds']} s", flush=True)
        found[name] = result
        if given.json is not None:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(found, indent=2) + "\n")
    return int(lost)


def _before(file: Path | None) -> dict[str, Any]:
    """Figures of sweeps that ran before; a night that is cut off keeps them."""
    if file is None or not file.exists():
        return {}
    known: dict[str, Any] = json.loads(file.read_text())
    return known


def _run(name: str, count: int, seed: int) -> dict[str, Any] | None:
    """One sweep in a process of its own: its figures, or None if the process did not end well."""
    code = (
        "import json, logging, sys; from importlib import import_module; "
        "logging.disable(logging.WARNING); "
        "counts = import_module('sweeps.' + sys.argv[1]).sweep(int(sys.argv[2]), int(sys.argv[3]));"
        "print('counts ' + json.dumps(dict(counts)))"
    )
    start = time.monotonic()
    run = subprocess.Popen(
        [sys.executable, "-c", code, name, str(count), str(seed)], stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    counts = None
    for line in run.stdout:
        if line.startswith("counts "):
            counts = json.loads(line.removeprefix("counts "))
        else:
            print(line, end="", flush=True)
    if run.wait() != 0 or counts is None:
        return None
    return {
        "counts": counts,
        "seed": seed,
        "seconds": round(time.monotonic() - start, 1),
        "mclfast": mclfast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


if __name__ == "__main__":
    sys.exit(main())
