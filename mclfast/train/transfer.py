"""An exported backbone on another data set: a new classifier alone, or the whole network.

    config = transfer_config("runs/mine/peer0", "linear", {"data": "digits-full"})
    result = transfer("runs/mine/peer0", "linear", config, "runs/mine-on-digits")

Both are runs of the ordinary `Trainer` with the method baseline on a cohort of one network; for a
score of the features alone, under published settings, there is ``mclfast linear``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from mclfast import models
from mclfast._base.checks import unknown_name
from mclfast.cohort.cohort import Cohort
from mclfast.config import TrainConfig
from mclfast.data.dataset import with_channels
from mclfast.execution.parts import load_images
from mclfast.methods import method_class
from mclfast.models.staged import StagedNetwork
from mclfast.train.export import load_backbone
from mclfast.train.history import RunResult
from mclfast.train.probe import linear_probe
from mclfast.train.trainer import Trainer

Mode = Literal["linear", "finetune"]

# linear: a linear classifier on fixed features, as self-supervised networks are compared;
# finetune: a tenth of the usual learning rate, for weights that are good already.
DEFAULTS: dict[str, dict[str, Any]] = {
    "linear": {"epochs": 60, "lr": 0.1, "weight_decay": 0.0, "augment": False},
    "finetune": {"epochs": 30, "lr": 0.01, "weight_decay": 5e-4, "augment": True},
}
_COMMON = {"sampler": "shuffle", "batch_size": 64}


def default_settings(mode: str) -> dict[str, Any]:
    """Fields of `TrainConfig` that a mode sets where nothing else is said."""
    _check_mode(mode)
    return {**_COMMON, **DEFAULTS[mode], "method": "baseline"}


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
    usual = default_settings(mode)
    network = load_backbone(folder).description["network"]
    return TrainConfig.from_values(
        {**usual, **(values or {}), "method": "baseline", "cohort": [network]}
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
        mode: "finetune" trains all weights, "linear" the classifier alone, see `linear_probe`.
        config: as of `transfer_config`. A set with fewer images than a batch makes one batch.
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
    config = replace(config, batch_size=min(config.batch_size, len(data.train)))
    if mode == "linear":
        trainer = linear_probe(network, data, config, run_dir, network_name=name)
    else:
        cohort = Cohort([network], auxiliary_heads=False, projection_dim=None)
        method = method_class("baseline")(cohort.feature_dims, config.options)
        trainer = Trainer(cohort, method, data, config, run_dir, network_names=(name,))
    trainer.origin = {"transfer_from": str(folder), "transfer_mode": mode}
    return trainer


def split_origin(values: dict[str, Any]) -> tuple[Path, Any] | None:
    """Takes backbone and mode of a transfer out of the settings of a run; None for other runs."""
    if not {"transfer_from", "transfer_mode"} <= values.keys():
        return None
    return Path(values.pop("transfer_from")), values.pop("transfer_mode")


def copy_backbone(source: StagedNetwork, target: StagedNetwork) -> None:
    """Copies all weights and statistics but those of the classifier."""
    own = {id(value) for value in target.classifier.state_dict(keep_vars=True).values()}
    kept = {k for k, value in target.state_dict(keep_vars=True).items() if id(value) in own}
    state = {k: v for k, v in source.state_dict().items() if k not in kept}
    target.load_state_dict({**target.state_dict(), **state})


def _check_mode(mode: str) -> None:
    if mode not in get_args(Mode):
        raise unknown_name("mode", mode, get_args(Mode))
