"""A lone network against a cohort of two with layer-wise MCL, on handwritten digits.

    python examples/digits_demo.py                    # 10 labelled images a class, 3 seeds
    python examples/digits_demo.py --data digits-full --epochs 30

Trains both with the same settings, seed by seed, and prints a table of final test accuracies
(mean and standard deviation over the seeds). Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from mclfast.compare.summary import spread
from mclfast.config import TrainConfig
from mclfast.train import RunResult, train
from mclfast.train.folder import CHECKPOINT, CURVES, ENVIRONMENT, METRICS
from mclfast.train.plots import accuracy_bands

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
    parser.add_argument(
        "--channels-last",
        default=TrainConfig.channels_last,
        choices=["auto", "on", "off"],
        help="memory layout; rounds in another order, so single runs differ (default: auto)",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder of table and picture (default: OUT)")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds: expected a number >= 1, got {options.seeds}")
    results_dir = options.results or options.out

    shared = {
        "data": options.data,
        "epochs": options.epochs,
        "lr": options.lr,
        "channels_last": options.channels_last,
    }
    plan = [(label, seed) for label in METHODS for seed in range(options.seeds)]
    results: dict[str, list[RunResult]] = {label: [] for label in METHODS}
    run_dirs: list[Path] = []
    for number, (label, seed) in enumerate(plan, start=1):
        config = TrainConfig.from_values({**METHODS[label], **shared, "seed": seed})
        print(f"[{number}/{len(plan)}] {label}, seed {seed}", flush=True)
        run_dirs.append(
            options.out / f"{options.data}-{label}-lr{options.lr}-epochs{options.epochs}-seed{seed}"
        )
        results[label].append(train(config, run_dirs[-1]))

    table = make_table(results)
    print(f"\n{table}")
    title = f"{options.data}: ResNet-8 alone and in a cohort of two"
    results_dir.mkdir(parents=True, exist_ok=True)
    accuracy_bands(
        {label: [r.history for r in runs] for label, runs in results.items()},
        results_dir / "accuracy.png",
        title,
    )
    (results_dir / "table.md").write_text(f"# {title}\n\n{table}\n", encoding="utf-8")
    values = json.dumps(record(results, shared, run_dirs), indent=2)
    (results_dir / "results.json").write_text(values + "\n", encoding="utf-8")
    print(f"picture of all runs   {results_dir / 'accuracy.png'}")
    print(f"table and numbers     {results_dir / 'table.md'}, {results_dir / 'results.json'}")
    print(f"each run, for example {run_dirs[-1]}")
    print(f"  curves, metrics     {CURVES}, {METRICS}")
    print(f"  checkpoint          {CHECKPOINT}")
    print("  exported backbones  peer0, peer1   (mclfast eval reads them)")


def make_table(results: dict[str, list[RunResult]]) -> str:
    """Markdown: one line per network, final accuracies; then the gain."""
    lines = ["| network | test accuracy, own classifier, last epoch (%) | seeds |", "|---|---|---|"]
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
        f" Seconds per seed: {seconds[0]:.0f} alone, {seconds[1]:.0f} for the cohort.\n"
        "The gain depends on the learning rate and the length of the training: see the README."
    )


def record(
    results: dict[str, list[RunResult]], shared: dict[str, Any], run_dirs: list[Path]
) -> dict[str, Any]:
    """Every seed's figures, with what is needed to reproduce them."""
    # A run that an earlier call finished was made by the code of that time.
    about = [json.loads((run_dir / ENVIRONMENT).read_text()) for run_dir in run_dirs]
    return {
        "command": shlex.join(["python", *sys.argv]),
        "settings": shared,
        "commits": sorted({str(a["mclfast"]["git"]) for a in about}),
        "versions": {
            "mclfast": sorted({a["mclfast"]["version"] for a in about}),
            "python": sorted({a["system"]["python"] for a in about}),
            "torch": sorted({a["torch"]["version"] for a in about}),
        },
        "cpus": about[0]["system"]["cpus"],
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
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"digits_demo: error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
