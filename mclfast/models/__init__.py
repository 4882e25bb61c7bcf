"""Networks in stages, their auxiliary heads, and the registry of named networks."""

from collections.abc import Callable

from mclfast._checks import unknown_name
from mclfast.models.auxiliary import AuxiliaryHead, PeerNetwork, StageOutputs
from mclfast.models.counting import macs, parameter_count
from mclfast.models.resnet import (
    CifarResNet,
    resnet8,
    resnet20,
    resnet32,
    resnet56,
    resnet110,
)
from mclfast.models.staged import StagedNetwork, Taps, staged
from mclfast.models.wrn import WideResNet, wrn_16_2, wrn_28_4, wrn_40_2

__all__ = [
    "AuxiliaryHead",
    "CifarResNet",
    "PeerNetwork",
    "StageOutputs",
    "StagedNetwork",
    "Taps",
    "WideResNet",
    "available",
    "create",
    "macs",
    "parameter_count",
    "resnet8",
    "resnet20",
    "resnet32",
    "resnet56",
    "resnet110",
    "staged",
    "wrn_16_2",
    "wrn_28_4",
    "wrn_40_2",
]

_NETWORKS: dict[str, Callable[..., StagedNetwork]] = {
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "wrn_16_2": wrn_16_2,
    "wrn_40_2": wrn_40_2,
    "wrn_28_4": wrn_28_4,
}


def available() -> list[str]:
    """Names that :func:`create` accepts."""
    return list(_NETWORKS)


def create(name: str, *, num_classes: int = 100, in_channels: int = 3) -> StagedNetwork:
    """Build a named network with newly drawn weights.

    Args:
        name: one of :func:`available`.
        num_classes: number of logits C.
        in_channels: channels of the input image [B, in_channels, H, W].

    Raises:
        ValueError: unknown ``name``.
    """
    if name not in _NETWORKS:
        raise unknown_name("name", name, _NETWORKS)
    return _NETWORKS[name](num_classes=num_classes, in_channels=in_channels)
