"""The folder of a run: which files lie in it, who writes them when, and reading them back.

Beside them, ``peer0``, ``peer1``, ... are exported backbones, see :mod:`mclfast.train.export`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mclfast import env
from mclfast._base.files import (
    digest_of_bytes,
    read_json,
    read_yaml,
    write_json,
    write_sealed_json,
    write_text,
)
from mclfast._base.optional import optional_import
from mclfast._base.schema import check_fields, list_of, number
from mclfast.train import checkpoint, plots
from mclfast.train.evidence import EVIDENCE
from mclfast.train.export import DESCRIPTION, WEIGHTS
from mclfast.train.history import RunResult, check_history, read_csv, result_of, write_csv

#: Written before the first epoch.
CONFIG, ENVIRONMENT = "config.yaml", "environment.json"
#: Written after every epoch.
CHECKPOINT, METRICS = "checkpoint.pt", "metrics.csv"
#: Written after the last epoch.
RESULT, CURVES = "result.json", "curves.png"

#: Key of the result: digest of the records that it was written with.
_METRICS_DIGEST = "metrics_blake2b"
_ACCURACY = number(0, 100)
_RESULT = {
    "peers": list_of(_ACCURACY, 1),
    "ensemble": _ACCURACY,
    "published_protocol": _ACCURACY,
    "seconds": number(0),
}


def require_packages() -> None:
    """Raises ImportError where a package is missing that writes the files of a run.

    Backbones and curves are written after the last epoch, which is late to learn of it.
    """
    for name in ("yaml", "safetensors", "matplotlib"):
        optional_import(name, extra="train")


def write_start(folder: Path, settings: Mapping[str, Any], memory: Mapping[str, str]) -> None:
    """Writes what is known before the first step: settings and environment.

    Raises:
        ImportError: a package is missing that the run needs now or after its last epoch.
    """
    require_packages()
    yaml = optional_import("yaml", extra="train")
    write_text(folder / CONFIG, yaml.safe_dump(settings, sort_keys=False))
    write_json(folder / ENVIRONMENT, env.report_dict() | {"memory": memory})


def write_epoch(
    folder: Path, history: Sequence[Mapping[str, float]], state: dict[str, Any]
) -> None:
    """Writes the records of all epochs so far, then the checkpoint."""
    write_csv(folder / METRICS, history)
    checkpoint.save(folder / CHECKPOINT, state)


def write_result(folder: Path, result: RunResult, names: Sequence[str], title: str) -> None:
    """Writes what a finished run reached, and draws its curves.

    Args:
        folder: the run folder.
        result: accuracies at the last epoch.
        names: names of the peers.
        title: heading of the curves.
    """
    # Again, so that the digest is that of these records.
    write_csv(folder / METRICS, result.history)
    write_sealed_json(
        folder / RESULT,
        {
            "peers": result.peers,
            "ensemble": result.ensemble,
            "published_protocol": result.published_protocol,
            "seconds": round(result.seconds, 2),
            _METRICS_DIGEST: digest_of_bytes((folder / METRICS).read_bytes()),
        },
    )
    plots.run_curves(result.history, names, folder / CURVES, title)
    # A finished run needs no second checkpoint to go on from.
    checkpoint.previous_of(folder / CHECKPOINT).unlink(missing_ok=True)


def read_settings(folder: Path, argument: str) -> dict[str, Any]:
    """The settings of the run in a folder.

    Args:
        folder: the run folder.
        argument: name of the argument that gave the folder, for errors.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: its settings cannot be read.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{argument}: expected a run with {CONFIG} in {folder}")
    return read_yaml(folder / CONFIG, argument)


def read_result(folder: Path) -> RunResult:
    """The result of the finished run in a folder.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or the files are not those of
            one run.
    """
    values = read_json(folder / RESULT, "run")
    check_fields("run", folder / RESULT, values, _RESULT)
    history = read_csv(folder / METRICS)
    digest = values.get(_METRICS_DIGEST)
    if digest is not None and digest != digest_of_bytes((folder / METRICS).read_bytes()):
        raise ValueError(
            f"run: expected {folder / METRICS} as it was written, got other content than "
            f"{_METRICS_DIGEST} in {RESULT} says"
        )
    if not history:
        raise ValueError(f"run: expected records in {folder / METRICS}, got none")
    peers = tuple(values["peers"])
    recorded = sum(name.startswith("acc_peer") for name in history[0])
    if recorded != len(peers):
        raise ValueError(
            f"run: expected {recorded} peers in {folder / RESULT} as in {METRICS}, got {len(peers)}"
        )
    check_history("run", folder / METRICS, history, len(peers))
    last = result_of(history, len(peers))
    for name in ("peers", "ensemble", "published_protocol"):
        told, wanted = values[name], getattr(last, name)
        if told != (list(wanted) if name == "peers" else wanted):
            raise ValueError(
                f"run: expected {name} {wanted} in {folder / RESULT} as in the last record of "
                f"{METRICS}, got {told}"
            )
    return RunResult(
        peers=peers,
        ensemble=values["ensemble"],
        published_protocol=values["published_protocol"],
        seconds=values["seconds"],
        history=history,
    )


def resumable(folder: Path) -> bool:
    """Whether a run has a checkpoint to go on from; if it has none, whether it may start anew.

    Raises:
        ValueError: there is no checkpoint, and epochs were trained, which a new start would lose.
    """
    if checkpoint.exists(folder / CHECKPOINT):
        return True
    # The metrics of the first epoch are written just before its checkpoint.
    epochs = len(read_csv(folder / METRICS)) if (folder / METRICS).is_file() else 0
    if epochs > 1 or (folder / RESULT).exists():
        raise ValueError(
            f"resume: expected {CHECKPOINT} in {folder}, where {epochs} epochs were trained, found "
            "none; train anew with --run-dir and --overwrite"
        )
    return False


def refuse_old_run(folder: Path) -> None:
    """Raises ValueError where there is a run in a folder that a new one is to be written into."""
    if (folder / CONFIG).exists():
        finished = (folder / RESULT).exists()
        remedy = "" if finished else f"--resume {folder}, "
        raise ValueError(
            f"run_dir: expected a new folder, got {folder} with "
            f"{'a finished' if finished else 'an unfinished'} run; use {remedy}--overwrite or "
            "another --run-dir"
        )


def remove_old_run(folder: Path) -> None:
    """Removes what a run writes, so that a new one does not mix with it."""
    files = [folder / name for name in (RESULT, CURVES, METRICS, CONFIG)]
    states = (*checkpoint.all_of(folder / CHECKPOINT), *checkpoint.all_of(folder / EVIDENCE))
    for path in (*states, *files):
        path.unlink(missing_ok=True)
    for name in (DESCRIPTION, WEIGHTS):
        for path in folder.glob(f"peer*/{name}"):
            path.unlink()
