"""Accuracy of networks on a set of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mclfast._base.modules import evaluation_mode
from mclfast.cohort.cohort import Cohort
from mclfast.cohort.outputs import PeerOutputs, mean_logits
from mclfast.data.dataset import Dataset
from mclfast.data.feed import evaluation_batches
from mclfast.data.source import ImageSource


class CohortAccuracy(NamedTuple):
    """Accuracies in percent.

    Attributes:
        peers: accuracy of each network's own final classifier.
        ensemble: accuracy of all together, by the mean of their logits or as the method says.
        best_head: the best of all classifiers, auxiliary ones included (the published protocol
            reports its maximum over the epochs).
    """

    peers: tuple[float, ...]
    ensemble: float
    best_head: float


def batches_for(
    module: nn.Module, images: ImageSource, data: Dataset, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Evaluation views [b, C, H, W] and labels [b] in order, on the device of a module.

    Args:
        module: a module with parameters, whose device and layout the images take.
        images: the images that are read.
        data: gives the statistics that images are normalised by.
        batch_size: images at a time.
    """
    return evaluation_batches(
        images,
        mean=data.mean,
        std=data.std,
        batch_size=batch_size,
        device=module.device if isinstance(module, Cohort) else next(module.parameters()).device,
    )


@torch.no_grad()
def _percent_correct(
    module: nn.Module,
    heads: Callable[[Tensor], Sequence[Tensor]],
    images: ImageSource,
    data: Dataset,
    batch_size: int,
    refuse_non_finite: bool = True,
) -> list[float]:
    """Accuracy of every head; ``heads`` maps images to a sequence of logits.

    Args:
        module, images, data, batch_size: arguments of :func:`batches_for`.
        heads: function from images to logits [B, C] of every head.
        refuse_non_finite: whether infinite or NaN logits are an error; if not, an image that has
            them counts as wrong.

    Raises:
        FloatingPointError: logits are infinite or NaN, of which the largest means nothing.
    """
    correct, finite = [], []
    with evaluation_mode(module):
        for x, y in batches_for(module, images, data, batch_size):
            found = heads(x)
            fits = torch.stack([logits.isfinite().all(1) for logits in found])
            right = torch.stack([logits.argmax(1) == y for logits in found])
            correct.append((right & fits).sum(1))
            finite.append(fits.all(1))
    # Read after the last batch, so that no batch waits for the device.
    for head, fits in enumerate(torch.stack(finite).all(0).tolist()):
        if refuse_non_finite and not fits:
            raise FloatingPointError(
                "network: expected finite logits of the test images, got infinite or NaN values "
                f"of classifier {head}"
            )
    return (100.0 * torch.stack(correct).sum(0).double() / len(images)).tolist()


@torch.no_grad()
def peer_logits(
    cohort: Cohort, images: ImageSource, data: Dataset, *, batch_size: int = 256
) -> Tensor:
    """Logits [M, N, C] of every peer's own classifier, in evaluation mode."""
    with evaluation_mode(cohort):
        batches = batches_for(cohort, images, data, batch_size)
        return torch.cat([torch.stack(cohort(x).final_logits) for x, _ in batches], dim=1)


def cohort_accuracy(
    cohort: Cohort,
    data: Dataset,
    *,
    batch_size: int = 256,
    ensemble: Callable[[PeerOutputs], Tensor] = mean_logits,
    refuse_non_finite: bool = True,
) -> CohortAccuracy:
    """Accuracy of every peer of a cohort on the test set, in evaluation mode.

    Args:
        cohort: the peers.
        data: the data set whose test images are read.
        batch_size: images at a time.
        ensemble: function from the outputs to the logits [B, C] of all peers together.
        refuse_non_finite: whether infinite or NaN logits are an error; if not, an image that has
            them counts as wrong.

    Raises:
        FloatingPointError: a classifier gives infinite or NaN logits.
    """

    def heads(x: Tensor) -> list[Tensor]:
        outputs = cohort(x)
        mean = ensemble(outputs)
        auxiliary = [logits for stages in outputs.logits for logits in stages[:-1]]
        return [*outputs.final_logits, mean, *auxiliary]

    found = _percent_correct(cohort, heads, data.test, data, batch_size, refuse_non_finite)
    count = len(cohort.networks)
    peers, together, auxiliary = found[:count], found[count], found[count + 1 :]
    return CohortAccuracy(tuple(peers), together, max(*peers, *auxiliary, 0.0))


def accuracy(network: nn.Module, data: Dataset, *, batch_size: int = 256) -> float:
    """Accuracy in percent of one network [b, C, H, W] -> logits on the test set.

    Args:
        network: network with parameters.
        data: the data set whose test images are read.
        batch_size: images at a time.

    Raises:
        FloatingPointError: the logits are infinite or NaN.
    """
    return _percent_correct(network, lambda x: [network(x)], data.test, data, batch_size)[0]
