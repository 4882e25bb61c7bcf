"""``mclfast compare``: trains several methods with several seeds and reports them side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mclfast.commands.parser import OneLineParser
from mclfast.commands.settings import add_settings, dashed, value_too_many

if TYPE_CHECKING:
    from mclfast.compare.plan import Plan
    from mclfast.compare.runner import Run

HELP = "train several methods with several seeds and report them side by side"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``mclfast compare`` but the settings, which come last."""
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="show all settings and exit")
    add("--methods", metavar="A,B,...", help="methods, or entries of the plan file, in order")
    add("--seeds", metavar="N", help="number of seeds, or seeds separated by commas (default: 3)")
    add("--recipe", metavar="NAME",
        help="recipe, or YAML file with settings, that give the defaults of all methods; those of "
        "the recipe's own method are for that method")
    add("--plan", type=Path, metavar="FILE",
        help="YAML file with methods (each with settings of its own, topology and cohort "
        "included), defaults and seeds; plan.yaml of a comparison is one")
    add("--set", action="append", default=[], metavar="METHOD.SETTING=X",
        help="a setting of one method, before those of all; repeatable")
    add("--out", type=Path, metavar="DIR",
        help="folder of runs and report (default: under runs/); what is finished there is not "
        "repeated, what is not goes on")
    add("--overwrite", action="store_true",
        help="replace runs in the folder that were made with other settings")
    add("--jobs", type=int, default=1, metavar="N",
        help="runs at a time, each in a process of its own; 0 for all in this process, without "
        "peak memory on a CPU (default: 1)")
    add("--no-progress", action="store_true", help="no progress bars")


def run(known: argparse.Namespace, rest: list[str]) -> int:
    """Runs the command.

    Returns:
        1 if a run failed, else 0.
    """
    from mclfast import recipe

    defaults = recipe.load(known.recipe) if known.recipe else {}
    settings = _settings(known, rest, defaults)

    from mclfast.compare.plan import make_plan, write_plan
    from mclfast.compare.runner import changed, runs_of

    if known.jobs < 0:
        raise ValueError(f"jobs: expected a value >= 0, got {known.jobs}")
    plan = make_plan(known.plan, known.methods, known.seeds, settings, known.set, defaults)
    folder = known.out or _default_folder(plan)
    runs = runs_of(plan, folder)
    replaced = changed(runs, overwrite=known.overwrite)
    write_plan(folder / "plan.yaml", plan, known.command_line)
    try:
        failed = _execute(known, runs, replaced)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return _report(folder, plan, runs, failed, known.command_line)


def _settings(
    known: argparse.Namespace, rest: list[str], defaults: dict[str, Any]
) -> dict[str, Any]:
    """The settings of all methods given on the command line; ``defaults`` are shown in the help."""
    from mclfast._settings import field_types
    from mclfast.config import TrainConfig

    parser = OneLineParser(
        prog="mclfast compare", add_help=False, parents=[known.parser], allow_abbrev=False,
        conflict_handler="resolve", description=known.parser.description,
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    own = ("method", "seed")
    add_settings(parser, "settings of all methods", TrainConfig, defaults, leave_out=own)
    if known.help:
        parser.print_help()
        parser.exit(0)
    given, unknown = parser.parse_known_args(rest)
    types = field_types(TrainConfig)
    if unknown:
        raise _not_understood(rest, unknown, types)
    return {name: value for name, value in vars(given).items() if name in types}


def _not_understood(rest: list[str], unknown: list[str], types: dict[str, Any]) -> ValueError:
    from mclfast._checks import unknown_name
    from mclfast._settings import field_types
    from mclfast.methods import available, method_class

    flags = [a.removeprefix("--").partition("=")[0] for a in unknown if a.startswith("--")]
    if not flags:
        return value_too_many(rest, unknown, types)
    flag, name = flags[0], flags[0].replace("-", "_")
    if name in ("method", "seed"):
        return ValueError(f"{name}: expected --{name}s in a comparison, got --{name}")
    owners = [m for m in available() if name in field_types(method_class(m).Options)]
    if owners:
        return ValueError(
            f"{flag}: expected a setting of all methods, got one of method "
            f"{' or '.join(owners)}; use --set {owners[0]}.{name}=X"
        )
    return unknown_name("setting", flag, map(dashed, types.keys() - {"method", "seed"}))


def _default_folder(plan: Plan) -> Path:
    """``runs/compare-<data>-<cohort>``, of the first entry."""
    config = next(iter(plan.configs.values()))
    return Path("runs") / f"compare-{config.data}-{'+'.join(config.cohort)}"


def _execute(
    known: argparse.Namespace, runs: list[Run], replaced: set[Path]
) -> dict[Run, str]:
    """Does what is not done yet; returns the failed runs with the reasons."""
    from mclfast.compare.runner import execute, load

    open_ = [run for run in runs if not run.finished or run.folder in replaced]
    if len(open_) < len(runs):
        print(f"{len(runs) - len(open_)} of {len(runs)} runs are finished already", flush=True)
    failed: list[tuple[Run, str]] = []
    ended = execute(
        open_, jobs=known.jobs, replaced=replaced, progress=not known.no_progress
    )
    for number, (run, reason) in enumerate(ended, start=1):
        head = f"[{number}/{len(open_)}] {run.label}, seed {run.seed}: "
        if reason is None:
            result = load(run).result
            reached = sum(result.peers) / len(result.peers)
            print(f"{head}mean of peers {reached:.2f} %, {result.seconds:.1f} s", flush=True)
        else:
            failed.append((run, reason))
            print(f"{head}failed: {reason}", flush=True)
    return dict(failed)


def _report(
    folder: Path, plan: Plan, runs: list[Run], failed: dict[Run, str], command: str
) -> int:
    from mclfast.compare import report
    from mclfast.compare.runner import load

    finished = [load(run) for run in runs if run not in failed]
    if not finished:
        print("no run finished: nothing to report", file=sys.stderr)
        return 1
    made = report.write_report(folder, plan, finished, failed, command)
    for table in made.tables:
        print(f"\n{table.title}\n{report.text(table)}")
    print(f"\nreport    {folder / report.REPORT}, {folder / report.PAGE}")
    print(f"pictures  {folder / report.ACCURACY}, {folder / report.CURVES}")
    print(f"tables    {folder / report.TABLE}, {folder / report.SUMMARY}")
    return 1 if failed else 0
