"""Parts that the networks of a cohort share: none, the stem and first stages, or a tree.

A topology says for the stem (level 0) and for every stage (levels 1 to S) which networks use the
same module there. Tail and classifier are always each network's own, so that every peer can be
deployed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mclfast._base.checks import check_integer, unknown_name
from mclfast.models.staged import StagedNetwork

TOPOLOGIES = ("independent", "shared_stem", "tree")


@dataclass(frozen=True)
class Topology:
    """Groups of networks that share a module, level by level.

    Attributes:
        groups: group number of every network, for the stem and for each stage. Networks of one
            group at a level are in one group at all earlier levels.
        rescale_gradients: divide the gradient by the number of branches wherever a path splits
            (the ILR layer of CL-ILR, NeurIPS 2018, arXiv 1805.11761, section 3.2).

    Raises:
        ValueError: levels differ in length, or networks part and meet again.
    """

    groups: tuple[tuple[int, ...], ...]
    rescale_gradients: bool = False

    def __post_init__(self) -> None:
        sizes = [len(level) for level in self.groups]
        if len(set(sizes)) != 1:
            raise ValueError(
                f"groups: expected one group number per network at every level, got {sizes} numbers"
            )
        for level, (before, after) in enumerate(pairwise(self.groups), start=1):
            origin: dict[int, int] = {}
            if any(origin.setdefault(a, b) != b for b, a in zip(before, after, strict=True)):
                raise ValueError(
                    f"groups: expected networks of one group at level {level} to be of one group "
                    f"at the level before, got {before} then {after}"
                )

    @property
    def common_levels(self) -> int:
        """Number of levels that all networks share, counted from the stem."""
        common = [len(set(level)) == 1 for level in self.groups]
        return common.index(False) if False in common else len(common)

    @property
    def shares(self) -> bool:
        """Whether any two networks share a module."""
        return any(len(set(level)) < len(level) for level in self.groups)

    def branches(self, level: int, group: int) -> int:
        """Number of branches that the path of a group splits into behind a level."""
        members = [j for j, g in enumerate(self.groups[level]) if g == group]
        if level + 1 == len(self.groups):
            return len(members)
        return len({self.groups[level + 1][j] for j in members})


def topology(
    name: str, networks: int, stages: int, *, split_stage: int, rescale_gradients: bool = False
) -> Topology:
    """A topology by name.

    Args:
        name: "independent" for nothing shared. "shared_stem" for one stem and one set of the first
            ``split_stage`` stages, with all later stages each network's own. "tree" for a stage
            more that pairs share (networks 0 and 1, 2 and 3, ...) after a shared stem.
        networks: number of networks M.
        stages: number of stages S.
        split_stage: number of stages that all networks share, at least 0 (the stem alone) and below
            S (below S - 1 for a tree).
        rescale_gradients: whether gradients are divided where paths split, as in :class:`Topology`.

    Raises:
        ValueError: the name is unknown, or the split leaves no stage behind it.
    """
    own = tuple(range(networks))
    if name == "independent":
        return Topology((own,) * (stages + 1))
    if name not in TOPOLOGIES:
        raise unknown_name("topology", name, TOPOLOGIES)
    pairs = 1 if name == "tree" else 0
    check_integer("split_stage", split_stage, 0)
    if split_stage >= stages - pairs:
        raise ValueError(
            f"split_stage: expected a value < {stages - pairs} for {stages} stages in a {name} "
            f"topology, got {split_stage}"
        )
    levels = [(0,) * networks] * (split_stage + 1)
    levels += [tuple(j // 2 for j in own)] * pairs
    levels += [own] * (stages + 1 - len(levels))
    return Topology(tuple(levels), rescale_gradients)


def share(networks: Sequence[StagedNetwork], topology: Topology) -> None:
    """Makes the networks use the modules of the first network of their group, in place.

    Raises:
        ValueError: the networks differ in class or settings, were adapted from other modules, or
            differ from the topology in their number or in their number of stages.
    """
    if not topology.shares:
        return
    first = networks[0]
    shapes = [[(n, tuple(p.shape)) for n, p in x.named_parameters()] for x in networks]
    if any(type(x) is not type(first) for x in networks) or any(s != shapes[0] for s in shapes):
        raise ValueError("topology: expected equal networks to share parts, got different ones")
    if type(first).forward_taps is not StagedNetwork.forward_taps:
        raise ValueError(
            "topology: expected networks of mclfast.models to share parts, "
            f"got {type(first).__name__}"
        )
    wanted = len(topology.groups[0]), len(topology.groups) - 1
    if (len(networks), len(first.stages)) != wanted:
        raise ValueError(
            f"topology: expected one for {len(networks)} networks of {len(first.stages)} stages, "
            f"got one for {wanted[0]} of {wanted[1]}"
        )
    for level, groups in enumerate(topology.groups):
        leader: dict[int, StagedNetwork] = {}
        for network, group in zip(networks, groups, strict=True):
            source = leader.setdefault(group, network)
            if source is not network:
                for name in _children_of_level(network, level):
                    setattr(network, name, getattr(source, name))


def _children_of_level(network: StagedNetwork, level: int) -> list[str]:
    """Names of the submodules that make up the stem (level 0) or a stage."""
    names = {id(child): name for name, child in network.named_children()}
    if level > 0:
        return [names[id(network.stages[level - 1])]]
    later = {id(m) for m in (*network.stages, network.tail, network.classifier)}
    return [name for key, name in names.items() if key not in later]


class _DivideGradient(torch.autograd.Function):
    """Identity whose gradient is divided by a number; differentiable twice."""

    @staticmethod
    def forward(ctx, x, parts):  # type: ignore[no-untyped-def]
        ctx.parts = parts
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad / ctx.parts, None


#: One run of a shared module on a view: its level, its group, and the identity of the view.
SharedRun = tuple[int, int, int]


def path_maps(
    networks: Sequence[StagedNetwork],
    topology: Topology,
    peer: int,
    view: Tensor,
    done: dict[SharedRun, Tensor],
    before: Callable[[SharedRun], None] | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """The maps after every stage of one network, through the modules that it shares.

    Args:
        networks: networks that :func:`share` was called with.
        topology: topology that :func:`share` was called with.
        peer: number of the network to run.
        view: images that the network sees, [B, C, H, W].
        done: maps of shared modules, read where an earlier network has computed them, and extended
            by the maps that later networks may need.
        before: function called before each module that is run, with the key of its map in ``done``.

    Returns:
        The maps [B, c, h, w] of the stages, and the last map [B, c, h, w] that all networks share,
        None if they share none.
    """
    network = networks[peer]
    last_common = topology.common_levels - 1
    shared, own, x = None, [], view
    for level, groups in enumerate(topology.groups):
        key = (level, groups[peer], id(view))
        if key in done:
            x = done[key]
        else:
            if before is not None:
                before(key)
            x = network.stages[level - 1](x) if level else network.stem_forward(x)
            parts = topology.branches(level, groups[peer])
            if topology.rescale_gradients and parts > 1:
                x = _DivideGradient.apply(x, parts)
            if groups.count(groups[peer]) > 1:
                done[key] = x
        if level:
            own.append(x)
        if level == last_common:
            shared = x
    return own, shared
