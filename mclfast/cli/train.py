"""``mclfast train``: trains a cohort, or a lone network, and prints the accuracies."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mclfast.cli.options import (
    add_run_options,
    cohort_name,
    fit,
    run_folder_of,
    run_name,
    settings_to_resume,
)
from mclfast.cli.settings import run_settings

if TYPE_CHECKING:
    from mclfast.config import TrainConfig
    from mclfast.train.history import RunResult
    from mclfast.train.trainer import Trainer

HELP = "train a cohort, or a lone network"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``mclfast train`` except the settings, which depend on the method."""
    parser.add_argument("-h", "--help", action="store_true", help="show all settings and exit")
    parser.add_argument(
        "--recipe", metavar="NAME", help="name of a recipe, or a YAML file with settings"
    )
    add_run_options(parser, resume_help="folder of an interrupted run to continue")


def run(known: argparse.Namespace, rest: list[str]) -> int:
    """Runs the command.

    Returns:
        128 and the number of the signal if the run was interrupted, else 0.
    """
    from mclfast import recipe
    from mclfast.config import TrainConfig
    from mclfast.train.builder import build
    from mclfast.train.folder import remove_old_run, require_packages

    values: dict[str, Any] = {}
    if known.resume:
        values = settings_to_resume(known, ("recipe",))
        if "transfer_from" in values:
            raise ValueError(
                f"resume: expected a run of mclfast train in {known.resume}, got one of "
                "mclfast transfer"
            )
    elif known.recipe:
        values = recipe.load(known.recipe)
    given = run_settings(known, rest, values)
    config = TrainConfig.from_values(values | given)
    with run_folder_of(known, default_name(config, values, known.recipe)) as run_dir:
        # Before an old run is removed, and before data and networks are made.
        require_packages()
        trainer = build(config, run_dir)
        if not known.resume:
            # Removed only now, so that settings that cannot work cost no old run.
            remove_old_run(run_dir)
        _say_what_is_trained(trainer)
        result = fit(known, trainer)
        if isinstance(result, int):
            return result
        _report(trainer, result, run_dir)
    return 0


def default_name(
    config: TrainConfig, base: Mapping[str, Any] | None = None, recipe: str | None = None
) -> str:
    """The folder's name of a run, ``<data>-<method>-<cohort>-seed<n>``, and what is unusual.

    Args:
        config: settings of the run.
        base: settings of the recipe, which its name stands for.
        recipe: name or file of the recipe.
    """
    kept = {name: value for name, value in (base or {}).items() if name in config.to_values()}
    usual = type(config).from_values(kept | {"method": config.method})
    parts = [config.data, config.method, cohort_name(config.cohort), f"seed{config.seed}"]
    if recipe:
        parts.append(Path(recipe).stem)
    told = ("data", "method", "cohort", "seed")
    return run_name(config, usual.to_values(), *parts, leave_out=told)


def _say_what_is_trained(trainer: Trainer) -> None:
    d = trainer.data
    print(
        f"{d.name}: {len(d.train)} training and {len(d.test)} test images, {d.num_classes} "
        f"classes, {d.in_channels} x {d.image_size} x {d.image_size}; device {trainer.device}"
    )
    if trainer.config.memory == "auto":
        print(f"memory {trainer.memory_reason}")


def _report(trainer: Trainer, result: RunResult, run_dir: Path) -> None:
    from mclfast.models import parameter_count
    from mclfast.train.folder import CHECKPOINT, CURVES, METRICS

    names = trainer.names
    width = max(11, *map(len, names))
    print(f"peer  {'network':<{width}} parameters  test accuracy (own classifier, last epoch)")
    for i, (name, peer) in enumerate(zip(names, trainer.cohort.peers, strict=True)):
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
            f"for a trained one: mclfast transfer {run_dir / 'peer0'} --published"
        )
    if summary := _throughput(result.history[-1]):
        print(summary)
    print(f"curves      {run_dir / CURVES}")
    print(f"metrics     {run_dir / METRICS}")
    print(f"checkpoint  {run_dir / CHECKPOINT}")
    print("backbones   " + ", ".join(str(run_dir / f"peer{i}") for i in range(len(result.peers))))


def _throughput(row: Mapping[str, float]) -> str:
    """Speed of the steps of an epoch, and the time spent waiting; empty for a set in memory."""
    if "data_wait_seconds" not in row:
        return ""
    wait, steps = row["data_wait_seconds"], row["step_seconds"]
    return (
        f"last epoch  steps {row['step_images_per_s']:.1f} images/s; "
        f"waited {wait:.1f} s for data beside {steps:.1f} s of steps"
    )
