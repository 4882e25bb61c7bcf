"""``mclfast export``: writes the bare backbone of a peer of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write the bare backbone of a peer of a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, help="folder of a run, finished or not")
    parser.add_argument("--peer", type=int, default=0, help="which peer (default: 0)")
    parser.add_argument("--data-root", help="folder with the data set, where it has moved")
    parser.add_argument("--out", type=Path, help="folder to write (default: RUN_DIR/peerN)")


def run(known: argparse.Namespace, _: list[str]) -> int:
    from mclfast import checkpoint
    from mclfast.config import TrainConfig
    from mclfast.run_folder import CHECKPOINT, read_settings
    from mclfast.train import build

    values = read_settings(known.run_dir, "run_dir") | {"device": "cpu"}
    if known.data_root:
        values["data_root"] = known.data_root
    config = TrainConfig.from_values(values)
    if not 0 <= known.peer < len(config.cohort):
        raise ValueError(f"peer: expected 0 to {len(config.cohort) - 1}, got {known.peer}")
    trainer = build(config)
    trainer.load_state(checkpoint.load(known.run_dir / CHECKPOINT))
    folder = trainer.export(known.peer, known.out or known.run_dir / f"peer{known.peer}")
    print(f"{config.cohort[known.peer]} written to {folder}")
    return 0
