"""``mclfast transfer``: an exported backbone on another data set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mclfast.cli.options import (
    add_run_options,
    cohort_name,
    fit,
    one_export_in,
    run_folder_of,
    settings_to_resume,
)
from mclfast.cli.settings import dashed, shown, value_shape

HELP = "fine-tune an exported backbone on another data set, or train a linear classifier on it"

_SETTINGS = (
    "data",
    "data_root",
    "image_size",
    "workers",
    "train_per_class",
    "seed",
    "epochs",
    "batch_size",
    "augment",
    "lr",
    "momentum",
    "nesterov",
    "weight_decay",
    "schedule",
    "milestones",
    "lr_decay",
    "warmup_epochs",
    "clip_grad_norm",
    "amp",
    "eval_every",
    "eval_batch_size",
    "device",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        type=Path,
        nargs="?",
        help="folder of an exported backbone, such as RUN/peer0; not with --resume",
    )
    parser.add_argument(
        "--mode",
        metavar="{linear,finetune}",
        help="linear: only a new classifier learns; finetune: all weights do (default: linear)",
    )
    add_run_options(
        parser,
        resume_help="go on with an interrupted run; the backbone it began with must still be there",
    )
    _add_settings(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    from mclfast._base.settings import field_types
    from mclfast.config import TrainConfig, field_help
    from mclfast.train.transfer import DEFAULTS, default_settings

    meaning, kinds = field_help(TrainConfig), field_types(TrainConfig)
    usual = {mode: TrainConfig.from_values(default_settings(mode)) for mode in DEFAULTS}
    group = parser.add_argument_group("settings")
    for name in _SETTINGS:
        values = {mode: shown(getattr(config, name)) for mode, config in usual.items()}
        default = ", ".join(f"{value} for {mode}" for mode, value in values.items())
        if len(set(values.values())) == 1:
            default = values["linear"]
        text = f"{meaning[name]} (default: {default})"
        if name == "data":
            text = "data set to transfer to, which must be named"
        group.add_argument(
            f"--{dashed(name)}",
            metavar=value_shape(name, kinds[name]),
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
        )


def run(known: argparse.Namespace, _: list[str]) -> int:
    from mclfast.train.folder import CURVES, METRICS, remove_old_run
    from mclfast.train.transfer import build_transfer, transfer_config

    path, mode, values = _what(known)
    values |= {name: getattr(known, name) for name in _SETTINGS if name in known}
    config = transfer_config(path, mode, values)
    name = f"{config.data}-{mode}-{cohort_name(config.cohort)}-seed{config.seed}"
    run_dir = run_folder_of(known, name)
    trainer = build_transfer(path, mode, config, run_dir)
    if not known.resume:
        remove_old_run(run_dir)
    data = trainer.data
    print(
        f"{data.name}: {len(data.train)} training and {len(data.test)} test images, "
        f"{data.num_classes} classes; device {trainer.device}"
    )
    result = fit(known, trainer)
    if result is None:
        return 130
    print(
        f"{config.cohort[0]} of {path}, {mode}: {result.peers[0]:.2f} % of "
        f"{len(data.test)} test images, last epoch"
    )
    print(f"curves    {run_dir / CURVES}")
    print(f"metrics   {run_dir / METRICS}")
    print(f"backbone  {run_dir / 'peer0'}")
    return 0


def _what(known: argparse.Namespace) -> tuple[Path, Any, dict[str, Any]]:
    """Exported backbone, mode and settings so far, given or of the run to resume."""
    from mclfast.train.transfer import split_origin

    if not known.resume:
        if known.path is None:
            raise ValueError("path: expected the folder of an exported backbone, got none")
        if "data" not in known:
            raise ValueError("data: expected the set to transfer to (--data), got none")
        return one_export_in(known.path), known.mode or "linear", {}
    values = settings_to_resume(known, ("path", "mode"))
    origin = split_origin(values)
    if origin is None:
        raise ValueError(
            f"resume: expected a run of mclfast transfer in {known.resume}, got one of "
            "mclfast train"
        )
    return *origin, values
