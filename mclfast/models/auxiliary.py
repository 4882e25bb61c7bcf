"""Auxiliary heads: the one rule that builds them for every backbone.

Source: topology of L-MCL (TPAMI 2023, arXiv 2207.11518). A head after stage k refines the map
with fresh later stages, so that every stage ends in a feature of the same width.
"""

from typing import NamedTuple

from torch import Tensor, nn

from mclfast.models.staged import StagedNetwork, Taps, first_tensor, fresh_copy


class StageOutputs(NamedTuple):
    """Outputs of a :class:`PeerNetwork`, from the head after stage 1 to the backbone itself.

    Attributes:
        features: pooled features, one [B, D] per stage.
        logits: one tensor [B, C] per stage.
        final_map: map [B, D, h, w] that the backbone pools.
    """

    features: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    final_map: Tensor


class AuxiliaryHead(nn.Module):
    """Fresh later stages, fresh tail, global average pool and a fresh linear classifier.

    Nothing is shared with the backbone, whose device and dtype the head takes over.

    Args:
        backbone: network that the head branches off; it is not changed.
        stage_index: index from 0 of the stage whose map feeds the head.

    Raises:
        ValueError: ``stage_index`` has no later stage, or a stage or the tail cannot be
            re-initialised (see :func:`mclfast.models.staged.fresh_copy`).
    """

    def __init__(self, backbone: StagedNetwork, stage_index: int) -> None:
        super().__init__()
        last = len(backbone.stages) - 1
        if not 0 <= stage_index < last:
            raise ValueError(
                f"stage_index: expected a stage before the last, 0 <= index < {last}, "
                f"got {stage_index}"
            )
        self.stages = nn.Sequential(*backbone.refinement(stage_index))
        self.tail = fresh_copy(backbone.tail, backbone.init_weights)
        self._pooling = backbone.pooling
        weight = backbone.classifier.weight
        self.classifier = nn.Linear(
            backbone.feature_dim, backbone.num_classes, device=weight.device, dtype=weight.dtype
        )
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map after the stage, such as [B, c, h, w] -> feature [B, D] and logits [B, C]."""
        for stage in self.stages:
            x = first_tensor(stage(x))
        feature = self._pooling(self.tail(x))
        return feature, self.classifier(feature)


class PeerNetwork(nn.Module):
    """One peer of a mutual-learning group: a backbone and its auxiliary heads.

    Deploy ``peer.backbone`` alone; the heads serve training only.

    Args:
        backbone: network to train, used as it is, not copied.
        auxiliary_heads: whether to build a head for every stage but the last.

    Attributes:
        backbone: the :class:`StagedNetwork`.
        auxiliary: ``nn.ModuleList`` of the heads in stage order, empty without heads.

    Raises:
        ValueError: ``backbone`` is not a StagedNetwork, or a stage or its tail cannot be
            re-initialised.
    """

    def __init__(self, backbone: StagedNetwork, auxiliary_heads: bool = True) -> None:
        super().__init__()
        if not isinstance(backbone, StagedNetwork):
            raise ValueError(
                f"backbone: expected a StagedNetwork, got {type(backbone).__name__}; "
                "adapt a module with mclfast.models.staged"
            )
        count = max(len(backbone.stages) - 1, 0) if auxiliary_heads else 0
        self.backbone = backbone
        self.auxiliary = nn.ModuleList(AuxiliaryHead(backbone, index) for index in range(count))

    @property
    def num_stages(self) -> int:
        """Number of outputs: the auxiliary heads and the backbone."""
        return len(self.auxiliary) + 1

    @property
    def feature_dim(self) -> int:
        """Width D of every feature."""
        return self.backbone.feature_dim

    @property
    def num_classes(self) -> int:
        """Number of logits C of every stage."""
        return self.backbone.num_classes

    def forward(self, x: Tensor) -> StageOutputs:
        """[B, in_channels, H, W] -> ``num_stages`` features [B, D] and logits [B, C]."""
        # Without heads nobody reads the stages, so that they may be anything.
        run = self.backbone.forward_taps if len(self.auxiliary) else self.backbone.forward_end
        return self.head_outputs(run(x))

    def head_outputs(self, taps: Taps) -> StageOutputs:
        """The outputs of all heads, from one forward pass of the backbone."""
        # The map of the last stage has no head: its output is the backbone's own.
        outputs = [head(tap) for head, tap in zip(self.auxiliary, taps.maps, strict=False)]
        outputs.append((taps.feature, taps.logits))
        features, logits = zip(*outputs, strict=True)
        return StageOutputs(features, logits, taps.final_map)
