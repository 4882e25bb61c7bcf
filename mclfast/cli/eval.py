"""``mclfast eval``: accuracy of exported backbones, next to the one recorded in training."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from mclfast.cli.options import add_allow_external, exports_in
from mclfast.cli.settings import an_integer

HELP = "accuracy of an exported backbone, or of all those of a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``mclfast eval``."""
    parser.add_argument("path", type=Path, help="folder of an exported backbone, or of a run")
    parser.add_argument(
        "--data-root",
        metavar="DIR",
        help="folder of the data set, if it has moved (default: the one recorded in the export)",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    parser.add_argument(
        "--workers",
        type=an_integer,
        metavar="N",
        help="processes that decode streamed images (default: one per core)",
    )
    add_allow_external(parser)


def run(known: argparse.Namespace, _: list[str]) -> int:
    """Runs the command; returns 0."""
    from mclfast._base.checks import shortened
    from mclfast._base.machine import select_device
    from mclfast.data import has_image_size
    from mclfast.data import load as load_data
    from mclfast.data.dataset import with_channels
    from mclfast.train.evaluation import accuracy
    from mclfast.train.export import check_for_evaluation, load_backbone

    device = select_device(known.device)
    for folder in exports_in(known.path):
        exported = load_backbone(folder, allow_external=known.allow_external)
        about = exported.description
        check_for_evaluation(about, folder)
        data = load_data(
            about["data"],
            root=known.data_root or about["data_root"],
            train_per_class=about["train_per_class"],
            image_size=about["image_size"] if has_image_size(about["data"]) else None,
            workers=known.workers,
        )
        if list(data.class_names) != about["class_names"]:
            both = (about["class_names"], data.class_names)
            want, got = (shortened(", ".join(names), 60) for names in both)
            raise ValueError(f"data_root: expected the classes {want} of the export, got {got}")
        data = with_channels(data, about["in_channels"])
        # Normalised as in training: the statistics of a folder of images depend on its content.
        data = replace(data, mean=tuple(about["mean"]), std=tuple(about["std"]))
        found = accuracy(exported.network.to(device), data, batch_size=about["eval_batch_size"])
        recorded = about["accuracy"]
        shown = "nothing" if recorded is None else f"{recorded:.4f} %"
        print(
            f"{folder}: {about['network']} on {about['data']}: {found:.4f} % of "
            f"{len(data.test)} test images (recorded in training: {shown})"
        )
    return 0
