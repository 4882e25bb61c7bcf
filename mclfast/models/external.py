"""Networks of timm and torchvision by name, cut into stages."""

import copy

import torch
from torch import nn

from mclfast._base.checks import shortened
from mclfast._base.optional import optional_import
from mclfast.models.cutting import find_stages
from mclfast.models.staged import StagedNetwork, staged

PREFIXES = ("timm:", "torchvision:")

#: Side of the image that is followed through a network; most networks are made for this size.
_SIDE = 224


def is_external(name: str) -> bool:
    """Whether a name asks for a network of another package, such as "timm:resnet18"."""
    return name.startswith(PREFIXES)


def create_external(name: str, *, num_classes: int | None, in_channels: int) -> StagedNetwork:
    """Build a network of timm or torchvision with newly drawn weights, in stages.

    Args:
        name: "timm:" or "torchvision:" and the package's own name for the network.
        num_classes: number of logits C; None for the package's default.
        in_channels: channels of the input image; torchvision's networks have 3.

    Raises:
        MissingOptionalError: the package cannot be imported.
        ValueError: the package does not know the name, or no stages are found in the network.
    """
    package, _, inner = name.partition(":")
    classes = {} if num_classes is None else {"num_classes": num_classes}
    if package == "torchvision":
        if in_channels != 3:
            raise ValueError(f"in_channels: expected 3 for {name}, got {in_channels}")
        library = optional_import("torchvision.models", extra="vision")
        # Its other networks, for boxes and masks, start from downloaded weights by default.
        if inner not in library.list_models(module=library):
            raise ValueError(f"name: expected a classifier of torchvision, got {inner!r}")
        build, more = library.get_model, {}
    else:
        build = optional_import("timm", extra="vision").create_model
        more = {"in_chans": in_channels}
    try:
        module = build(inner, **classes, **more)
    # An unknown name and an argument that the network does not take raise errors of many types.
    except Exception as error:
        raise ValueError(
            f"name: expected a network of {package}, got {inner!r} ({_line(error)})"
        ) from error
    return in_stages(module, name, in_channels=in_channels)


def in_stages(module: nn.Module, name: str, *, in_channels: int = 3) -> StagedNetwork:
    """Cut a network where the size of its maps changes, from a quarter of the image size on.

    Layers at the full or half size form the stem. A network of blocks whose tokens keep their
    number is cut into up to four equal parts. Layers with parameters between the last stage and the
    classifier form the tail.

    Args:
        module: network from [B, in_channels, H, W] to logits [B, C] whose modules follow each
            other.
        name: name of the network in the error message.
        in_channels: channels of the input image.

    Raises:
        ValueError: fewer than two stages are found, or they do not follow each other.
    """
    try:
        followed = copy.deepcopy(module).to("meta", torch.float32).eval()
        image = torch.empty(2, in_channels, _SIDE, _SIDE, device="meta")
        cut = find_stages(followed, image)
        with torch.no_grad():
            staged(followed, cut.stages, **cut.options()).forward_taps(image)
    except Exception as error:
        raise ValueError(
            f"name: expected a network of two or more stages that follow each other, got {name} "
            f"({_line(error)}); name its stages yourself with mclfast.staged"
        ) from error
    return staged(module, cut.stages, **cut.options())


def _line(error: Exception) -> str:
    return shortened(" ".join(str(error).split()) or type(error).__name__, 160)
