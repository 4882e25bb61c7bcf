"""``mclfast linear``: linear evaluation of an exported backbone."""

from __future__ import annotations

import argparse
from pathlib import Path

from mclfast.cli.options import exports_in
from mclfast.cli.settings import a_number, an_integer

HELP = "score the frozen features of an exported backbone by a linear classifier"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "path",
        type=Path,
        help="folder of an exported backbone, such as RUN/peer0, or of a run, for all its peers",
    )
    add("--data", metavar="NAME", help="data set (default: that of the export)")
    add(
        "--data-root",
        metavar="DIR",
        help="folder with the data set's archive or images (default: that of the export, for its "
        "own data set)",
    )
    add(
        "--train-per-class",
        type=an_integer,
        metavar="N",
        help="labelled training images per class (default: that of the export, for its own data "
        "set, else the set's own number)",
    )
    add(
        "--epochs",
        type=an_integer,
        default=100,
        metavar="N",
        help="passes over the training images (default: 100)",
    )
    add(
        "--lr",
        type=a_number,
        default=30.0,
        metavar="X",
        help="learning rate, ten times smaller after 60 and 80 %% of the epochs (default: 30)",
    )
    add(
        "--weight-decay",
        type=a_number,
        default=0.0,
        metavar="X",
        help="on the classifier's weights (default: 0)",
    )
    add(
        "--batch-size",
        type=an_integer,
        default=256,
        metavar="N",
        help="images per step (default: 256)",
    )
    add(
        "--augment",
        action="store_true",
        help="draw crops, and flips where the set has them, in every epoch, as published "
        "evaluations do; the network then runs in every epoch, and not once (default: no)",
    )
    add(
        "--seed",
        type=an_integer,
        default=0,
        metavar="N",
        help="seed of weights and batches (default: 0)",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add(
        "--workers",
        type=an_integer,
        metavar="N",
        help="processes that decode streamed images (default: one per core)",
    )


def run(known: argparse.Namespace, _: list[str]) -> int:
    for folder in exports_in(known.path):
        _evaluate(known, folder)
    return 0


def _evaluate(known: argparse.Namespace, folder: Path) -> None:
    from mclfast.data import has_image_size
    from mclfast.train.export import load_backbone
    from mclfast.train.probe import published_settings
    from mclfast.train.transfer import build_transfer, transfer_config

    about = load_backbone(folder).description
    name = known.data or about.get("data")
    if name is None:
        raise ValueError(f"data: expected --data, as {folder} names none, got none")
    is_own = name == about.get("data")
    given = (
        "data_root",
        "train_per_class",
        "epochs",
        "lr",
        "weight_decay",
        "batch_size",
        "augment",
        "seed",
        "device",
        "workers",
    )
    values = published_settings(known.epochs) | {key: getattr(known, key) for key in given}
    values["data"] = name
    if is_own:
        for key in ("data_root", "train_per_class"):
            values[key] = about.get(key) if values[key] is None else values[key]
    if has_image_size(name):
        values["image_size"] = about.get("image_size")
    trainer = build_transfer(folder, "linear", transfer_config(folder, "linear", values))
    result = trainer.fit(progress=False)
    print(
        f"{folder}: {about['network']} on {name}: top-1 {result.peers[0]:.2f} % of "
        f"{len(trainer.data.test)} test images (linear classifier on frozen features)",
        flush=True,
    )
