"""One deployable backbone per peer: safetensors weights beside a small JSON description."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mclfast import models
from mclfast._base.checks import shortened
from mclfast._base.files import read_json, replacing, write_json
from mclfast._base.optional import optional_import
from mclfast._version import __version__
from mclfast.config import TrainConfig
from mclfast.data.dataset import Dataset
from mclfast.models.staged import StagedNetwork, class_name

WEIGHTS, DESCRIPTION = "backbone.safetensors", "backbone.json"


@dataclass(frozen=True)
class Exported:
    """A backbone read back, and what was said of it when it was written.

    Attributes:
        network: the bare network, in evaluation mode.
        description: network name, input, normalisation, data set and recorded accuracy.
    """

    network: StagedNetwork
    description: dict[str, Any]


def export_backbone(
    backbone: nn.Module, folder: Path, *, network: str | None, description: dict[str, Any]
) -> Path:
    """Writes the weights of a bare backbone and its description into ``folder``.

    Args:
        backbone: the network without auxiliary or projection heads.
        folder: made if absent; an earlier export in it is replaced.
        network: registered name, see ``mclfast.models.available``; None for a network of your
            own, whose weights only ``load_state_dict`` of the same class can read back.
        description: JSON values kept beside the weights; ``num_classes`` and ``in_channels`` are
            needed to read the network back.

    Returns:
        The folder.
    """
    safetensors = optional_import("safetensors.torch", extra="train")
    tensors = {k: v.detach().cpu().contiguous() for k, v in backbone.state_dict().items()}
    with replacing(folder / WEIGHTS) as partial:
        safetensors.save_file(tensors, partial)
    write_json(folder / DESCRIPTION, {"network": network, "mclfast": __version__, **description})
    return folder


def describe(
    backbone: StagedNetwork,
    data: Dataset,
    config: TrainConfig,
    *,
    own_parts: bool,
    epochs: int,
    accuracy: float | None,
) -> dict[str, Any]:
    """The description of a peer of a run, for :func:`export_backbone`.

    Args:
        backbone: the peer's network without heads.
        data: the training set's name and sizes.
        config: the run's settings.
        own_parts: whether networks and data are a program's own, without a name to load them by.
        epochs: trained so far.
        accuracy: test accuracy of the peer's own classifier in percent, None before an epoch.
    """
    return {
        "class": class_name(backbone),
        "num_classes": data.num_classes,
        "in_channels": data.in_channels,
        "image_size": data.image_size,
        "mean": data.mean,
        "std": data.std,
        "class_names": data.class_names,
        "data": None if own_parts else config.data,
        "data_root": config.data_root,
        "train_per_class": config.train_per_class,
        "eval_batch_size": config.eval_batch_size,
        "method": config.method,
        "seed": config.seed,
        "epochs_trained": epochs,
        "accuracy": accuracy,
    }


def load_backbone(folder: Path | str) -> Exported:
    """Reads a backbone written by :func:`export_backbone`.

    Raises:
        FileNotFoundError: no export in the folder.
        ValueError: a damaged file, an unknown network, or weights that do not fit it.
    """
    safetensors = optional_import("safetensors", extra="train")
    load_file = optional_import("safetensors.torch", extra="train").load_file
    folder = Path(folder)
    description = read_json(folder / DESCRIPTION, "export")
    wanted = ("network", "num_classes", "in_channels")
    values: list[Any] = [description.get(key) for key in wanted]
    name, *counts = values
    if name is None and "network" in description:
        raise ValueError(
            f"export: expected a network of mclfast.models, got {description.get('class')} of a "
            f"program's own in {folder}; read the weights with load_state_dict of that class"
        )
    if not (isinstance(name, str) and all(isinstance(n, int) and n > 0 for n in counts)):
        raise ValueError(
            f"export: expected {', '.join(wanted)} in {folder / DESCRIPTION}, got {values}"
        )
    if name not in models.available() and not models.is_external(name):
        raise ValueError(
            f"export: expected a network of mclfast.models in {folder / DESCRIPTION}, got {name!r}"
        )
    network = models.create(name, num_classes=counts[0], in_channels=counts[1])
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"export: expected a file {folder / WEIGHTS}, found none")
    try:
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (safetensors.SafetensorError, RuntimeError) as error:
        # A network of another kind lacks hundreds of names.
        reason = shortened(" ".join(str(error).split()), 200)
        raise ValueError(
            f"export: expected intact weights of {name} in {folder / WEIGHTS}, got: {reason}"
        ) from None
    return Exported(network.eval(), description)
