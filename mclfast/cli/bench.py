"""``mclfast bench``: time and memory of the losses, or images/s of the loader (``--loader``)."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mclfast.bench.cases import PRESETS, PROVIDERS, preset
from mclfast.bench.problem import MODES, Case
from mclfast.cli.settings import a_number, an_integer

if TYPE_CHECKING:
    from mclfast.bench.run import Outcome

HELP = "time and memory of the losses against the published form, or images/s of the loader"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``mclfast bench``."""
    providers = sorted({p.name for entries in PROVIDERS.values() for p in entries})
    add = parser.add_argument
    add(
        "--preset",
        choices=PRESETS,
        default="small",
        help="smoke: tiny shapes, seconds; small: minutes; targets: shapes with a goal; sweeps: "
        "series over networks M and batch B; paper: all of these; bank: memory banks; bank-gpu: "
        "memory banks on a GPU; gpu: all losses on a GPU (default: small)",
    )
    add("--op", action="append", choices=list(PROVIDERS), help="only this operation; repeatable")
    add("--mode", action="append", choices=MODES, help="only this mode; repeatable")
    add(
        "--provider",
        action="append",
        choices=providers,
        help="only this implementation; repeatable",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for results.json, results.csv and the pictures",
    )
    add("--plot", action="store_true", help="draw the results as PNG files into the folder")
    add(
        "--replot",
        type=Path,
        metavar="JSON",
        help="measure nothing: print and draw the results of an earlier run",
    )
    add(
        "--budget",
        type=a_number,
        default=20.0,
        metavar="S",
        help="seconds of timing per case, after at least three rounds (default: 20)",
    )
    add("--no-memory", action="store_true", help="do not measure peak memory")
    loader = parser.add_argument_group("the loader alone")
    add = loader.add_argument
    add(
        "--loader",
        action="store_true",
        help="measure only the loader: images/s of a streamed training set that are read, decoded "
        "and augmented, for --budget seconds",
    )
    add("--data", metavar="NAME", help="imagefolder or webdataset")
    add("--data-root", metavar="DIR", help="folder with the images")
    add(
        "--batch-size",
        type=an_integer,
        default=256,
        metavar="N",
        help="images in a batch (default: 256)",
    )
    add(
        "--image-size",
        type=an_integer,
        metavar="N",
        help="side of the images in pixels (default: 224)",
    )
    add(
        "--workers",
        type=an_integer,
        metavar="N",
        help="processes that decode; 0 for none (default: one per core)",
    )


def run(known: argparse.Namespace, _: list[str]) -> int:
    """Runs the command.

    Returns:
        1 if an implementation gave a wrong result, which leaves it without numbers; else 0.
    """
    import torch

    if known.loader:
        return _measure_loader(known)
    if known.replot:
        return _replot(known)
    if known.plot and known.out is None:
        raise ValueError("plot: expected a folder given by --out, got none")
    if known.preset in ("gpu", "bank-gpu") and not torch.cuda.is_available():
        raise ValueError(f"preset: expected a CUDA device for {known.preset!r}, found none")
    cases = [
        case
        for case in preset(known.preset)
        if case.op in (known.op or PROVIDERS) and case.mode in (known.mode or MODES)
    ]
    if not cases:
        raise ValueError("op, mode: expected cases in the preset, the choice leaves none")
    return _measure(known, cases)


def _measure_loader(known: argparse.Namespace) -> int:
    from mclfast.bench.loader import measure_loader
    from mclfast.data import load
    from mclfast.data.stream.streamed import StreamedSet

    if known.data is None:
        raise ValueError("data: expected imagefolder or webdataset beside --loader, got none")
    started = time.perf_counter()
    train = load(
        known.data, root=known.data_root, image_size=known.image_size, workers=known.workers
    ).train
    if not isinstance(train, StreamedSet):
        raise ValueError(
            f"data: expected imagefolder or webdataset, got {known.data}, which is in memory"
        )
    seconds = time.perf_counter() - started
    side = train.image_shape[1]
    print(f"{known.data}: {len(train)} training images; listing all took {seconds:.1f} s")
    found = measure_loader(train, batch_size=known.batch_size, budget=known.budget)
    print(
        f"arriving    {found.images_per_s:.1f} images/s of {side} x {side}, batches of "
        f"{known.batch_size}, {train.workers} workers, {found.images} images in "
        f"{found.seconds:.1f} s"
    )
    print(
        f"one image   {1000 * found.read:.2f} ms reading, {1000 * found.view:.2f} ms decoding, "
        "cropping and resizing, alone in one process"
    )
    print(f"workers     {found.possible_images_per_s:.1f} images/s if each keeps that pace")
    print(f"bound by    {found.bound}")
    return 0


def _measure(known: argparse.Namespace, cases: list[Case]) -> int:
    from mclfast.bench import draw, report
    from mclfast.bench.run import Outcome, run_case

    about = report.environment()
    settings = {
        "preset": known.preset,
        "op": known.op,
        "mode": known.mode,
        "provider": known.provider,
        "budget": known.budget,
        "memory": not known.no_memory,
    }
    smoke = known.preset == "smoke"
    outcome = Outcome()
    for number, case in enumerate(cases, start=1):
        start = time.perf_counter()
        run_case(
            case,
            outcome,
            wanted=known.provider or (),
            budget=0.2 if smoke else known.budget,
            memory=not (known.no_memory or smoke),
        )
        # Written after every case, so that a long run that is interrupted keeps its results.
        if known.out is not None:
            report.write(known.out, outcome, about, settings)
        spent = time.perf_counter() - start
        print(f"[{number}/{len(cases)}] {case.name} {spent:.1f} s", file=sys.stderr, flush=True)
    _print(outcome, about["threads"])
    if known.out is not None:
        print(f"results   {known.out / 'results.json'}, {known.out / 'results.csv'}")
        if known.plot:
            _announce(draw.draw(outcome.rows, known.out, about))
    return int(any(skip.red for skip in outcome.skipped))


def _print(outcome: Outcome, threads: int) -> None:
    from mclfast.bench import report

    print(report.table(outcome, threads))
    print(report.legend(threads))
    if missing := report.skipped_table(outcome):
        print(f"\n{missing}")


def _announce(files: list[Path]) -> None:
    shown = ", ".join(map(str, files)) or "none: no two sizes of one operation to join"
    print(f"pictures  {shown}")


def _replot(known: argparse.Namespace) -> int:
    from mclfast._base.files import read_json
    from mclfast.bench import draw, report
    from mclfast.bench.run import Outcome

    results = read_json(known.replot, "replot")
    if results.get("schema") != report.SCHEMA:
        raise ValueError(
            f"replot: expected schema {report.SCHEMA} in {known.replot}, "
            f"got {results.get('schema')}"
        )
    _check_results(results, known.replot)
    outcome = Outcome(rows=results["rows"])
    _print(outcome, results["environment"]["threads"])
    folder = known.out or known.replot.parent
    _announce(draw.draw(outcome.rows, folder, results["environment"]))
    return 0


def _check_results(results: dict[str, Any], path: Path) -> None:
    """Raises ValueError where a file of results lacks a value that a table or picture shows."""
    from mclfast._base.schema import MAPPING, TEXT, check_fields, integer, list_of, number, or_none

    check_fields("replot", path, results, {"environment": MAPPING, "rows": list_of(MAPPING, 1)})
    about = {"cpu": TEXT, "threads": integer(1), "gpu": or_none(TEXT)}
    check_fields("replot", path, results["environment"], about)
    value = number(0)
    always = dict.fromkeys(("op", "provider", "mode", "metric", "dtype", "device"), TEXT)
    always |= dict.fromkeys("MLBD", integer(0)) | dict.fromkeys(("p20", "p50", "p80"), value)
    more = {"K": integer(0), "n": integer(0), "bank_dtype": TEXT}
    for place, row in enumerate(results["rows"], start=1):
        times = {"floor": value, "ratio_floor": value} if row.get("metric") == "time" else {}
        shown = {k: value for k in row if k.startswith(("ratio_", "floor_"))}
        shown |= {k: kind for k, kind in more.items() if k in row}
        check_fields("replot", f"row {place} of {path}", row, always | times | shown)
