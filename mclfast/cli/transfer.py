"""``mclfast transfer``: trains an exported backbone, or a classifier on it, on a data set.

``--published`` scores frozen features by the published protocol of linear evaluation.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mclfast.cli.options import (
    add_allow_external,
    add_run_options,
    cohort_name,
    exports_in,
    fit,
    one_export_in,
    run_folder_of,
    run_name,
    settings_to_resume,
)
from mclfast.cli.settings import dashed, shown, value_shape

if TYPE_CHECKING:
    from mclfast.config import TrainConfig

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
    """Adds the options of ``mclfast transfer``."""
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
    parser.add_argument(
        "--published",
        action="store_true",
        help="linear evaluation with published settings: 100 epochs, batches of 256, learning "
        "rate 30, ten times smaller after 60 and 80 %% of the epochs, no weight decay; add "
        "--augment true for the published crops and flips. The data set defaults to that of the "
        "export. PATH may be a run, whose peers are all scored. Nothing is written unless "
        "--run-dir is given",
    )
    add_run_options(
        parser,
        resume_help="folder of an interrupted run to continue; the backbone it started from must "
        "still exist",
    )
    add_allow_external(parser)
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
            text = "data set to train and test on, which must be named unless --published is given"
        group.add_argument(
            f"--{dashed(name)}",
            metavar=value_shape(name, kinds[name]),
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
        )


def run(known: argparse.Namespace, _: list[str]) -> int:
    """Runs the command.

    Returns:
        128 and the number of the signal if the run was interrupted, else 0.
    """
    from mclfast.train.transfer import transfer_config

    given = {name: getattr(known, name) for name in _SETTINGS if name in known}
    if known.published and not known.resume:
        return _score(known, given)
    path, mode, values = _backbone_and_mode(known)
    config = transfer_config(path, mode, values | given, allow_external=known.allow_external)
    with run_folder_of(known, _default_name(config, mode)) as run_dir:
        return _train(known, path, mode, config, run_dir)


def _default_name(config: TrainConfig, mode: Any) -> str:
    """The folder's name of a run, ``<data>-<mode>-<network>-seed<n>``, and what is unusual."""
    from mclfast.train.transfer import default_settings

    usual = type(config).from_values(default_settings(mode)).to_values()
    parts = [config.data, mode, cohort_name(config.cohort), f"seed{config.seed}"]
    told = ("data", "method", "cohort", "seed")
    return run_name(config, usual, *parts, leave_out=told)


def _score(known: argparse.Namespace, given: dict[str, Any]) -> int:
    """Linear evaluation of each backbone by the published protocol.

    Args:
        known: arguments of the command.
        given: settings given on the command line, as text.
    """
    from mclfast.train.transfer import published_config

    if known.mode not in (None, "linear"):
        raise ValueError(f"mode: expected linear with --published, got {known.mode}")
    if known.path is None:
        raise _no_path()
    if known.run_dir is None:
        for folder in exports_in(known.path):
            config = published_config(folder, given, allow_external=known.allow_external)
            _train(known, folder, "linear", config, None)
        return 0
    # One folder holds one run.
    folder = one_export_in(known.path)
    config = published_config(folder, given, allow_external=known.allow_external)
    with run_folder_of(known, "") as run_dir:
        return _train(known, folder, "linear", config, run_dir)


def _train(
    known: argparse.Namespace, path: Path, mode: Any, config: TrainConfig, run_dir: Path | None
) -> int:
    """Trains one backbone and prints the accuracy that it reached.

    Args:
        known: arguments of the command.
        path: folder of the exported backbone.
        mode: "linear" or "finetune".
        config: settings of the run.
        run_dir: folder that the run is written into; None writes nothing.
    """
    from mclfast.train.folder import CURVES, METRICS, remove_old_run, require_packages
    from mclfast.train.transfer import build_transfer

    if run_dir is not None:
        # Before an old run is removed, and before data and network are made.
        require_packages()
    trainer = build_transfer(path, mode, config, run_dir, allow_external=known.allow_external)
    if run_dir is not None and not known.resume:
        # Removed only now, so that settings that cannot work cost no old run.
        remove_old_run(run_dir)
    data = trainer.data
    print(
        f"{data.name}: {len(data.train)} training and {len(data.test)} test images, "
        f"{data.num_classes} classes; device {trainer.device}"
    )
    result = fit(known, trainer)
    if isinstance(result, int):
        return result
    print(
        f"{config.cohort[0]} of {path}, {mode}: {result.peers[0]:.2f} % of "
        f"{len(data.test)} test images, last epoch",
        flush=True,
    )
    if run_dir is not None:
        print(f"curves    {run_dir / CURVES}")
        print(f"metrics   {run_dir / METRICS}")
        print(f"backbone  {run_dir / 'peer0'}")
    return 0


def _backbone_and_mode(known: argparse.Namespace) -> tuple[Path, Any, dict[str, Any]]:
    """Folder of the backbone, mode, and settings: as given, or as recorded in a run to resume."""
    from mclfast.train.transfer import split_origin

    if not known.resume:
        if known.path is None:
            raise _no_path()
        if "data" not in known:
            raise ValueError("data: expected the set to transfer to (--data), got none")
        return one_export_in(known.path), known.mode or "linear", {}
    values = settings_to_resume(known, ("path", "mode", "published"))
    origin = split_origin(values)
    if origin is None:
        raise ValueError(
            f"resume: expected a run of mclfast transfer in {known.resume}, got one of "
            "mclfast train"
        )
    return *origin, values


def _no_path() -> ValueError:
    return ValueError("path: expected the folder of an exported backbone, got none")
