"""Where a network of another package can be cut into stages: an image is followed through it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mclfast.models.pooling import Pool
from mclfast.models.staged import first_tensor

#: A network of equal blocks is cut into at most so many stages, as many as most networks have.
_MOST = 4

#: Layers that a head may leave out between its tail and its classifier.
_WITHOUT_EFFECT = (nn.Identity, nn.Dropout, nn.Flatten, nn.AdaptiveAvgPool2d)


@dataclass(frozen=True)
class Cut:
    """Arguments of :func:`mclfast.models.staged.staged` for a network.

    Attributes:
        stages: names of the modules of each stage.
        tail: names of the modules between the last stage and the pooling.
        classifier: name of the classifier.
        pool: how the network pools its last map.
    """

    stages: list[list[str]]
    tail: list[str]
    classifier: str
    pool: Pool

    def options(self) -> dict[str, Any]:
        """The arguments by name, but for the stages."""
        return {"tail": self.tail, "classifier": self.classifier, "pool": self.pool}


class _Step(NamedTuple):
    """A module that the image runs through, and the height of the map that it puts out."""

    name: str
    module: nn.Module
    side: int


class _Followed:
    """What the modules of a network took and gave when an image ran through it."""

    def __init__(self, module: nn.Module, image: Tensor) -> None:
        self.module = module
        #: In the order in which the modules were done.
        self.outputs: dict[nn.Module, Tensor] = {}
        self.inputs: dict[nn.Module, Tensor] = {}
        hooks = [m.register_forward_pre_hook(self._before) for m in module.modules()]
        hooks += [m.register_forward_hook(self._after) for m in module.modules()]
        with torch.no_grad():
            self.logits = module(image)
        for hook in hooks:
            hook.remove()
        self.names = {m: name for name, m in module.named_modules()}
        self.order = {m: index for index, m in enumerate(self.outputs)}

    def _before(self, called: nn.Module, args: tuple[object, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            self.inputs[called] = args[0]

    def _after(self, called: nn.Module, _: object, output: object) -> None:
        found = first_tensor(output)
        if isinstance(found, Tensor):
            self.outputs[called] = found

    def classifier(self) -> nn.Module:
        """The layer that gives the logits, or the last one that gives a map of them.

        Raises:
            ValueError: there is none.
        """
        linear = [
            m for m, out in self.outputs.items() if isinstance(m, nn.Linear) and out is self.logits
        ]
        if linear:
            return linear[-1]
        count = self.logits.shape[1] if isinstance(self.logits, Tensor) else None
        last = [m for m in self.outputs if isinstance(m, (nn.Linear, nn.Conv2d))][-1:]
        if not last or not isinstance(last[0], nn.Conv2d) or last[0].out_channels != count:
            raise ValueError("its logits are not the output of a Linear")
        return last[0]

    def steps(self) -> list[_Step]:
        """The modules that maps run through, in order."""
        return sorted(self._walk(self.module), key=lambda step: self.order[step.module])

    def _walk(self, parent: nn.Module) -> Iterator[_Step]:
        for child in parent.children():
            given, output = self.inputs.get(child), self.outputs.get(child)
            if given is None or output is None or given.dim() != 4 or output.dim() != 4:
                continue
            # A container of several stages is not a stage itself.
            if isinstance(child, nn.Sequential) and given.shape[2] > 2 * output.shape[2] + 1:
                yield from self._walk(child)
            else:
                yield _Step(self.names[child], child, output.shape[2])

    def between(self, first: nn.Module, last: nn.Module) -> list[nn.Module]:
        """The outermost modules that ran after one module and before another."""
        found: list[nn.Module] = []
        for m in self.outputs:
            parts = set(m.modules())
            if first in parts or last in parts:
                continue
            if self.order[first] < self.order[m] < self.order[last]:
                # An outer module is done after its parts.
                found = [other for other in found if other not in parts]
                found.append(m)
        return found


def find_stages(module: nn.Module, image: Tensor) -> Cut:
    """Finds stages, tail, classifier and pooling of a network.

    Args:
        module: network to look at, in evaluation mode; a copy on the device "meta" costs nothing.
        image: images [B, in_channels, H, W] that are followed through it.

    Raises:
        ValueError: fewer than two stages are found, or no classifier.
    """
    followed = _Followed(module, image)
    classifier = followed.classifier()
    side = image.shape[2]
    inside = [step for step in followed.steps() if step.module is not classifier]
    if isinstance(classifier, nn.Conv2d):
        # Beside it lie layers that run on the map of logits.
        inside = [s for s in inside if followed.order[s.module] < followed.order[classifier]]
    stages = [
        [step.module for step in inside if step.side == at]
        for at in sorted({step.side for step in inside}, reverse=True)
        if 1 < at <= side // 4
    ]
    stages = _with_parameters(stages)
    if len(stages) < 2:
        stages = _equal_parts(followed) or stages
    if len(stages) < 2:
        raise ValueError(f"found {len(stages)}")
    tail = followed.between(stages[-1][-1], classifier)
    # Without parameters after the last stage, the final map is the one before the pooling.
    if not any(True for m in tail for _ in m.parameters()):
        tail = []
    last = followed.outputs[(tail or stages[-1])[-1]]
    if last.dim() == 2 and followed.outputs[tail[0]].dim() == 3:
        # The pooling of tokens is no module, which what comes behind it would have to follow.
        while tail and isinstance(tail[-1], _WITHOUT_EFFECT):
            tail.pop()
        last = followed.outputs[(tail or stages[-1])[-1]]
    pool: Pool = "first" if _takes_first(last, followed.inputs[classifier]) else "mean"
    names = followed.names
    return Cut(
        [[names[m] for m in stage] for stage in stages],
        [names[m] for m in tail],
        names[classifier],
        pool,
    )


def _with_parameters(stages: list[list[nn.Module]]) -> list[list[nn.Module]]:
    """Stages of poolings alone go to the stage that follows; at the end they are none."""
    found: list[list[nn.Module]] = []
    waiting: list[nn.Module] = []
    for stage in stages:
        waiting = [*waiting, *stage]
        if any(True for m in stage for _ in m.parameters()):
            found.append(waiting)
            waiting = []
    return found


def _equal_parts(followed: _Followed) -> list[list[nn.Module]]:
    """The longest list of blocks that give tokens [B, N, D] of one shape, in up to four parts."""
    longest: list[nn.Module] = []
    for container in followed.module.modules():
        if not isinstance(container, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            continue
        blocks = list(container.children())
        outputs = [followed.outputs.get(block) for block in blocks]
        shapes = {None if out is None else tuple(out.shape) for out in outputs}
        alike = len(shapes) == 1 and None not in shapes and len(set(map(type, blocks))) == 1
        if alike and len(next(iter(shapes)) or ()) == 3 and len(blocks) > len(longest):
            longest = blocks
    count = min(_MOST, len(longest))
    ends = [len(longest) * i // count for i in range(count + 1)] if count else [0]
    return [longest[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]


def _takes_first(tokens: Tensor, feature: Tensor) -> bool:
    """Whether a feature [B, D] is the first of tokens [B, N, D], in the same memory."""
    if tokens.dim() != 3 or feature.dim() != 2:
        return False
    shared = feature.untyped_storage()._cdata == tokens.untyped_storage()._cdata
    first = tokens[:, 0]
    return shared and (first.storage_offset(), first.stride()) == (
        feature.storage_offset(),
        feature.stride(),
    )
