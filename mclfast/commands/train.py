"""``mclfast train``: trains a cohort, or a lone network, and says what came out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mclfast.commands.settings import dashed, run_settings

HELP = "train a cohort, or a lone network"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-h", "--help", action="store_true", help="show all settings and exit")
    parser.add_argument("--recipe", help="name of a recipe, or a YAML file with settings")
    parser.add_argument("--run-dir", type=Path, help="folder of the run (default: under runs/)")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with an interrupted run")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a run that is already in the folder"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(known: argparse.Namespace, rest: list[str]) -> int:
    from mclfast import recipe
    from mclfast.config import TrainConfig

    values: dict[str, Any] = {}
    if known.resume:
        values = settings_to_resume(known, ("recipe", "run_dir", "overwrite"))
        if "transfer_from" in values:
            raise ValueError(
                f"resume: expected a run of mclfast train in {known.resume}, got one of "
                "mclfast transfer"
            )
    elif known.recipe:
        values = recipe.load(known.recipe)
    values |= run_settings(known, rest, values)
    config = TrainConfig.from_values(values)
    run_dir = known.resume or known.run_dir or default_run_dir(config)
    if not known.resume and not known.overwrite:
        refuse_old_run(run_dir)
    return _train_and_report(
        config, run_dir, replace=not known.resume, progress=not known.no_progress
    )


def settings_to_resume(known: argparse.Namespace, refused: tuple[str, ...]) -> dict[str, Any]:
    """The settings of the run that ``--resume`` names.

    Args:
        known: the arguments of the command.
        refused: those that cannot be given beside it.
    """
    from mclfast import recipe
    from mclfast.train import CONFIG

    for name in refused:
        if getattr(known, name):
            given = name if name == "path" else f"--{dashed(name)}"
            raise ValueError(f"resume: expected no {given} beside --resume, got both")
    if not (known.resume / CONFIG).is_file():
        raise FileNotFoundError(f"resume: expected a run with {CONFIG} in {known.resume}")
    return recipe.load(str(known.resume / CONFIG))


def default_run_dir(config: Any) -> Path:
    """``runs/<data>-<method>-<cohort>-seed<n>``."""
    # A name of another package has a colon, that of a hub a slash.
    cohort = "+".join(config.cohort).replace(":", "-").replace("/", "-")
    return Path("runs") / f"{config.data}-{config.method}-{cohort}-seed{config.seed}"


def refuse_old_run(run_dir: Path) -> None:
    """Raises where there is a run in a folder that a new one is to be written into."""
    from mclfast.train import CONFIG, RESULT

    if (run_dir / CONFIG).exists():
        finished = (run_dir / RESULT).exists()
        remedy = "" if finished else f"--resume {run_dir}, "
        raise ValueError(
            f"run_dir: expected a new folder, got {run_dir} with "
            f"{'a finished' if finished else 'an unfinished'} run; use {remedy}--overwrite or "
            "another --run-dir"
        )


def remove_old_run(run_dir: Path) -> None:
    """Removes what a run writes, so that a new one does not mix with it."""
    from mclfast.export import DESCRIPTION, WEIGHTS
    from mclfast.train import CHECKPOINT, CONFIG, CURVES, METRICS, RESULT

    for name in (CHECKPOINT, RESULT, CURVES, METRICS, CONFIG):
        (run_dir / name).unlink(missing_ok=True)
    for name in (DESCRIPTION, WEIGHTS):
        for path in run_dir.glob(f"peer*/{name}"):
            path.unlink()


def _train_and_report(config: Any, run_dir: Path, *, replace: bool, progress: bool) -> int:
    from mclfast.models import parameter_count
    from mclfast.train import CHECKPOINT, CURVES, METRICS, build

    trainer = build(config, run_dir)
    if replace:
        # Only now: settings that cannot work cost no old run.
        remove_old_run(run_dir)
    d = trainer.data
    print(
        f"{d.name}: {len(d.train)} training and {len(d.test)} test images, {d.num_classes} "
        f"classes, {d.in_channels} x {d.image_size} x {d.image_size}; device {trainer.device}"
    )
    if config.memory == "auto":
        print(f"memory {trainer.memory_reason}")
    try:
        result = trainer.fit(progress=progress)
    except KeyboardInterrupt:
        print(f"\ninterrupted; go on with: mclfast train --resume {run_dir}", file=sys.stderr)
        return 130
    width = max(11, *map(len, config.cohort))
    print(f"peer  {'network':<{width}} parameters  test accuracy (own classifier, last epoch)")
    for i, (name, peer) in enumerate(zip(config.cohort, trainer.cohort.peers, strict=True)):
        count = parameter_count(peer.backbone)
        print(f"{i:<5} {name:<{width}} {count:>10,}  {result.peers[i]:.2f} %")
    if len(result.peers) > 1:
        print(f"mean of peers {sum(result.peers) / len(result.peers):.2f} %, ", end="")
        print(f"ensemble {result.ensemble:.2f} %")
    print(
        f"published protocol (best of all heads and epochs on the test set): "
        f"{result.published_protocol:.2f} %"
    )
    if not trainer.method.supervised:
        print(
            "labels were not used in training: the classifiers are class means of features; "
            f"for a trained one: mclfast linear {run_dir / 'peer0'}"
        )
    if summary := _throughput(result.history[-1]):
        print(summary)
    print(f"curves      {run_dir / CURVES}")
    print(f"metrics     {run_dir / METRICS}")
    print(f"checkpoint  {run_dir / CHECKPOINT}")
    print("backbones   " + ", ".join(str(run_dir / f"peer{i}") for i in range(len(result.peers))))
    return 0


def _throughput(row: Mapping[str, float]) -> str:
    """Loader and steps of an epoch side by side; empty for a set in memory."""
    if "data_images_per_s" not in row:
        return ""
    wait, steps = row["data_wait_seconds"], row["step_seconds"]
    return (
        f"last epoch  data {row['data_images_per_s']:.1f} images/s, "
        f"steps {row['step_images_per_s']:.1f} images/s; "
        f"waited {wait:.1f} s for data beside {steps:.1f} s of steps"
    )
