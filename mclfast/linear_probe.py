"""Linear evaluation: a classifier trained on the features of a frozen network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mclfast._checks import check_integer, check_not_negative, check_positive
from mclfast.data.dataset import Dataset
from mclfast.data.source import ImageSource
from mclfast.evaluate import batches_for, evaluation_mode
from mclfast.models.staged import StagedNetwork


def linear_probe(
    network: StagedNetwork,
    data: Dataset,
    *,
    epochs: int = 100,
    lr: float = 30.0,
    weight_decay: float = 0.0,
    milestones: Sequence[int] | None = None,
    batch_size: int = 256,
    seed: int = 0,
) -> float:
    """Test accuracy in percent of a linear classifier on the pooled features.

    The features are computed once, in evaluation mode and without augmentation (the published
    protocol of momentum contrast, arXiv 1911.05722, draws crops and flips in every epoch). The
    classifier starts at weights of standard deviation 0.01 and is trained by SGD of momentum 0.9.

    Args:
        network: left as it is; its own classifier is not used.
        data: its training images are learned from, its test images judged.
        epochs: passes over the features.
        lr: learning rate.
        weight_decay: of the classifier.
        milestones: epochs from which on the rate is ten times smaller; None for 60 and 80 % of
            ``epochs``.
        batch_size: images per step, of the network and of the classifier.
        seed: of initial weights and batches.

    Raises:
        ValueError: naming the argument out of range.
        FloatingPointError: the weights became infinite or NaN.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        check_integer(name, value, 1)
    check_positive("lr", lr)
    check_not_negative("weight_decay", weight_decay)
    if milestones is None:
        milestones = (round(0.6 * epochs), round(0.8 * epochs))
    device = next(network.parameters()).device
    features, test_features = (
        _features(network, images, data, batch_size) for images in (data.train, data.test)
    )
    labels, test_labels = (s.labels.to(device) for s in (data.train, data.test))

    generator = torch.Generator().manual_seed(seed)
    classifier = nn.Linear(features.shape[1], data.num_classes)
    with torch.no_grad():
        classifier.weight.normal_(std=0.01, generator=generator)
        classifier.bias.zero_()
    classifier.to(device)
    optimizer = torch.optim.SGD(
        classifier.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay
    )
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = lr * 0.1 ** sum(epoch >= m for m in milestones)
        order = torch.randperm(len(labels), generator=generator).to(device)
        for index in order.split(batch_size):
            optimizer.zero_grad(set_to_none=True)
            cross_entropy(classifier(features[index]), labels[index]).backward()
            optimizer.step()
    if not all(bool(p.isfinite().all()) for p in classifier.parameters()):
        raise FloatingPointError(f"lr: expected one that keeps the weights finite, got {lr}")
    with torch.no_grad():
        correct = classifier(test_features).argmax(1) == test_labels
    return 100.0 * float(correct.double().mean())


@torch.no_grad()
def _features(
    network: StagedNetwork, images: ImageSource, data: Dataset, batch_size: int
) -> Tensor:
    """Pooled features float32 [N, D] of the evaluation views, on the network's device."""
    with evaluation_mode(network):
        batches = batches_for(network, images, data, batch_size)
        return torch.cat([network.forward_taps(x).feature for x, _ in batches])
