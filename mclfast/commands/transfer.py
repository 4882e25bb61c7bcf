"""``mclfast transfer``: an exported backbone on another data set."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "fine-tune an exported backbone on another data set, or train a linear classifier on it"

_SETTINGS = (
    "data", "data_root", "image_size", "workers", "train_per_class", "seed", "epochs",
    "batch_size", "augment", "lr", "momentum", "nesterov", "weight_decay", "schedule",
    "milestones", "lr_decay", "warmup_epochs", "clip_grad_norm", "amp", "eval_batch_size", "device",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from mclfast.config import TrainConfig, field_help

    parser.add_argument("path", type=Path, help="folder of an exported backbone, such as RUN/peer0")
    parser.add_argument(
        "--mode", default="linear",
        help="linear: only a new classifier learns; finetune: all weights do (default: linear)",
    )  # fmt: skip
    parser.add_argument("--run-dir", type=Path, help="folder of the run (default: under runs/)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a run that is already in the folder"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    for name in _SETTINGS:
        parser.add_argument(
            f"--{name.replace('_', '-')}", metavar="X", default=argparse.SUPPRESS,
            help=field_help(TrainConfig)[name],
        )  # fmt: skip


def run(known: argparse.Namespace, _: list[str]) -> int:
    from mclfast.commands.train import remove_old_run
    from mclfast.train import CONFIG, CURVES, METRICS
    from mclfast.transfer import build_transfer, transfer_config

    if "data" not in known:
        raise ValueError("data: expected the set to transfer to (--data), got none")
    values = {name: getattr(known, name) for name in _SETTINGS if name in known}
    config = transfer_config(known.path, known.mode, values)
    name = f"{config.data}-{known.mode}-{config.cohort[0]}-seed{config.seed}"
    run_dir = known.run_dir or Path("runs") / name
    if (run_dir / CONFIG).exists() and not known.overwrite:
        raise ValueError(
            f"run_dir: expected a new folder, got {run_dir} with a run; use --overwrite or "
            "another --run-dir"
        )
    trainer = build_transfer(known.path, known.mode, config, run_dir)
    remove_old_run(run_dir)
    data = trainer.data
    print(
        f"{data.name}: {len(data.train)} training and {len(data.test)} test images, "
        f"{data.num_classes} classes; device {trainer.device}"
    )
    result = trainer.fit(progress=not known.no_progress)
    print(
        f"{config.cohort[0]} of {known.path}, {known.mode}: {result.peers[0]:.2f} % of "
        f"{len(data.test)} test images, last epoch"
    )
    print(f"curves    {run_dir / CURVES}")
    print(f"metrics   {run_dir / METRICS}")
    print(f"backbone  {run_dir / 'peer0'}")
    return 0
