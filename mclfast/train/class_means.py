"""Classifiers that need no training: the nearest mean of the features of a class.

They show how far the features of networks trained without labels have come.
"""

from __future__ import annotations

import torch
from torch import nn

from mclfast._base.modules import evaluation_mode
from mclfast.cohort.cohort import Cohort
from mclfast.data.dataset import Dataset
from mclfast.data.source import ImageSource
from mclfast.data.subsets import class_ranks, select
from mclfast.models.staged import linear_classifier
from mclfast.train.evaluation import batches_for

#: Training images of a class that its mean is taken from.
IMAGES_PER_CLASS = 50


def class_mean_images(data: Dataset, per_class: int = IMAGES_PER_CLASS) -> ImageSource:
    """Up to ``per_class`` training images of every class, the same for all seeds."""
    labels = data.train.labels
    ranks = class_ranks(labels, data.num_classes, seed=0).to(labels.device)
    return select(data.train, ranks < per_class)


def mean_classifiers(cohort: Cohort) -> list[nn.Linear]:
    """The classifiers that :func:`set_class_means` sets.

    Raises:
        ValueError: a classifier without a bias, or one that is no linear layer.
    """
    classifiers = [linear_classifier(peer.backbone, "cohort") for peer in cohort.peers]
    if any(c.bias is None for c in classifiers):
        raise ValueError("cohort: expected classifiers with a bias to hold class means, got none")
    return classifiers


@torch.no_grad()
def set_class_means(
    cohort: Cohort, images: ImageSource, data: Dataset, *, batch_size: int = 256
) -> None:
    """Sets every network's own classifier to ``f . m_c - |m_c|^2 / 2``, m_c the mean of class c.

    The largest of these logits is that of the mean nearest to the pooled feature f. Features are
    those of evaluation mode.

    Raises:
        ValueError: a classifier without a bias, or one that is no linear layer.
    """
    classifiers = mean_classifiers(cohort)
    sums = [torch.zeros_like(c.weight, dtype=torch.float64) for c in classifiers]  # [C, D]
    counts = torch.zeros(data.num_classes, dtype=torch.float64, device=sums[0].device)
    with evaluation_mode(cohort):
        for x, labels in batches_for(cohort, images, data, batch_size):
            members = torch.nn.functional.one_hot(labels, data.num_classes).double()  # [b, C]
            counts += members.sum(0)
            for total, feature in zip(sums, cohort(x).final_features, strict=True):
                # A product, as sums by index have no fixed order on a GPU.
                total += members.T @ feature.double()
    for classifier, total in zip(classifiers, sums, strict=True):
        means = total / counts.clamp_min(1)[:, None]
        classifier.weight.copy_(means)
        classifier.bias.copy_(-means.square().sum(1) / 2)
