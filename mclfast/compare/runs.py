"""The runs of a comparison: which of them are finished, and training the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from mclfast._base.checks import shortened
from mclfast._base.files import read_json, read_yaml
from mclfast._base.schema import MAPPING, TEXT, check_fields, integer, list_of, or_none
from mclfast.compare.design import Design
from mclfast.compare.one_run import COST, FAILURE, perform
from mclfast.config import TrainConfig
from mclfast.train.export import DESCRIPTION
from mclfast.train.folder import CHECKPOINT, CONFIG, ENVIRONMENT, RESULT, read_result
from mclfast.train.history import RunResult, evaluated
from mclfast.train.state import differences


@dataclass(frozen=True, eq=False)
class Run:
    """One entry of the design with one seed; a run equals only itself.

    Attributes:
        label: label of the entry.
        seed: seed of the run.
        config: settings of the run.
        folder: folder that the run is written into.
    """

    label: str
    seed: int
    config: TrainConfig
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether the folder holds the result and all exports, which are written after it.

        If the checkpoint is gone, the exports could not be made, and the result is enough.
        """
        if not (self.folder / RESULT).is_file():
            return False
        exports = (self.folder / f"peer{i}" / DESCRIPTION for i in range(len(self.config.cohort)))
        return not (self.folder / CHECKPOINT).is_file() or all(e.is_file() for e in exports)


class Finished(NamedTuple):
    """A finished run with its results.

    Attributes:
        run: the run.
        result: accuracies, time and history.
        cost: content of ``cost.json``; empty if the run was interrupted just before writing it.
        environment: content of ``environment.json``.
    """

    run: Run
    result: RunResult
    cost: dict[str, Any]
    environment: dict[str, Any]


def runs_of(design: Design, folder: Path) -> list[Run]:
    """All runs, seed by seed, so that every entry has run once before any runs twice.

    Args:
        design: entries and seeds.
        folder: folder of the comparison.
    """
    return [
        Run(label, seed, replace(config, seed=seed), folder / label / f"seed{seed}")
        for seed in design.seeds
        for label, config in design.configs.items()
    ]


def others_in(folder: Path, runs: Sequence[Run]) -> list[str]:
    """Finished runs in a comparison's folder that do not belong to it, as "label/seed0".

    Args:
        folder: folder of the comparison.
        runs: runs of the comparison.
    """
    own = {run.folder for run in runs}
    found = (result.parent for result in folder.glob(f"*/seed*/{RESULT}"))
    return sorted(f"{run.parent.name}/{run.name}" for run in found if run not in own)


def changed(runs: Sequence[Run], *, overwrite: bool) -> tuple[set[Path], dict[Run, str]]:
    """Folders that hold an earlier run with other settings, and runs whose settings are lost.

    Args:
        runs: runs of the comparison.
        overwrite: whether such runs may be replaced.

    Returns:
        The folders to replace, and the reasons of runs that can be neither gone on with nor shown,
        as their folder holds settings that cannot be read.

    Raises:
        ValueError: there are runs with other settings, and ``overwrite`` is false.
    """
    found, lost = set(), {}
    for run in runs:
        if not (run.folder / CONFIG).is_file():
            continue
        try:
            before, now = read_yaml(run.folder / CONFIG, "out"), run.config.to_values()
        except (OSError, ValueError) as error:
            if overwrite:
                found.add(run.folder)
            else:
                lost[run] = f"{error}; remove that folder, or use --overwrite, to train it again"
            continue
        for name, *values in differences(before, now):
            if not overwrite:
                old, new = (shortened(repr(value), 60) for value in values)
                raise ValueError(
                    f"{name}: expected {old} as in the run in {run.folder}, got {new}; use "
                    "--overwrite to replace runs with other settings, or another --out"
                )
            found.add(run.folder)
    return found, lost


def execute(
    runs: Sequence[Run], *, jobs: int, replaced: set[Path], progress: bool
) -> Iterator[tuple[Run, str | None]]:
    """Trains the runs, in order.

    Args:
        runs: runs that are not finished, or are to be replaced.
        jobs: number of runs at a time, each in its own process; 0 to run one after the other in
            this process, which cannot measure the peak memory of one run.
        replaced: folders whose present run is removed first.
        progress: whether to show a progress bar.

    Yields:
        Each run when it has ended, with the reason if it failed, else None.
    """
    if jobs == 0:
        for run in runs:
            yield (
                run,
                perform(
                    run.config.to_values(),
                    run.folder,
                    replace=run.folder in replaced,
                    progress=progress,
                    alone=False,
                ),
            )
        return
    waiting, going = list(runs), dict[subprocess.Popen[str], Run]()
    try:
        while waiting or going:
            while waiting and len(going) < jobs:
                run = waiting.pop(0)
                # Bars of several runs at a time would overwrite one another.
                bar = progress and jobs == 1
                going[_start(run, jobs, run.folder in replaced, bar)] = run
            ended = [process for process in going if process.poll() is not None]
            if not ended:
                time.sleep(0.05)
            for process in ended:
                yield (run := going.pop(process)), _failure(run, process)
    finally:
        for process in going:
            # The process exits when its stdin is closed.
            _tell(process, last=True)
            process.wait()


def _start(run: Run, jobs: int, replaced: bool, progress: bool) -> subprocess.Popen[str]:
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # Without a limit, each process would use all cores, and they would slow one another down.
    environment = {"OMP_NUM_THREADS": str(threads)} if jobs > 1 else {}
    process = subprocess.Popen(
        [sys.executable, "-m", "mclfast.compare.one_run"],
        stdin=subprocess.PIPE,
        text=True,
        env={**environment, **os.environ},
        # Ctrl-C then reaches this process only, which ends the others.
        start_new_session=True,
    )
    task = {
        "values": run.config.to_values(),
        "folder": str(run.folder),
        "replace": replaced,
        "progress": progress,
    }
    # The reason of an earlier attempt must not be taken for that of a process that dies at once. If
    # it cannot be removed, the process cannot write to the folder either, and reports that.
    with suppress(OSError):
        (run.folder / FAILURE).unlink(missing_ok=True)
    _tell(process, json.dumps(task) + "\n")
    return process


def _tell(process: subprocess.Popen[str], text: str = "", *, last: bool = False) -> None:
    assert process.stdin is not None
    # A process that is gone is dealt with when its exit status is read.
    with suppress(BrokenPipeError):
        process.stdin.write(text)
        process.stdin.close() if last else process.stdin.flush()


def _failure(run: Run, process: subprocess.Popen[str]) -> str | None:
    _tell(process, last=True)
    status = process.returncode
    if status == 0:
        return None
    if (run.folder / FAILURE).is_file():
        return (run.folder / FAILURE).read_text(encoding="utf-8").partition("\n")[0]
    if status < 0:
        return f"the process was ended by signal {-status}, perhaps for lack of memory"
    return f"the process left with status {status}, and no reason in {run.folder}"


def load(run: Run) -> Finished:
    """Reads a finished run from its folder.

    Args:
        run: run that is finished.

    Raises:
        ValueError: a file is missing or damaged; the text begins with ``out``.
    """
    try:
        result = read_result(run.folder)
        _check_fits(run, result)
        return Finished(run, result, _read_cost(run), _read_environment(run))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"out: expected the files of a finished run in {run.folder}, got: {error}; remove "
            "that folder to train it again"
        ) from None


def _check_fits(run: Run, result: RunResult) -> None:
    """Raises ValueError if a result is not that of a run with these networks and epochs."""
    config = run.config
    every = config.eval_every
    evaluations = {n for n in range(1, config.epochs + 1) if n % every == 0} | {config.epochs}
    for name, wanted, got in (
        ("peers", len(config.cohort), len(result.peers)),
        ("epochs", config.epochs, len(result.history)),
        ("evaluated epochs", len(evaluations), len(evaluated(result.history))),
    ):
        if got != wanted:
            raise ValueError(f"run: expected {wanted} {name}, got {got}")


_COUNT = integer(0)
_COST = {
    "device": TEXT,
    "threads": integer(1),
    "peak_memory_bytes": or_none(_COUNT),
    "parameters": list_of(_COUNT, 1),
    "parameters_in_training": _COUNT,
}


def _read_cost(run: Run) -> dict[str, Any]:
    path = run.folder / COST
    if not path.is_file():
        return {}
    cost = read_json(path, "run")
    check_fields("run", path, cost, _COST)
    if len(cost["parameters"]) != len(run.config.cohort):
        raise ValueError(
            f"run: expected {len(run.config.cohort)} numbers of parameters in {path}, got "
            f"{len(cost['parameters'])}"
        )
    return cost


def _read_environment(run: Run) -> dict[str, Any]:
    path = run.folder / ENVIRONMENT
    environment = read_json(path, "run")
    check_fields("run", path, environment, {"mclfast": MAPPING, "torch": MAPPING})
    check_fields("run", path, environment["mclfast"], {"version": TEXT, "git": or_none(TEXT)})
    check_fields("run", path, environment["torch"], {"version": TEXT})
    return environment
