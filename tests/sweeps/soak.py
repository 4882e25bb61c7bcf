"""Many steps with processes that read images and with bilevel steps: nothing may pile up."""

from __future__ import annotations

import gc
import os
import random
import tempfile
from pathlib import Path

import torch

from helpers.images import make_folder
from mclfast._base.machine import process_memory
from mclfast.config import TrainConfig
from mclfast.train.builder import build
from mclfast.train.trainer import Trainer

#: Growth in bytes, after the first quarter, that allocators may cause.
ROOM = 64 * 2**20


def sweep(count: int, seed: int) -> dict[str, int]:
    """Trains for so many steps, evaluations and checkpoints included.

    Args:
        count: training steps.
        seed: seed of the run.

    Returns:
        tried: steps; survived: the same if memory and open files stayed flat, else 0; lost: the
        steps if not; memory: bytes and files: open files by which the last quarter of the run
        exceeded what was there after the first.
    """
    # Images that differ from seed to seed.
    per_class = 8 + random.Random(seed).randrange(3)
    with tempfile.TemporaryDirectory() as place:
        folder = make_folder(Path(place, "images"), train=per_class)
        config = TrainConfig.from_values(
            {
                "data": "imagefolder",
                "data_root": str(folder),
                "image_size": 16,
                "workers": 2,
                "method": "lmcl",
                "cohort": "resnet8",
                "matcher_dim": 4,
                "projection_dim": 4,
                "bilevel_every": 5,
                "batch_size": 6,
                "images_per_class": 2,
                "device": "cpu",
                "seed": seed,
                "checkpoint_every": 3,
                "eval_every": 2,
                "epochs": 10**6,
            }
        )
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            memory, files = _growth(build(config, Path(place, "run")), count)
        finally:
            torch.set_num_threads(before)
    flat = memory <= ROOM and files <= 0
    if not flat:
        print(f"soak: seed {seed}: {memory} bytes and {files} files more at the end")
    survived = count if flat else 0
    return {
        "tried": count,
        "survived": survived,
        "lost": count - survived,
        "memory": memory,
        "files": files,
    }


def _growth(trainer: Trainer, count: int) -> tuple[int, int]:
    """Bytes and open files by which the end exceeds the end of the first quarter."""
    per_epoch = len(trainer.sampler)
    epochs = -(-count // per_epoch)
    # The first evaluation starts processes of its own, which stay.
    first = max(2, epochs // 4)
    trainer.fit(progress=False, stop_after=first)
    memory, files = _in_use()
    trainer.fit(progress=False, stop_after=max(1, epochs - first))
    after_memory, after_files = _in_use()
    return after_memory - memory, after_files - files


def _in_use() -> tuple[int, int]:
    gc.collect()
    return process_memory("VmRSS"), len(os.listdir("/proc/self/fd"))
