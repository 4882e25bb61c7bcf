"""Networks of timm and torchvision by name, cut into stages by the sizes of their maps."""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mclfast._base.checks import shortened
from mclfast._base.optional import optional_import
from mclfast.models.staged import StagedNetwork, staged

PREFIXES = ("timm:", "torchvision:")

#: Side of the image that is followed through a network; most networks are made for this size.
_SIDE = 224


class _Step(NamedTuple):
    """A module that the image runs through, and the height of the map that it puts out."""

    name: str
    module: nn.Module
    side: int


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

    Layers at the full or half size form the stem. Layers with parameters between the pooling and
    the classifier form the tail.

    Args:
        module: network from [B, in_channels, H, W] to logits [B, C] whose modules follow each
            other.
        name: name of the network in the error message.
        in_channels: channels of the input image.

    Raises:
        ValueError: fewer than two stages are found, or they do not follow each other.
    """
    try:
        followed = copy.deepcopy(module).to("meta").eval()
        image = torch.empty(2, in_channels, _SIDE, _SIDE, device="meta")
        steps, classifier = _follow(followed, image)
        stages = [
            [step for step in steps if step.side == side]
            for side in sorted({step.side for step in steps}, reverse=True)
            if 1 < side <= _SIDE // 4
        ]
        if len(stages) < 2:
            raise ValueError(f"found {len(stages)}")
        pooled = [step for step in steps if step.side == 1]
        # Without parameters after the pooling, the final map is the one before the pooling.
        if not any(p.numel() for step in pooled for p in step.module.parameters()):
            pooled = []
        names = [[step.name for step in stage] for stage in stages]
        tail = [step.name for step in pooled]
        with torch.no_grad():
            staged(followed, names, classifier=classifier, tail=tail).forward_taps(image)
    except Exception as error:
        raise ValueError(
            f"name: expected a network of two or more stages that follow each other, got {name} "
            f"({_line(error)}); name its stages yourself with mclfast.staged"
        ) from error
    return staged(module, names, classifier=classifier, tail=tail)


def _follow(module: nn.Module, image: Tensor) -> tuple[list[_Step], str]:
    """The modules that the image runs through to the last map, and the name of the classifier."""
    outputs: dict[nn.Module, Tensor] = {}
    inputs: dict[nn.Module, int] = {}

    def before(called: nn.Module, args: tuple[object, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].dim() == 4:
            inputs[called] = args[0].shape[2]

    def after(called: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor):
            outputs[called] = output

    hooks = [m.register_forward_pre_hook(before) for m in module.modules()]
    hooks += [m.register_forward_hook(after) for m in module.modules()]
    with torch.no_grad():
        logits = module(image)
    for hook in hooks:
        hook.remove()
    names = {m: name for name, m in module.named_modules()}
    linear = [m for m in outputs if isinstance(m, nn.Linear) and outputs[m] is logits]
    if not linear:
        raise ValueError("its logits are not the output of a Linear")

    def walk(parent: nn.Module) -> Iterator[_Step]:
        for child in parent.children():
            output = outputs.get(child)
            if child not in inputs or output is None or output.dim() != 4:
                continue
            # A container of several stages is not a stage itself.
            if isinstance(child, nn.Sequential) and inputs[child] > 2 * output.shape[2] + 1:
                yield from walk(child)
            else:
                yield _Step(names[child], child, output.shape[2])

    order = {m: index for index, m in enumerate(outputs)}
    steps = sorted(walk(module), key=lambda step: order[step.module])
    return steps, names[linear[-1]]


def _line(error: Exception) -> str:
    return shortened(" ".join(str(error).split()) or type(error).__name__, 160)
