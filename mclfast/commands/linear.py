"""``mclfast linear``: linear evaluation of an exported backbone."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

HELP = "train a linear classifier on the frozen features of an exported backbone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="folder of an exported backbone, as RUN/peer0")
    parser.add_argument("--data", help="data set (default: that of the export)")
    parser.add_argument("--data-root", help="folder with the data set's archive or images")
    parser.add_argument("--epochs", type=int, default=100, help="passes (default: 100)")
    parser.add_argument(
        "--lr", type=float, default=30.0,
        help="learning rate, ten times smaller after 60 and 80 %% of the epochs (default: 30)",
    )  # fmt: skip
    parser.add_argument("--weight-decay", type=float, default=0.0, help="(default: 0)")
    parser.add_argument("--batch-size", type=int, default=256, help="(default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--workers", type=int, help="processes that decode streamed images (default: one per core)"
    )


def run(known: argparse.Namespace, _: list[str]) -> int:
    from mclfast.data import has_image_size
    from mclfast.data import load as load_data
    from mclfast.export import load_backbone
    from mclfast.linear_probe import linear_probe
    from mclfast.train import select_device

    exported = load_backbone(known.path)
    about = exported.description
    name = known.data or about.get("data")
    if name is None:
        raise ValueError(f"data: expected --data, as {known.path} names none, got none")
    is_own = name == about.get("data")
    data = load_data(
        name,
        root=known.data_root or (about.get("data_root") if is_own else None),
        train_per_class=about.get("train_per_class") if is_own else None,
        image_size=about.get("image_size") if has_image_size(name) else None,
        workers=known.workers,
    )
    if data.in_channels != about["in_channels"]:
        raise ValueError(
            f"data: expected images of {about['in_channels']} channels as {known.path} takes, "
            f"got {data.in_channels}"
        )
    # What the network was trained with.
    data = replace(data, mean=tuple(about["mean"]), std=tuple(about["std"]))
    device = select_device(known.device)
    found = linear_probe(
        exported.network.to(device),
        data.to(device),
        epochs=known.epochs,
        lr=known.lr,
        weight_decay=known.weight_decay,
        batch_size=known.batch_size,
        seed=known.seed,
    )
    print(
        f"{known.path}: {about['network']} on {name}: top-1 {found:.2f} % of {len(data.test)} "
        "test images (linear classifier on frozen features)"
    )
    return 0
