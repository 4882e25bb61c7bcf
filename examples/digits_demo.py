"""A lone network against a cohort of two with layer-wise MCL, on handwritten digits.

    python examples/digits_demo.py                    # 10 labelled images a class, 3 seeds
    python examples/digits_demo.py --data digits-full --epochs 30

Trains both with the same settings, seed by seed, and prints a table of final test accuracies
(mean and standard deviation over the seeds). Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mclfast import env
from mclfast._files import write_json, write_text
from mclfast.config import TrainConfig
from mclfast.plots import accuracy_bands
from mclfast.train import CHECKPOINT, CURVES, METRICS, RunResult, train

METHODS = {
    "alone": {"method": "baseline", "cohort": ("resnet8",)},
    "lmcl": {"method": "lmcl", "cohort": ("resnet8", "resnet8")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default="digits", choices=["digits", "digits-full"])
    parser.add_argument("--seeds", type=int, default=3, help="seeds per method (default: 3)")
    parser.add_argument("--epochs", type=int, default=TrainConfig.epochs)
    parser.add_argument("--lr", type=float, default=TrainConfig.lr)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder of table and picture (default: OUT)")
    options = parser.parse_args()
    results_dir = options.results or options.out

    shared = {"data": options.data, "epochs": options.epochs, "lr": options.lr}
    plan = [(label, seed) for label in METHODS for seed in range(options.seeds)]
    results: dict[str, list[RunResult]] = {label: [] for label in METHODS}
    for number, (label, seed) in enumerate(plan, start=1):
        config = TrainConfig.from_values({**METHODS[label], **shared, "seed": seed})
        print(f"[{number}/{len(plan)}] {label}, seed {seed}", flush=True)
        results[label].append(train(config, options.out / f"{options.data}-{label}-seed{seed}"))

    table = make_table(results)
    print(f"\n{table}")
    title = f"{options.data}: ResNet-8 alone and in a cohort of two"
    results_dir.mkdir(parents=True, exist_ok=True)
    accuracy_bands(
        {label: [r.history for r in runs] for label, runs in results.items()},
        results_dir / "accuracy.png",
        title,
    )
    write_text(results_dir / "table.md", f"# {title}\n\n{table}\n")
    write_json(results_dir / "results.json", record(results, shared))
    print(f"picture of all runs   {results_dir / 'accuracy.png'}")
    print(f"table and numbers     {results_dir / 'table.md'}, {results_dir / 'results.json'}")
    run = options.out / f"{options.data}-lmcl-seed0"
    print(f"each run, for example {run}")
    print(f"  curves, metrics     {CURVES}, {METRICS}")
    print(f"  checkpoint          {CHECKPOINT}")
    print("  exported backbones  peer0, peer1   (mclfast eval reads them)")


def make_table(results: dict[str, list[RunResult]]) -> str:
    """Markdown: one line per network, final accuracies; then the gain."""
    lines = [
        "| network | test accuracy, own classifier, last epoch (%) | seeds |",
        "|---|---|---|",
    ]
    alone = [r.peers[0] for r in results["alone"]]
    lines.append(f"| alone | {spread(alone)} | {len(alone)} |")
    cohort = results["lmcl"]
    for i in range(len(cohort[0].peers)):
        accuracies = spread([r.peers[i] for r in cohort])
        lines.append(f"| cohort, peer {i} | {accuracies} | {len(cohort)} |")
    means = [mean(r.peers) for r in cohort]
    lines.append(f"| cohort, mean of peers | {spread(means)} | {len(cohort)} |")
    lines.append(f"| cohort, ensemble | {spread([r.ensemble for r in cohort])} | {len(cohort)} |")
    gain = mean(means) - mean(alone)
    seconds = mean(r.seconds for r in results["alone"]), mean(r.seconds for r in cohort)
    return "\n".join(lines) + (
        f"\n\nGain of a peer over the lone network: {gain:+.2f} points."
        f" Seconds per seed: {seconds[0]:.0f} alone, {seconds[1]:.0f} for the cohort."
    )


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.2f} +- {stdev(values) if len(values) > 1 else 0.0:.2f}"


def record(results: dict[str, list[RunResult]], shared: dict[str, Any]) -> dict[str, Any]:
    """Every seed's figures, with what is needed to reproduce them."""
    about = env.report_dict()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "settings": shared,
        "commit": about["mclfast"]["git"],
        "versions": {
            "mclfast": about["mclfast"]["version"],
            "python": about["system"]["python"],
            "torch": about["torch"]["version"],
        },
        "cpus": about["system"]["cpus"],
        "runs": {
            label: [
                {
                    "seed": seed,
                    "peers": r.peers,
                    "ensemble": r.ensemble,
                    "published_protocol": r.published_protocol,
                    "seconds": round(r.seconds, 1),
                }
                for seed, r in enumerate(runs)
            ]
            for label, runs in results.items()
        },
    }


if __name__ == "__main__":
    main()
