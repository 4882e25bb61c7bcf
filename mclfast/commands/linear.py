"""``mclfast linear``: linear evaluation of an exported backbone."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "score the frozen features of an exported backbone by a linear classifier"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("path", type=Path, help="folder of an exported backbone, as RUN/peer0")
    add("--data", help="data set (default: that of the export)")
    add("--data-root", help="folder with the data set's archive or images")
    add("--epochs", type=int, default=100, help="passes (default: 100)")
    add("--lr", type=float, default=30.0,
        help="learning rate, ten times smaller after 60 and 80 %% of the epochs (default: 30)")
    add("--weight-decay", type=float, default=0.0, help="(default: 0)")
    add("--batch-size", type=int, default=256, help="(default: 256)")
    add("--augment", action="store_true",
        help="draw crops, and flips where the set has them, in every epoch, as published "
        "evaluations do; the network then runs in every epoch, and not once")
    add("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--workers", type=int, help="processes that decode streamed images (default: one per core)")


def run(known: argparse.Namespace, _: list[str]) -> int:
    from mclfast.data import has_image_size
    from mclfast.export import load_backbone
    from mclfast.linear_probe import published_settings
    from mclfast.transfer import build_transfer, transfer_config

    about = load_backbone(known.path).description
    name = known.data or about.get("data")
    if name is None:
        raise ValueError(f"data: expected --data, as {known.path} names none, got none")
    is_own = name == about.get("data")
    given = (
        "data_root", "epochs", "lr", "weight_decay", "batch_size", "augment", "seed", "device",
        "workers",
    )  # fmt: skip
    values = published_settings(known.epochs) | {key: getattr(known, key) for key in given}
    values["data"] = name
    if is_own:
        values["data_root"] = known.data_root or about.get("data_root")
        values["train_per_class"] = about.get("train_per_class")
    if has_image_size(name):
        values["image_size"] = about.get("image_size")
    trainer = build_transfer(known.path, "linear", transfer_config(known.path, "linear", values))
    result = trainer.fit(progress=False)
    print(
        f"{known.path}: {about['network']} on {name}: top-1 {result.peers[0]:.2f} % of "
        f"{len(trainer.data.test)} test images (linear classifier on frozen features)"
    )
    return 0
