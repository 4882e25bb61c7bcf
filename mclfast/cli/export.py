"""``mclfast export``: writes the bare backbone of a peer of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mclfast.cli.options import add_allow_external
from mclfast.cli.settings import an_integer

if TYPE_CHECKING:
    from mclfast.train.trainer import Trainer

HELP = "write the bare backbone of a peer of a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``mclfast export``."""
    parser.add_argument("run_dir", type=Path, help="folder of a run, finished or not")
    parser.add_argument(
        "--peer",
        type=an_integer,
        default=0,
        metavar="N",
        help="number of the peer, from 0 (default: 0)",
    )
    parser.add_argument(
        "--data-root",
        metavar="DIR",
        help="folder of the data set, if it has moved (default: the one recorded in the run)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write (default: RUN_DIR/peerN)"
    )
    add_allow_external(parser)


def run(known: argparse.Namespace, _: list[str]) -> int:
    """Runs the command; returns 0."""
    from mclfast.train import checkpoint
    from mclfast.train.folder import CHECKPOINT

    path = known.run_dir / CHECKPOINT
    trainer = _trainer_of(known)
    names = trainer.config.cohort
    if not 0 <= known.peer < len(names):
        raise ValueError(f"peer: expected 0 to {len(names) - 1}, got {known.peer}")
    try:
        state = checkpoint.load(path)
    except checkpoint.DamagedError as error:
        if not checkpoint.previous_of(path).is_file():
            raise
        # Not read in its place: the user asked for the weights of the last checkpoint.
        raise ValueError(
            f"{error}; --resume goes on from the one before it, {checkpoint.previous_of(path)}"
        ) from None
    trainer.load_state(state)
    folder = trainer.export(known.peer, known.out or known.run_dir / f"peer{known.peer}")
    print(f"{names[known.peer]} written to {folder}")
    return 0


def _trainer_of(known: argparse.Namespace) -> Trainer:
    """The trainer of the run, with the weights that the run started from."""
    from mclfast.config import TrainConfig
    from mclfast.train.builder import build
    from mclfast.train.folder import read_settings
    from mclfast.train.transfer import build_transfer, split_origin, transfer_config

    values = read_settings(known.run_dir, "run_dir") | {"device": "cpu"}
    if known.data_root:
        values["data_root"] = known.data_root
    origin = split_origin(values)
    if origin is None:
        return build(TrainConfig.from_values(values))
    # Built from the backbone, as with --resume, so that the parts of the network have its names.
    path, mode = origin
    allowed = known.allow_external
    config = transfer_config(path, mode, values, allow_external=allowed)
    return build_transfer(path, mode, config, allow_external=allowed)
