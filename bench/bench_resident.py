"""Resident memory of training steps on a CPU: ``python bench/bench_resident.py --out FOLDER``.

For each case, the table shows by how much two steps raise the memory of untrained networks: as the
plan predicts for tensors and, with its share for gaps in the heap, for the process; by the peak of
PyTorch's allocator; and by the peak of resident memory. Both peaks are measured in separate
processes. All cases together take about two minutes.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from mclfast._base.files import write_json
from mclfast.bench import resident
from mclfast.bench.report import environment

SHUFFLENET = "shufflenet_v2_x0_5_cifar"
CASES: tuple[dict[str, Any], ...] = (
    {"method": "baseline", "cohort": ["resnet32"], "batch_size": 128},
    {"method": "lmcl", "cohort": ["resnet32"] * 2, "batch_size": 128},
    {"method": "lmcl", "cohort": ["resnet20"] * 8, "batch_size": 64, "memory": "sequential"},
    {"method": "mcl", "cohort": [SHUFFLENET] * 2, "batch_size": 128},
    {"method": "mcl", "cohort": ["wrn_16_2"] * 2, "batch_size": 64, "memory": "checkpoint"},
    {"method": "lmcl", "cohort": ["resnet20"] * 2, "batch_size": 64, "bilevel_every": 1},
)
#: Cases of --quick, which take seconds.
QUICK: tuple[dict[str, Any], ...] = (
    {"method": "mcl", "cohort": ["resnet8"] * 2, "batch_size": 32, "memory": "sequential"},
)


def name(values: dict[str, Any]) -> str:
    """Description of a case from its settings."""
    cohort, extra = values["cohort"], ["bilevel"] if values.get("bilevel_every") else []
    words = [values["method"], f"{len(cohort)} {cohort[0]}", f"batch {values['batch_size']}"]
    return ", ".join([*words, values.get("memory", "ordinary"), *extra])


def row(values: dict[str, Any], side: int) -> dict[str, Any]:
    """Measures a case.

    Args:
        values: settings of the run.
        side: side of the images in pixels.

    Returns:
        JSON values; memory in bytes.
    """
    tensors, process = resident.predicted(resident.make_step(values, side))
    return {
        "case": name(values),
        "settings": values,
        "predicted_tensors": tensors,
        "predicted_resident": process,
        **{kind: resident.in_child(kind, values, side, os.environ) for kind in resident.KINDS},
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=32, help="side of the images in pixels")
    parser.add_argument(
        "--quick", action="store_true", help="tiny networks, to check that the benchmark works"
    )
    parser.add_argument("--out", type=Path, help="folder for resident.json")
    return parser.parse_args()


def main() -> None:
    options = parse()
    rows = []
    print(f"{'MiB':52} {'tensors':>18} {'process':>18}  process")
    print(f"{'':52} {'plan':>9}{'real':>9} {'plan':>9}{'real':>9}  over tensors")
    for values in QUICK if options.quick else CASES:
        found = row(values, options.side)
        rows.append(found)
        tensors, process = found[resident.ALLOCATED], found[resident.RESIDENT]
        sizes = (found["predicted_tensors"], tensors, found["predicted_resident"], process)
        cells = [f"{size / 2**20:9.1f}" for size in sizes]
        print(
            f"{found['case']:52} {cells[0]}{cells[1]} {cells[2]}{cells[3]}  "
            f"{process / tensors - 1:+.0%}",
            flush=True,
        )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        settings = {"side": options.side, "quick": options.quick}
        settings["threads"] = torch.get_num_threads()
        results = {"settings": settings, "environment": environment(), "rows": rows}
        write_json(options.out / "resident.json", results)


if __name__ == "__main__":
    main()
