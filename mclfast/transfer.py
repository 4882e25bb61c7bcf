"""An exported backbone on another data set: a new classifier alone, or the whole network.

    config = transfer_config("runs/mine/peer0", "linear", {"data": "digits-full"})
    result = transfer("runs/mine/peer0", "linear", config, "runs/mine-on-digits")

Both are runs of the ordinary `Trainer` with the method baseline on a cohort of one network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mclfast import models
from mclfast._checks import unknown_name
from mclfast.cohort import Cohort, PeerOutputs
from mclfast.config import TrainConfig
from mclfast.data.channels import with_channels
from mclfast.data.dataset import Dataset
from mclfast.data.source import ImageSource
from mclfast.evaluate import batches_for
from mclfast.export import load_backbone
from mclfast.methods import method_class
from mclfast.models.staged import StagedNetwork
from mclfast.train import RunResult, Trainer, load_images

Mode = Literal["linear", "finetune"]

# linear: a linear classifier on fixed features, as self-supervised networks are compared;
# finetune: a tenth of the usual learning rate, for weights that are good already.
DEFAULTS: dict[str, dict[str, Any]] = {
    "linear": {"epochs": 60, "lr": 0.1, "weight_decay": 0.0, "augment": False},
    "finetune": {"epochs": 30, "lr": 0.01, "weight_decay": 5e-4, "augment": True},
}
_COMMON = {"sampler": "shuffle", "batch_size": 64}


def transfer_config(
    folder: Path | str, mode: str, values: Mapping[str, Any] | None = None
) -> TrainConfig:
    """The settings of a transfer: those of the mode, and `values` over them.

    Args:
        folder: of an exported backbone.
        mode: "linear" or "finetune".
        values: fields of `TrainConfig`; cohort and method are given by the transfer.

    Raises:
        FileNotFoundError, ValueError: see `load_backbone` and `TrainConfig.from_values`.
    """
    _check_mode(mode)
    network = load_backbone(folder).description["network"]
    return TrainConfig.from_values(
        {**_COMMON, **DEFAULTS[mode], **(values or {}), "method": "baseline", "cohort": [network]}
    )


def transfer(
    folder: Path | str,
    mode: Mode,
    config: TrainConfig,
    run_dir: Path | str | None = None,
    *,
    progress: bool = True,
) -> RunResult:
    """Trains an exported backbone on the data set of a config, see `build_transfer`."""
    return build_transfer(folder, mode, config, run_dir).fit(progress=progress)


def build_transfer(
    folder: Path | str, mode: Mode, config: TrainConfig, run_dir: Path | str | None = None
) -> Trainer:
    """The trainer of a transfer; the seed fixes the new classifier.

    Images are normalised by the statistics of their own set, and grey ones are repeated for a
    backbone of several channels.

    Args:
        folder: of an exported backbone; its classifier is replaced by a new one.
        mode: "finetune" trains all weights. "linear" trains the classifier alone on features in
            evaluation mode; without augmentation they are computed once.
        config: as of `transfer_config`.
        run_dir: as of `Trainer`.

    Raises:
        FileNotFoundError, ValueError: see `load_backbone`; images whose channels do not fit the
            backbone; an unknown mode.
    """
    _check_mode(mode)
    exported = load_backbone(folder)
    name, channels = (exported.description[key] for key in ("network", "in_channels"))
    data = with_channels(load_images(config), channels)
    torch.manual_seed(config.seed)
    network = models.create(name, num_classes=data.num_classes, in_channels=channels)
    copy_backbone(exported.network, network)
    origin = {"transfer_from": str(folder), "transfer_mode": mode}
    if mode == "finetune":
        cohort = Cohort([network], auxiliary_heads=False, projection_dim=None)
        return _TransferTrainer(cohort, data, config, run_dir, name, origin)
    kind = _TransferTrainer if config.augment else _FeatureTrainer
    return kind(LinearProbe(network), data, config, run_dir, name, origin)


def copy_backbone(source: StagedNetwork, target: StagedNetwork) -> None:
    """Copies all weights and statistics but those of the classifier."""
    own = {id(value) for value in target.classifier.state_dict(keep_vars=True).values()}
    kept = {k for k, value in target.state_dict(keep_vars=True).items() if id(value) in own}
    state = {k: v for k, v in source.state_dict().items() if k not in kept}
    target.load_state_dict({**target.state_dict(), **state})


class LinearProbe(Cohort):
    """A network whose classifier alone learns; all else is fixed, batch statistics too.

    Takes images [B, C, H, W], or pooled features [B, D] that were computed before.
    """

    def __init__(self, network: StagedNetwork) -> None:
        super().__init__([network], auxiliary_heads=False, projection_dim=None)
        network.requires_grad_(False)
        network.classifier.requires_grad_(True)
        self.eval()

    @property
    def backbone(self) -> StagedNetwork:
        """The network."""
        return self.peers[0].backbone

    def train(self, mode: bool = True) -> LinearProbe:
        # A trainer switches to training mode: batch norm would normalise by the batch.
        super().train(False)
        return self

    def forward(self, images: Tensor | Sequence[Tensor]) -> PeerOutputs:
        if not isinstance(images, Tensor) or images.dim() == 4:
            return super().forward(images)
        return PeerOutputs(((images,),), ((self.backbone.classifier(images),),), ())


class _TransferTrainer(Trainer):
    """A trainer whose run says where the weights came from.

    The two entries keep `mclfast train --resume` from going on with it as with an ordinary run.
    """

    def __init__(
        self,
        cohort: Cohort,
        data: Dataset,
        config: TrainConfig,
        run_dir: Path | str | None,
        name: str,
        origin: dict[str, str],
    ) -> None:
        self._origin = origin
        method = method_class("baseline")(cohort.feature_dims, config.options)
        super().__init__(cohort, method, data, config, run_dir, network_names=(name,))

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | self._origin


@dataclass(frozen=True)
class _Features:
    """Pooled features [N, D] with labels [N], in the place of a feed of images."""

    features: Tensor
    labels: Tensor

    def batches(self, rows: Tensor, *, first_step: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for index in rows.to(self.labels.device):
            yield self.features[index], self.labels[index], index

    def throughput(self) -> dict[str, float]:
        return {}


class _FeatureTrainer(_TransferTrainer):
    """Trains a `LinearProbe` on features that are computed once, before the first epoch."""

    def __init__(self, cohort: LinearProbe, *arguments: Any) -> None:
        super().__init__(cohort, *arguments)
        self.feed: Any = self._features(self.data.train)
        self._tested = self._features(self.data.test)

    @torch.no_grad()
    def _features(self, source: ImageSource) -> _Features:
        batches = batches_for(self.cohort, source, self.data, self.config.eval_batch_size)
        parts = [(self.cohort(x).final_features[0].clone(), y) for x, y in batches]
        features, labels = zip(*parts, strict=True)
        return _Features(torch.cat(features), torch.cat(labels))

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        (logits,) = self.cohort(self._tested.features).final_logits
        reached = 100.0 * float((logits.argmax(1) == self._tested.labels).double().mean())
        best = max([reached, *(row["acc_best_head_so_far"] for row in self.history[-1:])])
        return {
            "acc_peer0": reached, "acc_mean": reached, "acc_ensemble": reached,
            "acc_best_head_so_far": best,
        }  # fmt: skip


def _check_mode(mode: str) -> None:
    if mode not in get_args(Mode):
        raise unknown_name("mode", mode, get_args(Mode))
