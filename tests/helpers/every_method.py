"""Settings of a small run on the digits for every method, for tests that take them all."""

from __future__ import annotations

from typing import Any

from mclfast.cohort.outputs import Batch
from mclfast.config import TrainConfig
from mclfast.train.builder import build
from mclfast.train.trainer import Trainer

_STEM = {"topology": "shared_stem", "split_stage": 2}

METHODS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in ("afd", "baseline", "dml", "ffl", "lmcl", "mcl")},
    **{f"{name} bank": {"method": name, "loss": "bank"} for name in ("mcl", "lmcl")},
    # A batch that could hold every class would be asked whether it does.
    "mcl shared negatives": {
        "method": "mcl",
        "loss": "bank",
        "shared_negatives": "true",
        "batch_size": 8,
    },
    "mcl-okd": {"method": "mcl-okd"} | _STEM,
    "cl-ilr": {"method": "cl-ilr"} | _STEM,
    "one": {"method": "one"} | _STEM,
    "okddip": {"method": "okddip", "cohort": "resnet8,resnet8,resnet8"},
    "pcl": {"method": "pcl"} | _STEM,
    **{
        f"kdcl {teacher}": {"method": "kdcl", "teacher": teacher}
        for teacher in ("naive", "linear", "minlogit", "general")
    },
    "moco-mcl": {"method": "moco-mcl", "queue_size": 40, "sampler": "shuffle", "norm_parts": 2},
}


def trainer_of(name: str, **values: Any) -> Trainer:
    """The trainer of an entry of :data:`METHODS`, in training mode."""
    small = {
        "data": "digits-full",
        "train_per_class": 8,
        "cohort": "resnet8,resnet8",
        "batch_size": 20,
        "images_per_class": 4,
        "projection_dim": 16,
        "device": "cpu",
    }
    if "bank" in name or "shared negatives" in name or name == "mcl-okd":
        small["num_negatives"] = 12
    trainer = build(TrainConfig.from_values(small | METHODS[name] | values))
    trainer.cohort.train()
    trainer.method.train()
    return trainer


def first_batch(trainer: Trainer, step: int = 0) -> tuple[Any, Batch]:
    """The images and the batch that the loop hands to a training step."""
    rows = trainer.sampler.epoch(0)[step : step + 1]
    images, labels, index = next(iter(trainer.feed.batches(rows, first_step=step)))
    return images, Batch(labels, index, step, epoch=0)
