"""Time and peak memory of a bilevel step: ``python bench/bench_bilevel.py --out FOLDER``.

Ordinary steps, bilevel steps and the bilevel step as published run in turns in one process, on the
same batch of noise; the peak memory of each is measured in a separate process. A ratio is the
median of the ratios of all rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mclfast._base.files import write_json
from mclfast.bench import measure, peak
from mclfast.bench.published_forms.bilevel import PublishedBilevel
from mclfast.bench.report import environment
from mclfast.bench.train_step import StepCase, make_batch, make_step
from mclfast.methods.lmcl import LayerwiseMCL

ORDINARY = "ordinary"
#: Steps that are measured; "sequential" is a step that runs one peer at a time.
KINDS = (ORDINARY, "bilevel", "bilevel sequential", "published")


def call(kind: str, options: argparse.Namespace) -> Callable[[], object]:
    """A function that runs one step of a kind on two new peers.

    Args:
        kind: one of ``KINDS``.
        options: options of the command.
    """
    variant = "sequential" if kind == "bilevel sequential" else "ours"
    # The published step runs in PyTorch's own layout, in which it is faster.
    layout = "off" if kind == "published" else options.channels_last
    case = StepCase(
        variant, options.network, batch=options.batch, side=options.side, device=options.device
    )
    images, batch = make_batch(case)
    step = make_step(case, amp=options.amp, channels_last=layout)
    step.cohort.train()
    step.method.train()
    if kind == ORDINARY:
        return lambda: step(images, batch)
    if kind == "published":
        assert isinstance(step.method, LayerwiseMCL)
        published = PublishedBilevel(step.cohort, step.method, lr=step.config.lr)
        return lambda: published(images, batch.labels)
    return lambda: step.bilevel(images, batch)


def peak_bytes(kind: str, options: argparse.Namespace) -> int:
    """Bytes by which the memory of this process rises during a step."""
    step = call(kind, options)
    step()
    return measure.cuda_peak(step) if options.device.startswith("cuda") else peak.measure(step)


def peak_in_child(kind: str) -> int:
    """:func:`peak_bytes` of a kind, measured in a new process with the same arguments."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak", kind]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{kind}: the process that measures memory failed\n{done.stderr}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures all kinds of steps; returns JSON values."""
    calls = {kind: call(kind, options) for kind in options.kinds}
    for step in calls.values():
        step()
    device = torch.device(options.device).type
    rounds = {"min_rounds": options.rounds, "max_rounds": options.rounds}
    timings = measure.interleaved(calls, device=device, budget=0, **rounds)
    calls.clear()
    peaks = {kind: peak_in_child(kind) for kind in options.kinds}
    base = timings[ORDINARY]
    return {
        "settings": {k: v for k, v in vars(options).items() if k not in ("out", "peak")},
        "environment": environment(),
        "steps": {
            kind: {
                "median_ms": statistics.median(timing.rounds),
                "rounds_ms": timing.rounds,
                "times_ordinary": base.ratio(timing),
                "peak_bytes": peaks[kind],
                "peak_over_ordinary": peaks[kind] / max(1, peaks[ORDINARY]),
            }
            for kind, timing in timings.items()
        },
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet32", help="network of both peers")
    parser.add_argument(
        "--batch", type=int, default=128, help="images in a batch, two of each class"
    )
    parser.add_argument("--side", type=int, default=32, help="side of the images in pixels")
    parser.add_argument(
        "--rounds", type=int, default=7, help="number of times that each step is timed"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--amp", default="off", choices=("off", "bf16"))
    parser.add_argument("--channels-last", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, metavar="KIND")
    parser.add_argument(
        "--quick", action="store_true", help="tiny networks, to check that the benchmark works"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for bilevel.json, or bilevel-contiguous.json with --channels-last off",
    )
    parser.add_argument("--peak", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if ORDINARY not in options.kinds:
        parser.error(f"--kinds: expected {ORDINARY} among them, got {' '.join(options.kinds)}")
    if options.quick:
        options.network, options.batch, options.side, options.rounds = "resnet8", 8, 16, 1
    return options


def main() -> None:
    options = parse()
    if options.peak:
        print(peak_bytes(options.peak, options))
        return
    results = run(options)
    for kind, row in results["steps"].items():
        print(
            f"{kind:20} {row['median_ms']:9.1f} ms {row['times_ordinary']:6.2f} ordinary steps "
            f"{row['peak_bytes'] / 2**20:8.1f} MiB {row['peak_over_ordinary']:5.2f} x ordinary"
        )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        name = "bilevel-contiguous" if options.channels_last == "off" else "bilevel"
        write_json(options.out / f"{name}.json", results)


if __name__ == "__main__":
    main()
