"""Peak memory and time of a training step against the number of networks, and their picture.

    python bench/bench_cohort_size.py --out bench/results/MACHINE/train-step
    python bench/bench_cohort_size.py --draw bench/results/MACHINE/train-step/cohort-size.json

For each size, four steps are timed in turns: the plain published loop, ours with only the fused
loss (in the memory layout of the plain loop), ours with default settings, and ours peer-sequential.
Peak memory is measured in a separate process for each.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from mclfast._base.files import read_json, write_json
from mclfast.bench.draw_cohort import draw
from mclfast.bench.report import environment
from mclfast.bench.train_step import PUBLISHED, Row, StepCase, run_cases, table

VARIANTS = (PUBLISHED, "contiguous", "ours", "sequential")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, help="folder for cohort-size.json and cohort-size.png")
    add(
        "--draw",
        type=Path,
        metavar="JSON",
        help="measure nothing, but draw the results of an earlier run",
    )
    add("--peers", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="sizes of the cohort")
    add("--network", default="resnet20", help="network of every peer")
    add("--batch", type=int, default=64, help="images in a batch, two of each class")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--rounds", type=int, default=3, help="number of times that each step is timed")
    add("--quick", action="store_true", help="tiny networks, to check that the benchmark works")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.draw:
        results = read_json(options.draw, "draw")
        draw(results["rows"], results["environment"], options.draw.with_suffix(".png"))
        return
    case = StepCase(PUBLISHED, network=options.network, batch=options.batch, device=options.device)
    if options.quick:
        case = dataclasses.replace(case, network="resnet8", batch=8, side=16, classes=10)
        options.peers, options.rounds = [1, 2], 1
    rows: list[Row] = []
    for peers in options.peers:
        cases = [dataclasses.replace(case, variant=v, peers=peers) for v in VARIANTS]
        found = run_cases(cases, budget=0, rounds=(options.rounds, options.rounds))
        print(table(found), end="\n\n", flush=True)
        rows += found
        if options.out:
            settings = {k: v for k, v in vars(options).items() if k not in ("out", "draw")}
            results = {"environment": environment(), "settings": settings, "rows": rows}
            write_json(options.out / "cohort-size.json", results)
            draw(rows, results["environment"], options.out / "cohort-size.png")


if __name__ == "__main__":
    main()
