"""The parts of a run that its config names: data, cohort and method, batches, optimiser."""

from __future__ import annotations

from typing import Any

import torch

from mclfast import models
from mclfast.cohort.cohort import Cohort
from mclfast.cohort.topology import topology
from mclfast.config import TrainConfig
from mclfast.data import load as load_data
from mclfast.data.dataset import Dataset
from mclfast.data.sampler import BalancedSampler, ShuffleSampler
from mclfast.data.source import ImageSource
from mclfast.methods import Method, method_class


def load_images(config: TrainConfig) -> Dataset:
    """The data set that a config names."""
    return load_data(
        config.data,
        root=config.data_root,
        train_per_class=config.train_per_class,
        image_size=config.image_size,
        workers=config.workers,
    )


def make_parts(config: TrainConfig, num_classes: int, in_channels: int) -> tuple[Cohort, Method]:
    """The cohort and the method of a config, for images of so many classes and channels."""
    cls = method_class(config.method)
    networks = [
        models.create(name, num_classes=num_classes, in_channels=in_channels)
        for name in config.cohort
    ]
    cohort = Cohort(
        networks,
        auxiliary_heads=cls.auxiliary_heads,
        projection_dim=config.projection_dim if cls.projections else None,
        projection=cls.projection_kind(config.options),
        topology=topology(
            config.topology,
            len(networks),
            len(networks[0].stages),
            split_stage=config.split_stage,
            rescale_gradients=cls.rescale_gradients,
        ),
    )
    return cohort, cls(cohort.feature_dims, config.options)


def make_sampler(
    config: TrainConfig, images: ImageSource, num_classes: int
) -> BalancedSampler | ShuffleSampler:
    """The sampler that deals the training images of a data set to batches."""
    if config.sampler == "shuffle":
        return ShuffleSampler(len(images), batch_size=config.batch_size, seed=config.seed)
    return BalancedSampler(
        images.labels,
        batch_size=config.batch_size,
        images_per_class=config.images_per_class,
        num_classes=num_classes,
        seed=config.seed,
    )


def make_sgd(config: TrainConfig, parameters: list[Any]) -> torch.optim.SGD:
    """The optimiser of parameters, or of groups of them."""
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )
