"""Reproducible subsets of a data set: fewer images of each class, and held-out images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mclfast.data.dataset import Dataset, check_labels
from mclfast.data.sampler import smallest_class
from mclfast.data.source import ImageSource, Source


def class_ranks(labels: Tensor, num_classes: int, seed: int) -> Tensor:
    """Position of every sample among those of its class, in a shuffled order fixed by ``seed``.

    The samples with rank < k form a stratified subset, which contains that of every smaller k.

    Args:
        labels: int64 [N], in [0, num_classes).
        num_classes: number of classes.
        seed: seed of the order, 0 to 2**32 - 1.

    Returns:
        int64 [N], on the CPU.

    Raises:
        ValueError: the seed is out of range.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected a value in [0, 2**32), got {seed}")
    labels = labels.cpu()
    # NumPy promises that this legacy stream never changes; torch.randperm makes no such promise.
    shuffled = torch.from_numpy(np.random.RandomState(seed).permutation(len(labels))).long()
    order = shuffled[torch.argsort(labels[shuffled], stable=True)]
    counts = torch.bincount(labels, minlength=num_classes)
    starts = counts.cumsum(0) - counts
    ranks = torch.empty_like(labels)
    ranks[order] = torch.arange(len(labels)) - starts[labels[order]]
    return ranks


def limit_per_class(image_set: Source, per_class: int, num_classes: int, seed: int = 0) -> Source:
    """Keeps ``per_class`` images of every class, in their original order.

    Args:
        image_set: images [N, C, H, W] with labels [N].
        per_class: number of images to keep of each class, at least 1.
        num_classes: number of classes.
        seed: seed that decides which images are kept; the same seed always keeps the same ones.

    Returns:
        A set of num_classes * per_class images.

    Raises:
        ValueError: per_class is not positive, a label is out of range, or a class has fewer than
            per_class images.
    """
    if per_class < 1:
        raise ValueError(f"per_class: expected at least 1, got {per_class}")
    check_labels("labels", image_set.labels, num_classes)
    smallest, count = smallest_class(image_set.labels.cpu(), num_classes)
    if count < per_class:
        raise ValueError(
            f"per_class: expected at most {count}, the number of images of class {smallest}, "
            f"got {per_class}"
        )
    keep = class_ranks(image_set.labels, num_classes, seed) < per_class
    return select(image_set, keep)


def select(image_set: Source, keep: Tensor) -> Source:
    """The images with keep == True, in their order; ``keep`` is bool [N]."""
    return image_set.subset(keep.nonzero().squeeze(1))


def hold_out(data: Dataset, share: float) -> tuple[Dataset, ImageSource | None]:
    """Takes a share of each class's training images out of the training set.

    The split does not depend on the seed of a run, as the split of the test images does not.

    Args:
        data: data set to split.
        share: share of each class to take out, in [0, 1); 0 takes out nothing.

    Returns:
        The data set without the held-out images, and these images; None if there are none.
    """
    if share == 0:
        return data, None
    labels = data.train.labels
    ranks = class_ranks(labels, data.num_classes, seed=0).to(labels.device)
    counts = torch.bincount(labels, minlength=data.num_classes)
    kept_out = ranks < (share * counts).ceil()[labels]
    return replace(data, train=select(data.train, ~kept_out)), select(data.train, kept_out)
