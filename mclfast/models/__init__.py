"""Networks in stages, their auxiliary heads, and the registry of named networks."""

from collections.abc import Callable

from mclfast._base.checks import unknown_name
from mclfast.models.auxiliary import AuxiliaryHead, PeerNetwork, StageOutputs
from mclfast.models.cifar_shufflenet import (
    CifarShuffleNetV2,
    shufflenet_v2_x0_5_cifar,
    shufflenet_v2_x1_0_cifar,
)
from mclfast.models.counting import macs, parameter_count
from mclfast.models.densenet import CifarDenseNet, densenet_40_12
from mclfast.models.external import create_external, is_external
from mclfast.models.hcgnet import HcgNet, hcgnet_a1, hcgnet_a2
from mclfast.models.imagenet_resnet import ImageNetResNet, resnet18, resnet34, resnet50
from mclfast.models.imagenet_shufflenet import (
    ImageNetShuffleNetV2,
    shufflenet_v2_x0_5,
    shufflenet_v2_x1_0,
)
from mclfast.models.resnet import CifarResNet, resnet8, resnet20, resnet32, resnet56, resnet110
from mclfast.models.staged import StagedNetwork, Taps, staged
from mclfast.models.vgg import Vgg, vgg16
from mclfast.models.wrn import WideResNet, wrn_16_2, wrn_20_8, wrn_28_4, wrn_40_2

__all__ = [
    "AuxiliaryHead",
    "CifarDenseNet",
    "CifarResNet",
    "CifarShuffleNetV2",
    "HcgNet",
    "ImageNetResNet",
    "ImageNetShuffleNetV2",
    "PeerNetwork",
    "StageOutputs",
    "StagedNetwork",
    "Taps",
    "Vgg",
    "WideResNet",
    "available",
    "create",
    "densenet_40_12",
    "hcgnet_a1",
    "hcgnet_a2",
    "is_external",
    "macs",
    "parameter_count",
    "resnet8",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet50",
    "resnet56",
    "resnet110",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x0_5_cifar",
    "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_0_cifar",
    "staged",
    "vgg16",
    "wrn_16_2",
    "wrn_20_8",
    "wrn_28_4",
    "wrn_40_2",
]

_NETWORKS: dict[str, Callable[..., StagedNetwork]] = {
    network.__name__: network
    for network in (
        resnet8,
        resnet20,
        resnet32,
        resnet56,
        resnet110,
        wrn_16_2,
        wrn_40_2,
        wrn_28_4,
        wrn_20_8,
        shufflenet_v2_x0_5_cifar,
        shufflenet_v2_x1_0_cifar,
        vgg16,
        densenet_40_12,
        hcgnet_a1,
        hcgnet_a2,
        resnet18,
        resnet34,
        resnet50,
        shufflenet_v2_x0_5,
        shufflenet_v2_x1_0,
    )
}


def available() -> list[str]:
    """Names of this package's own networks."""
    return list(_NETWORKS)


def create(name: str, *, num_classes: int | None = None, in_channels: int = 3) -> StagedNetwork:
    """Build a named network with newly drawn weights.

    Args:
        name: one of :func:`available`, or "timm:" or "torchvision:" and a name of that package
            (extra ``vision``), whose network is cut where the size of its maps changes.
        num_classes: number of logits C; None for the number of classes of the network's own data
            set, 100 for CIFAR-100 or 1000 for ImageNet.
        in_channels: channels of the input image [B, in_channels, H, W].

    Raises:
        ValueError: the name is unknown, or no stages are found in a network of another package.
        MissingOptionalError: timm or torchvision cannot be imported.
    """
    if is_external(name):
        return create_external(name, num_classes=num_classes, in_channels=in_channels)
    if name not in _NETWORKS:
        raise unknown_name("name", name, _NETWORKS)
    classes = {} if num_classes is None else {"num_classes": num_classes}
    return _NETWORKS[name](in_channels=in_channels, **classes)
