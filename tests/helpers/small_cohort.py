"""Trainers of networks whose float64 steps take milliseconds, with dropout all over them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mclfast.cohort.cohort import Cohort
from mclfast.cohort.outputs import Batch
from mclfast.cohort.topology import topology
from mclfast.config import TrainConfig
from mclfast.data import Augmentation, Dataset, ImageSet
from mclfast.methods import method_class
from mclfast.models import StagedNetwork
from mclfast.train.trainer import Trainer

#: Settings of the cases that the tests go through; the method is the name where it is not given.
CASES: dict[str, dict[str, Any]] = {
    "afd": {"networks": 3},
    "baseline": {"networks": 2},
    "cl-ilr": {"networks": 4, "topology": "tree"},
    "dml": {"networks": 3},
    "ffl": {"networks": 2},
    "kdcl": {"networks": 3},
    "kdcl-general": {"method": "kdcl", "networks": 2, "teacher": "general", "train_per_class": 8},
    "lmcl": {"networks": 3, "matcher_dim": 4, "bilevel_every": 0},
    "lmcl-bank": {
        "method": "lmcl",
        "networks": 2,
        "matcher_dim": 4,
        "bilevel_every": 0,
        "loss": "bank",
        "num_negatives": 5,
    },
    "mcl": {"networks": 3, "logit_distill": "last"},
    "mcl-bank": {"method": "mcl", "networks": 3, "loss": "bank", "num_negatives": 5},
    "mcl-okd": {"networks": 3, "topology": "shared_stem", "num_negatives": 5},
    "moco-mcl": {"networks": 2, "norm_parts": 2, "queue_size": 16, "sampler": "shuffle"},
    "okddip": {"networks": 3},
    "one": {"networks": 3, "topology": "shared_stem"},
    "pcl": {"networks": 3, "topology": "shared_stem"},
}


class SmallBlock(nn.Module):
    """A residual block with batch norm and dropout, [B, c, h, w] -> [B, c, h, w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.dropout(self.norm(self.conv(x))))


class SmallNet(StagedNetwork):
    """Stem and three stages; batch norm and dropout in all of them, dropout in the tail."""

    def __init__(self, blocks: int, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Dropout(0.2))
        for i in range(3):
            down = nn.Sequential(nn.Conv2d(width, width, 2), nn.BatchNorm2d(width), nn.Tanh())
            own = [SmallBlock(width) for _ in range(blocks)]
            setattr(self, f"stage{i}", nn.Sequential(down, *own))
        self.tail = nn.Dropout(0.1)
        self.fc = nn.Linear(width, 10)

    def stem_forward(self, x: Tensor) -> Tensor:
        return self.stem(x)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return self.stage0, self.stage1, self.stage2

    @property
    def classifier(self) -> nn.Linear:
        return self.fc


@functools.cache
def pictures(train_per_class: int) -> Dataset:
    """Ten classes of noise, each of another brightness."""
    generator = torch.Generator().manual_seed(3)

    def images(per_class: int) -> ImageSet:
        labels = torch.arange(10 * per_class) % 10
        noise = torch.randint(0, 120, (len(labels), 1, 10, 10), generator=generator)
        return ImageSet((noise + 13 * labels[:, None, None, None]).to(torch.uint8), labels)

    return Dataset(
        name="noise",
        train=images(train_per_class),
        test=images(2),
        num_classes=10,
        class_names=tuple("abcdefghij"),
        mean=(0.5,),
        std=(0.25,),
        augmentation=Augmentation(pad=1, flip=True),
    )


def small_trainer(
    case: str, *, run_dir: Path | None = None, blocks: int = 1, **values: Any
) -> Trainer:
    """The trainer of a case in float32, 10 steps an epoch; ``values`` replace its settings.

    Args:
        case: a name in :data:`CASES`.
        run_dir: the run folder.
        blocks: residual blocks in each stage of each network.
        values: fields of the config, options of the method, and ``networks``, their number.
    """
    own = {
        "method": case,
        "train_per_class": 8,
        "batch_size": 8,
        "images_per_class": 2,
        "epochs": 2,
        "projection_dim": 4,
        "device": "cpu",
        **CASES[case],
        **values,
    }
    networks = own.pop("networks")
    config = TrainConfig.from_values(own)
    torch.manual_seed(config.seed)
    cls = method_class(config.method)
    shape = topology(
        config.topology, networks, 3, split_stage=1, rescale_gradients=cls.rescale_gradients
    )
    cohort = Cohort(
        [SmallNet(blocks) for _ in range(networks)],
        auxiliary_heads=cls.auxiliary_heads,
        projection_dim=config.projection_dim if cls.projections else None,
        projection=cls.projection_kind(config.options),
        topology=shape,
    )
    method = cls(cohort.feature_dims, config.options)
    return Trainer(cohort, method, pictures(config.train_per_class), config, run_dir)


def in_float64(trainer: Trainer) -> Trainer:
    """The same trainer with all its modules in float64."""
    for module in (trainer.cohort, trainer.method, trainer.train_step.average):
        if module is not None:
            module.double()
    return trainer


def batches(trainer: Trainer, count: int) -> list[tuple[Tensor | list[Tensor], Batch]]:
    """The first batches of an epoch, in the dtype of the networks."""
    dtype = next(trainer.cohort.parameters()).dtype
    found = []
    rows = trainer.sampler.epoch(0)[:count]
    for step, (images, labels, index) in enumerate(trainer.feed.batches(rows, first_step=0)):
        views = images.to(dtype) if isinstance(images, Tensor) else [v.to(dtype) for v in images]
        found.append((views, Batch(labels, index, step, 0)))
    return found
