"""Two checkouts against each other: ``python bench/bench_checkouts.py OLD NEW --out FOLDER``.

OLD and NEW are the ``mclfast`` commands of two environments. Our own implementations are measured
by ``mclfast bench`` of the one and of the other in turn, several times, in fresh processes; the
figure of a case is the median over the turns of new / old. Takes about two minutes a turn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from statistics import median

from mclfast._base.files import write_json
from mclfast.bench.report import environment

#: Cases with a goal, by implementations of ours alone; what others take does not matter here.
CASES = ["--preset", "targets", "--no-memory", "--budget", "1"]
PROVIDERS = ("cpu", "cpu-fused", "cpu-rows")
#: Fields that name a case.
KEY = ("op", "mode", "M", "L", "B", "D", "provider")

Times = dict[tuple[object, ...], float]


def measured(command: str) -> Times:
    """Medians in ms of all cases, by their key."""
    options = [word for name in PROVIDERS for word in ("--provider", name)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [command, "bench", *CASES, *options, "--out", folder], capture_output=True, text=True
        )
        results = Path(folder) / "results.json"
        if not results.exists():
            raise RuntimeError(f"{command}: the benchmark failed\n{done.stderr}")
        rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    return {
        tuple(row[name] for name in KEY): row["p50"]
        for row in rows
        if row["metric"] == "time" and row["provider"] in PROVIDERS
    }


def main() -> None:
    """Measures in turn, prints the ratios and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", help="the mclfast command of the old checkout")
    parser.add_argument("new", help="the mclfast command of the new checkout")
    parser.add_argument("--turns", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--out", type=Path, help="folder for checkouts.json")
    options = parser.parse_args()
    turns: list[tuple[Times, Times]] = []
    for turn in range(options.turns):
        # The order changes: a machine that slows down does not count against one of them.
        commands = (options.old, options.new)
        found = {c: measured(c) for c in (commands if turn % 2 == 0 else commands[::-1])}
        turns.append((found[options.old], found[options.new]))
    rows, medians = [], []
    for key in turns[0][0]:
        ratios = [new[key] / old[key] for old, new in turns]
        middle = median(ratios)
        medians.append(middle)
        rows.append(dict(zip(KEY, key, strict=True)) | {"ratio": middle, "ratios": ratios})
        words = " ".join(map(str, key))
        print(f"{words:55} {middle:5.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"median of all cases: {median(medians):.3f}")
    if options.out is not None:
        write_json(options.out / "checkouts.json", {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
