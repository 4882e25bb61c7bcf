"""One deployable backbone per peer: safetensors weights beside a small JSON description."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mclfast import models
from mclfast._base.checks import shortened
from mclfast._base.files import digest_of_bytes, read_json, replacing, write_sealed_json
from mclfast._base.optional import optional_import
from mclfast._base.schema import TEXT, check_fields, integer, list_of, number, or_none
from mclfast._version import __version__
from mclfast.config import TrainConfig
from mclfast.data.dataset import Dataset
from mclfast.models.staged import StagedNetwork, class_name

WEIGHTS, DESCRIPTION = "backbone.safetensors", "backbone.json"
#: More classes or channels than this are believed only if a tensor in the file has that size.
_USUAL = 4096
#: Key of the description: digest of the file of weights that it was written with.
_DIGEST = "weights_blake2b"

#: Fields of the description that an evaluation reads.
_FOR_EVALUATION = {
    "data": TEXT,
    "data_root": or_none(TEXT),
    # Larger numbers would fill the memory with images before anything could notice.
    "train_per_class": or_none(integer(1, 10**6)),
    "image_size": or_none(integer(1, 2**14)),
    "eval_batch_size": integer(1),
    "accuracy": or_none(number(0, 100)),
    "class_names": list_of(TEXT, 1),
    "mean": list_of(number(-1e6, 1e6), 1),
    "std": list_of(number(0, 1e6), 1),
}


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

    Raises:
        ValueError: a value of the network's state is no tensor that the file can hold.
    """
    weights = weights_of(backbone)
    with replacing(folder / WEIGHTS) as partial:
        partial.write_bytes(weights)
    about = {"network": network, "mclfast": __version__, **description}
    write_sealed_json(folder / DESCRIPTION, about | {_DIGEST: digest_of_bytes(weights)})
    return folder


def weights_of(backbone: nn.Module) -> bytes:
    """Content of the file of weights of a backbone.

    Raises:
        ValueError: a value of the network's state is no tensor that the file can hold.
    """
    safetensors = optional_import("safetensors.torch", extra="train")
    content: bytes = safetensors.save(_separate(backbone.state_dict()))
    return content


def _separate(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state in host memory, each with values of its own.

    Modules under two names and tied tensors are in a state more than once. The file takes no memory
    twice, so that the later ones are copied; ``load_state_dict`` finds every name that it asks for.

    Raises:
        ValueError: a value is no dense tensor.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            what = f"{value.layout} tensor" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"backbone: expected dense tensors alone in its state_dict, got {what} at {name!r}"
            )
        own = value.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.nbytes() and storage.data_ptr() in seen:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        tensors[name] = own
    return tensors


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


def load_backbone(folder: Path | str, *, allow_external: bool = False) -> Exported:
    """Reads a backbone written by :func:`export_backbone`.

    Args:
        folder: folder of the export.
        allow_external: whether the export may name a network of timm or torchvision. Building it
            imports that package, from the current folder if one of that name lies there.

    Raises:
        FileNotFoundError: no export in the folder.
        ValueError: a damaged file, an unknown network, a network of another package that was not
            allowed, weights that do not fit it, or weights that are not finite.
    """
    # First, as without it nothing in the folder is of use.
    safetensors = optional_import("safetensors", extra="train")
    folder = Path(folder)
    description = read_json(folder / DESCRIPTION, "export")
    name, counts = _network_of(description, folder, allow_external)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"export: expected a file {folder / WEIGHTS}, found none")
    try:
        tensors = _tensors((folder / WEIGHTS).read_bytes(), description.pop(_DIGEST, None))
        sizes = {size for tensor in tensors.values() for size in tensor.shape}
        # Before the network is built, as a false number would fill the memory.
        if other := [n for n in counts if n > _USUAL and n not in sizes]:
            raise ValueError(f"no tensor of size {other[0]}")
        network = models.create(name, num_classes=counts[0], in_channels=counts[1])
        network.load_state_dict(tensors)
    except (safetensors.SafetensorError, RuntimeError, ValueError) as error:
        # A network of another kind lacks hundreds of names.
        reason = shortened(" ".join(str(error).split()), 200)
        raise ValueError(
            f"export: expected intact weights of {name} in {folder / WEIGHTS}, got: {reason}"
        ) from None
    return Exported(network.eval(), description)


def check_for_evaluation(description: dict[str, Any], folder: Path) -> None:
    """Accepts a description that says on which images the backbone was tested, and how.

    Args:
        description: as :func:`load_backbone` gave it.
        folder: folder of the export, for the error.

    Raises:
        ValueError: a field is absent or of another kind; the text begins with ``path``.
    """
    check_fields("path", folder / DESCRIPTION, description, _FOR_EVALUATION)


def _network_of(
    description: dict[str, Any], folder: Path, allow_external: bool
) -> tuple[str, list[int]]:
    """Name of the network, and its numbers of classes and channels."""
    wanted = ("network", "num_classes", "in_channels")
    values: list[Any] = [description.get(key) for key in wanted]
    name, *counts = values
    if name is None and "network" in description:
        raise ValueError(
            f"export: expected a network of mclfast.models, got {description.get('class')} of a "
            f"program's own in {folder}; read the weights with load_state_dict of that class"
        )
    if not (isinstance(name, str) and all(type(n) is int and n > 0 for n in counts)):
        raise ValueError(
            f"export: expected {', '.join(wanted)} in {folder / DESCRIPTION}, got "
            + shortened(str(values), 200)
        )
    external = models.is_external(name)
    if name not in models.available() and not (external and allow_external):
        remedy = ""
        if external:
            remedy = (
                "; to build a network of another package, which imports it, allow it: "
                "--allow-external, or allow_external=True in Python"
            )
        raise ValueError(
            f"export: expected a network of mclfast.models in {folder / DESCRIPTION}, got "
            f"{shortened(repr(name), 100)}{remedy}"
        )
    return name, counts


def _tensors(content: bytes, digest: Any) -> dict[str, Tensor]:
    """The tensors in the content of a file of weights, by name.

    Args:
        content: the file.
        digest: digest of the file as it was written; None for an older export.

    Raises:
        SafetensorError: no file of weights.
        ValueError: other content than was written, or values that are not finite.
    """
    load = optional_import("safetensors.torch", extra="train").load
    if digest is not None and digest != digest_of_bytes(content):
        raise ValueError(
            f"other content than {_DIGEST} in {DESCRIPTION} says; if you changed it on purpose, "
            "remove that line and the line blake2b"
        )
    try:
        tensors: dict[str, Tensor] = load(content)
    # A header may name a type that torch lacks.
    except KeyError as error:
        raise ValueError(f"no readable weights ({error})") from None
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"infinite or NaN values in {name}")
    return tensors
