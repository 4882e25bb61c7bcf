"""An exported backbone on another data set: a new classifier alone, or the whole network.

    config = transfer_config("runs/mine/peer0", "linear", {"data": "digits-full"})
    result = transfer("runs/mine/peer0", "linear", config, "runs/mine-on-digits")

Both modes are runs of the ordinary ``Trainer`` with the method baseline on a cohort of one
network. ``published_config`` gives the settings of published linear evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from mclfast import models
from mclfast._base.checks import unknown_name
from mclfast._base.settings import coerce
from mclfast.cohort.cohort import Cohort
from mclfast.config import TrainConfig
from mclfast.data import has_image_size
from mclfast.data.dataset import with_channels
from mclfast.execution.parts import load_images
from mclfast.methods import method_class
from mclfast.models.staged import StagedNetwork
from mclfast.train.export import load_backbone
from mclfast.train.history import RunResult
from mclfast.train.probe import linear_probe, published_settings
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
    """Fields of ``TrainConfig`` that a mode sets unless a value is given.

    Args:
        mode: "linear" or "finetune".
    """
    _check_mode(mode)
    return {**_COMMON, **DEFAULTS[mode], "method": "baseline"}


def transfer_config(
    folder: Path | str,
    mode: str,
    values: Mapping[str, Any] | None = None,
    *,
    allow_external: bool = False,
) -> TrainConfig:
    """The settings of a transfer: the defaults of the mode, replaced by ``values``.

    Args:
        folder: folder of an exported backbone.
        mode: "linear" or "finetune".
        values: fields of ``TrainConfig``; cohort and method are always those of the transfer.
        allow_external: see ``load_backbone``.

    Raises:
        FileNotFoundError, ValueError: see ``load_backbone`` and ``TrainConfig.from_values``.
    """
    usual = default_settings(mode)
    network = load_backbone(folder, allow_external=allow_external).description["network"]
    return TrainConfig.from_values(
        {**usual, **(values or {}), "method": "baseline", "cohort": [network]}
    )


def published_config(
    folder: Path | str, values: Mapping[str, Any] | None = None, *, allow_external: bool = False
) -> TrainConfig:
    """The settings of a published linear evaluation, replaced by ``values``.

    Features are scored on the data set that the backbone was trained on, unless ``values`` name
    another one.

    Args:
        folder: folder of an exported backbone.
        values: fields of ``TrainConfig``. The milestones follow from ``epochs``, see
            ``published_settings``.
        allow_external: see ``load_backbone``.

    Raises:
        FileNotFoundError, ValueError: see ``transfer_config``; ValueError also if neither the
            values nor the export name a data set.
    """
    values = dict(values or {})
    about = load_backbone(folder, allow_external=allow_external).description
    name = values.setdefault("data", about.get("data"))
    if name is None:
        raise ValueError(f"data: expected --data, as {folder} names no data set, got none")
    if name == about.get("data"):
        for key in ("data_root", "train_per_class"):
            values.setdefault(key, about.get(key))
    if has_image_size(name):
        values.setdefault("image_size", about.get("image_size"))
    epochs = coerce("epochs", int, values.get("epochs", 100))
    settings = published_settings(epochs) | values
    return transfer_config(folder, "linear", settings, allow_external=allow_external)


def transfer(
    folder: Path | str,
    mode: Mode,
    config: TrainConfig,
    run_dir: Path | str | None = None,
    *,
    progress: bool = True,
    allow_external: bool = False,
) -> RunResult:
    """Trains an exported backbone on the data set of a config, see ``build_transfer``."""
    trainer = build_transfer(folder, mode, config, run_dir, allow_external=allow_external)
    return trainer.fit(progress=progress)


def build_transfer(
    folder: Path | str,
    mode: Mode,
    config: TrainConfig,
    run_dir: Path | str | None = None,
    *,
    allow_external: bool = False,
) -> Trainer:
    """The trainer of a transfer; the seed fixes the new classifier.

    Images are normalised by the statistics of their own set. Grey images are repeated in every
    channel of a backbone that takes several.

    Args:
        folder: folder of an exported backbone; its classifier is replaced by a new one.
        mode: "finetune" trains all weights, "linear" only the classifier, see ``linear_probe``.
        config: settings made by ``transfer_config`` or ``published_config``. A training set
            smaller than a batch makes one batch.
        run_dir: folder that the run is written into, see ``Trainer``; None writes nothing.
        allow_external: see ``load_backbone``.

    Raises:
        FileNotFoundError, ValueError: see ``load_backbone``; ValueError also for images whose
            channels do not fit the backbone, and for an unknown mode.
    """
    _check_mode(mode)
    exported = load_backbone(folder, allow_external=allow_external)
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
    """Removes backbone and mode of a transfer from a run's settings, and returns both.

    Args:
        values: settings of a run, as read from its folder.

    Returns:
        Folder of the backbone and mode; None if the run is not a transfer.
    """
    if not {"transfer_from", "transfer_mode"} <= values.keys():
        return None
    return Path(values.pop("transfer_from")), values.pop("transfer_mode")


def copy_backbone(source: StagedNetwork, target: StagedNetwork) -> None:
    """Copies all weights and statistics except the classifier's."""
    own = {id(value) for value in target.classifier.state_dict(keep_vars=True).values()}
    kept = {k for k, value in target.state_dict(keep_vars=True).items() if id(value) in own}
    state = {k: v for k, v in source.state_dict().items() if k not in kept}
    target.load_state_dict({**target.state_dict(), **state})


def _check_mode(mode: str) -> None:
    if mode not in get_args(Mode):
        raise unknown_name("mode", mode, get_args(Mode))
