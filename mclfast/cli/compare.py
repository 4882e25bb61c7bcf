"""``mclfast compare``: trains several methods with several seeds and reports them side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mclfast.cli.options import check_folder, cohort_name
from mclfast.cli.settings import an_integer, dashed, given_settings

if TYPE_CHECKING:
    from mclfast.compare.design import Design
    from mclfast.compare.runs import Finished, Run

HELP = "train several methods with several seeds and report them side by side"

# Settings that differ between the runs of a comparison.
_OF_EACH_RUN = {"method", "seed"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``mclfast compare`` except the settings of all methods."""
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="show all settings and exit")
    add(
        "--methods",
        metavar="A,B,...",
        help="methods to compare, or entries of the plan file, in the order of the report",
    )
    add(
        "--seeds",
        metavar="N",
        help="number of seeds, or the seeds separated by commas (default: 3)",
    )
    add(
        "--recipe",
        metavar="NAME",
        help="recipe, or YAML file with settings: defaults of all methods; options of the "
        "recipe's own method apply to that method only",
    )
    add(
        "--plan",
        type=Path,
        metavar="FILE",
        help="YAML file with methods (each with its own settings, such as cohort and topology), "
        "defaults and seeds; every comparison writes one as plan.yaml",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="METHOD.SETTING=X",
        help="setting of one method, which replaces that of all methods; repeatable",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of runs and report (default: under runs/); finished runs in it are kept, "
        "unfinished ones are continued",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace runs in the folder that were made with other settings",
    )
    add(
        "--jobs",
        type=an_integer,
        default=1,
        metavar="N",
        help="number of runs at a time, each in its own process; 0 to run all in this process, "
        "which cannot measure peak memory on a CPU (default: 1)",
    )
    add("--no-progress", action="store_true", help="no progress bars")


def run(known: argparse.Namespace, rest: list[str]) -> int:
    """Runs the command.

    Returns:
        1 if a run failed, 128 and the number of the signal if it was interrupted, else 0.
    """
    from mclfast import recipe

    defaults = recipe.load(known.recipe) if known.recipe else {}
    settings = _settings(known, rest, defaults)

    from mclfast.compare.design import make_design
    from mclfast.train.folder import require_packages
    from mclfast.train.lock import hold

    require_packages()
    if known.jobs < 0:
        raise ValueError(f"jobs: expected a value >= 0, got {known.jobs}")
    design = make_design(known.plan, known.methods, known.seeds, settings, known.set, defaults)
    folder = known.out or _default_folder(design)
    check_folder("out", folder)
    with hold(folder, "out"):
        return _compare(known, design, folder)


def _compare(known: argparse.Namespace, design: Design, folder: Path) -> int:
    """Runs what is not finished in a locked folder, and reports; gives the exit status."""
    from mclfast._base.checks import shortened
    from mclfast.compare.design import write_design
    from mclfast.compare.runs import changed, others_in, runs_of
    from mclfast.train.signals import described, heeded, status_of

    runs = runs_of(design, folder)
    replaced, lost = changed(runs, overwrite=known.overwrite)
    if others := others_in(folder, runs):
        names = shortened(", ".join(others), 200)
        print(f"not of this comparison, and not in its report: {names}", flush=True)
    write_design(folder / "plan.yaml", design, known.command_line)
    try:
        with heeded(_leave):
            failed = _execute(known, runs, replaced, lost)
    except KeyboardInterrupt as error:
        print(f"\n{described(error)}; the same command goes on from here", file=sys.stderr)
        return status_of(error)
    return _report(folder, design, runs, failed, known.command_line)


def _leave() -> None:
    """Ends the wait for the processes of the runs, which save when they are told to end."""
    raise KeyboardInterrupt


def _settings(
    known: argparse.Namespace, rest: list[str], defaults: dict[str, Any]
) -> dict[str, Any]:
    """Reads the settings of all methods from the command line.

    Args:
        known: arguments of the command that are parsed already.
        rest: arguments that are not parsed yet.
        defaults: settings of the recipe, shown as defaults in the help.
    """
    from mclfast.config import TrainConfig

    return given_settings(
        known,
        rest,
        {"settings of all methods": TrainConfig},
        defaults,
        unknown_flag=_unknown_flag,
        leave_out=_OF_EACH_RUN,
    )


def _unknown_flag(flag: str) -> ValueError:
    from mclfast._base.checks import unknown_name
    from mclfast._base.settings import field_types
    from mclfast.config import TrainConfig
    from mclfast.methods import available, method_class

    name = flag.replace("-", "_")
    if name in _OF_EACH_RUN:
        return ValueError(f"{name}: expected --{name}s in a comparison, got --{name}")
    owners = [m for m in available() if name in field_types(method_class(m).Options)]
    if owners:
        return ValueError(
            f"{flag}: expected a setting of all methods, got one of method "
            f"{' or '.join(owners)}; use --set {owners[0]}.{name}=X"
        )
    known = field_types(TrainConfig).keys() - _OF_EACH_RUN
    return unknown_name("setting", flag, map(dashed, known))


def _default_folder(design: Design) -> Path:
    """``runs/compare-<data>-<cohort>``, with data and cohort of the first entry."""
    config = next(iter(design.configs.values()))
    return Path("runs") / f"compare-{config.data}-{cohort_name(config.cohort)}"


def _execute(
    known: argparse.Namespace, runs: list[Run], replaced: set[Path], lost: dict[Run, str]
) -> dict[Run, str]:
    """Trains all runs that are not finished.

    Args:
        known: arguments of the command.
        runs: all runs of the comparison.
        replaced: folders whose present runs are replaced.
        lost: runs that are left out, with the reasons.

    Returns:
        The reasons of the runs that failed, those that are left out among them.
    """
    from mclfast.compare.runs import execute

    for run, why in lost.items():
        print(f"{run.label}, seed {run.seed}: left out: {why}", flush=True)
    kept = [run for run in runs if run not in lost]
    open_ = [run for run in kept if not run.finished or run.folder in replaced]
    if len(open_) < len(kept):
        print(f"{len(kept) - len(open_)} of {len(runs)} runs are finished already", flush=True)
    failed = dict(lost)
    ended = execute(open_, jobs=known.jobs, replaced=replaced, progress=not known.no_progress)
    for number, (run, reason) in enumerate(ended, start=1):
        head = f"[{number}/{len(open_)}] {run.label}, seed {run.seed}: "
        if reason is not None:
            failed[run] = reason
        elif found := _loaded(run, failed):
            result = found.result
            reached = sum(result.peers) / len(result.peers)
            print(f"{head}mean of peers {reached:.2f} %, {result.seconds:.1f} s", flush=True)
        if run in failed:
            print(f"{head}failed: {failed[run]}", flush=True)
    return failed


def _loaded(run: Run, failed: dict[Run, str]) -> Finished | None:
    """Reads a finished run; None if it cannot be read, with the reason added to ``failed``."""
    from mclfast.compare.runs import load

    try:
        return load(run)
    except ValueError as error:
        failed[run] = str(error)
        return None


def _report(
    folder: Path, design: Design, runs: list[Run], failed: dict[Run, str], command: str
) -> int:
    from mclfast.compare import report

    left = (_loaded(run, failed) for run in runs if run not in failed)
    finished = [found for found in left if found]
    if not finished:
        print("no run finished: nothing to report", file=sys.stderr)
        return 1
    made = report.write_report(folder, design, finished, failed, command)
    for table in made.tables:
        print(f"\n{table.title}\n{report.text(table)}")
    print(f"\nreport    {folder / report.REPORT}, {folder / report.PAGE}")
    print(f"pictures  {folder / report.ACCURACY}, {folder / report.CURVES}")
    print(f"tables    {folder / report.TABLE}, {folder / report.SUMMARY}")
    return 1 if failed else 0
