"""Training steps of L-MCL, ours against the plain published loop, in turn in one run.

    python bench/bench_train_step.py --out bench/results/MACHINE/train-step

Times images/s of an ordinary step for cohorts of two and four ResNet-32 with auxiliary heads at
CIFAR shapes, and of the bilevel step for two of them; peak memory comes from a process of its own
for each. The cost of a bilevel step at every 50th step is computed from the two measured times.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path

from mclfast._base.files import write_json
from mclfast.bench.report import environment
from mclfast.bench.train_step import (
    OURS,
    PLAIN,
    PUBLISHED,
    Row,
    StepCase,
    bilevel_table,
    run_cases,
    table,
    with_bilevel,
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, help="folder for train-step.json")
    add("--peers", type=int, nargs="+", default=[2, 4], help="sizes of the cohort")
    add(
        "--bilevel-peers",
        type=int,
        nargs="*",
        default=[2],
        help="sizes at which the bilevel step is measured too",
    )
    add("--variants", nargs="+", default=[*PLAIN, "ours", "contiguous"], choices=[*PLAIN, *OURS])
    add(
        "--bilevel-variants",
        nargs="+",
        default=[PUBLISHED, "ours", "contiguous"],
        choices=[*PLAIN, *OURS],
        help="of which the bilevel step is measured too",
    )
    add("--network", default="resnet32", help="every peer")
    add("--batch", type=int, default=128, help="images, two of each class")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--rounds", type=int, default=5, help="times that each ordinary step is timed")
    add("--bilevel-rounds", type=int, default=2, help="times that each bilevel step is timed")
    add("--no-memory", action="store_true", help="do not measure peak memory")
    add("--quick", action="store_true", help="tiny networks, to see that it works")
    return parser.parse_args()


def main() -> None:
    options = parse()
    case = StepCase(PUBLISHED, network=options.network, batch=options.batch, device=options.device)
    rounds = {False: options.rounds, True: options.bilevel_rounds}
    if options.quick:
        case = dataclasses.replace(case, network="resnet8", batch=8, side=16, classes=10)
        options.peers, options.bilevel_peers, rounds = [2], [2], {False: 1, True: 1}
        options.variants = options.bilevel_variants[:2]
    rows: list[Row] = []
    for bilevel, peers in itertools.product((False, True), options.peers):
        if bilevel and peers not in options.bilevel_peers:
            continue
        cases = [
            dataclasses.replace(case, variant=variant, peers=peers, bilevel=bilevel)
            for variant in options.variants
            if not bilevel or variant in options.bilevel_variants
        ]
        number = rounds[bilevel]
        found = run_cases(cases, budget=0, rounds=(number, number), memory=not options.no_memory)
        print(table(found), end="\n\n", flush=True)
        rows += found
        if options.out:
            settings = {k: v for k, v in vars(options).items() if k != "out"}
            write_json(
                options.out / "train-step.json",
                {
                    "environment": environment(),
                    "settings": settings,
                    "rows": rows,
                    "bilevel_every_50": with_bilevel(rows),
                },
            )
    if options.bilevel_peers:
        print(bilevel_table(with_bilevel(rows)))


if __name__ == "__main__":
    main()
