"""Linear evaluation: a linear classifier trained on the features of a frozen network.

``mclfast transfer --mode linear`` trains here, with its own settings or, with ``--published``,
with those of ``published_settings``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mclfast.cohort.cohort import Cohort
from mclfast.config import TrainConfig
from mclfast.data.dataset import Dataset
from mclfast.data.source import ImageSource
from mclfast.methods import method_class
from mclfast.models.auxiliary import StageOutputs
from mclfast.models.staged import StagedNetwork, linear_classifier
from mclfast.train.evaluation import CohortAccuracy, batches_for
from mclfast.train.trainer import Trainer


def published_settings(epochs: int = 100) -> dict[str, Any]:
    """Fields of ``TrainConfig`` as momentum contrast is evaluated (arXiv 1911.05722, section 4.1).

    The learning rate falls tenfold after 60 and 80 % of the epochs. Published runs draw crops and
    flips in every epoch (``augment=True``); without augmentation the network runs only once, and
    all epochs train on stored features.

    Args:
        epochs: passes over the training images.
    """
    return {
        "epochs": epochs,
        "batch_size": 256,
        "sampler": "shuffle",
        "augment": False,
        "lr": 30.0,
        "nesterov": False,
        "weight_decay": 0.0,
        "schedule": "multistep",
        "lr_decay": 0.1,
        "milestones": [round(0.6 * epochs), round(0.8 * epochs)],
    }


def linear_probe(
    network: StagedNetwork,
    data: Dataset,
    config: TrainConfig,
    run_dir: Path | str | None = None,
    *,
    network_name: str | None = None,
) -> Trainer:
    """The trainer of a linear classifier on the pooled features of a frozen network.

    The network runs in evaluation mode: once, before the first epoch, or in every epoch if
    ``config.augment`` is set.

    Args:
        network: network whose features are scored. Its classifier is replaced in place by random
            weights of standard deviation 0.01, and trained; nothing else changes. Give a copy if
            the old classifier is still wanted.
        data: data set whose training images teach the classifier, and whose test images score it.
        config: settings of the run; the method must be baseline.
        run_dir: folder that the run is written into, see ``Trainer``; None writes nothing.
        network_name: name in ``mclfast.models`` that the network was built from, if any.

    Raises:
        ValueError: see ``Trainer``.
    """
    generator = torch.Generator().manual_seed(config.seed)
    classifier = linear_classifier(network, "network")
    with torch.no_grad():
        classifier.weight.copy_(torch.randn(classifier.weight.shape, generator=generator) * 0.01)
        if classifier.bias is not None:
            classifier.bias.zero_()
    cohort = _FrozenCohort(network)
    method = method_class("baseline")(cohort.feature_dims, config.options)
    kind = Trainer if config.augment else _FeatureTrainer
    names = None if network_name is None else (network_name,)
    return kind(cohort, method, data, config, run_dir, network_names=names)


class _FrozenCohort(Cohort):
    """A network of which only the classifier learns; batch norm statistics are fixed too.

    Takes images [B, C, H, W], or pooled features [B, D] that were computed before.
    """

    def __init__(self, network: StagedNetwork) -> None:
        super().__init__([network], auxiliary_heads=False, projection_dim=None)
        network.requires_grad_(False)
        network.classifier.requires_grad_(True)
        self.eval()

    def train(self, mode: bool = True) -> _FrozenCohort:
        # A trainer switches to training mode: batch norm would normalise by the batch.
        super().train(False)
        return self

    def _stage_outputs(
        self, peer: int, view: Tensor, *rest: Any
    ) -> tuple[StageOutputs, Tensor | None]:
        if view.dim() == 4:
            return super()._stage_outputs(peer, view, *rest)
        return StageOutputs((view,), (self.peers[0].backbone.classifier(view),), view), None


@dataclass(frozen=True)
class _Features:
    """Pooled features [N, D] with labels [N], used like a feed of images."""

    features: Tensor
    labels: Tensor

    def batches(self, rows: Tensor, *, first_step: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for index in rows.to(self.labels.device):
            yield self.features[index], self.labels[index], index

    def throughput(self) -> dict[str, float]:
        return {}


class _FeatureTrainer(Trainer):
    """Trains a ``_FrozenCohort`` on features that are computed once, before the first epoch."""

    def __init__(self, *arguments: Any, **names: Any) -> None:
        super().__init__(*arguments, **names)
        self._compute_features()

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        # The checkpoint has replaced the backbone.
        self._compute_features()

    def _compute_features(self) -> None:
        self.feed: Any = self._features(self.data.train)
        self._tested = self._features(self.data.test)

    @torch.no_grad()
    def _features(self, source: ImageSource) -> _Features:
        batches = batches_for(self.cohort, source, self.data, self.config.eval_batch_size)
        parts = [(self.cohort(x).final_features[0].clone(), y) for x, y in batches]
        features, labels = zip(*parts, strict=True)
        return _Features(torch.cat(features), torch.cat(labels))

    @torch.no_grad()
    def _rehearse_evaluation(self) -> None:
        """Nothing: the features that an evaluation takes are there already."""

    def _accuracy(self) -> CohortAccuracy:
        (logits,) = self.cohort(self._tested.features).final_logits
        reached = 100.0 * float((logits.argmax(1) == self._tested.labels).double().mean())
        return CohortAccuracy((reached,), reached, reached)
