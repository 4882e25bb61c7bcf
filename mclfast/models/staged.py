"""Backbones cut into ordered stages, and the adapter that cuts any torch module.

An auxiliary head branches off after a stage, so mutual learning between stages needs three
things from a backbone: the map after each stage, the pooled feature, and fresh copies of the
stages that follow.
"""

import copy
import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn


class Taps(NamedTuple):
    """Values that one forward pass of a :class:`StagedNetwork` keeps.

    Attributes:
        maps: one map [B, c, h, w] per stage, in order, before the tail.
        final_map: last map after the tail, [B, D, h, w], the input of the pooling.
        feature: pooled feature [B, D], the input of the classifier.
        logits: output of the classifier, [B, C].
    """

    maps: list[Tensor]
    final_map: Tensor
    feature: Tensor
    logits: Tensor


def global_average_pool(x: Tensor) -> Tensor:
    """Mean over the two spatial dimensions, [B, c, h, w] -> [B, c]."""
    return x.mean(dim=(2, 3))


def fresh_copy(
    module: nn.Module, init_weights: Callable[[nn.Module], None] | None = None
) -> nn.Module:
    """Deep copy with newly drawn, trainable parameters and reset buffers.

    Every submodule is reset by its own ``reset_parameters``, children before parents so that
    the rule of an outer module has the last word; then ``init_weights`` is applied to each.

    Args:
        module: module to copy; it is not changed.
        init_weights: rule applied to every submodule of the copy; None for no rule.

    Returns:
        The copy, on the same device and with the same dtype.

    Raises:
        ValueError: a submodule owns parameters but has no ``reset_parameters``, so that its copy
            would keep the trained values.
    """
    for name, submodule in module.named_modules():
        owned = [key for key, _ in submodule.named_parameters(recurse=False)]
        if owned and not callable(getattr(submodule, "reset_parameters", None)):
            raise ValueError(
                f"module: cannot re-initialise {type(submodule).__name__} at {name!r}: it owns "
                f"{', '.join(owned)} but has no reset_parameters(); add that method or override "
                "StagedNetwork.refinement"
            )
    fresh = copy.deepcopy(module)
    for submodule in reversed(list(fresh.modules())):
        reset = getattr(submodule, "reset_parameters", None)
        if callable(reset):
            reset()
    if init_weights is not None:
        fresh.apply(init_weights)
    # A head taken off a frozen backbone still has to learn.
    return fresh.requires_grad_(True)


def fresh_blocks(
    stage: nn.Module, count: int, init_weights: Callable[[nn.Module], None] | None = None
) -> nn.Module:
    """A shallower stage: a :func:`fresh_copy` of the first ``count`` blocks of a stage.

    Args:
        stage: stage whose children are its blocks, in the order they run.
        count: number of blocks to copy.
        init_weights: rule applied to every submodule of the copy; None for no rule.
    """
    return fresh_copy(nn.Sequential(*list(stage.children())[:count]), init_weights)


class StagedNetwork(nn.Module):
    """Backbone = stem, ordered stages, tail, global average pool, one linear classifier.

    A subclass defines :meth:`stem_forward` and the property :attr:`stages`, and where needed
    :attr:`classifier`, :attr:`tail`, :meth:`init_weights` and :meth:`refinement`. The submodules
    behind them may have any names, so that a network can keep the state-dict keys of published
    checkpoints.
    """

    def stem_forward(self, x: Tensor) -> Tensor:
        """Input image [B, in_channels, H, W] -> input of the first stage [B, c, h, w]."""
        raise NotImplementedError(f"{type(self).__name__} must define stem_forward")

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        """The stages in the order they run; each maps [B, c, h, w] to [B, c', h', w']."""
        raise NotImplementedError(f"{type(self).__name__} must define stages as a property")

    @property
    def tail(self) -> nn.Module:
        """Applied to the last map before pooling; the identity unless overridden."""
        # This property would otherwise hide a submodule that a subclass assigns to self.tail.
        return self._modules.get("tail") or nn.Identity()

    @property
    def classifier(self) -> nn.Linear:
        """The layer from the pooled feature [B, D] to the logits [B, C]; ``fc`` by default."""
        fc = self._modules.get("fc")
        if not isinstance(fc, nn.Linear):
            raise NotImplementedError(
                f"{type(self).__name__} must define classifier as a property, or a Linear as fc"
            )
        return fc

    @property
    def feature_dim(self) -> int:
        """Width D of the pooled feature."""
        return self.classifier.in_features

    @property
    def num_classes(self) -> int:
        """Number of logits C."""
        return self.classifier.out_features

    def init_weights(self, module: nn.Module) -> None:
        """Initialisation rule for one submodule, on top of its ``reset_parameters``."""

    def refinement(self, stage_index: int) -> list[nn.Module]:
        """Fresh later stages for an auxiliary head.

        Override it for heads that are not made of full copies, for example for shallower stages.

        Args:
            stage_index: index from 0 of the stage whose map feeds the head.

        Returns:
            Newly initialised modules, run in order on the map [B, c, h, w]; the last gives a
            map that :attr:`tail` accepts. Default: copies of all stages after ``stage_index``.

        Raises:
            ValueError: a stage cannot be re-initialised, see :func:`fresh_copy`.
        """
        # One copy of the list, so modules shared between stages stay shared in the copy.
        later = nn.ModuleList(self.stages[stage_index + 1 :])
        return list(fresh_copy(later, self.init_weights).children())

    def forward_taps(self, x: Tensor) -> Taps:
        """Forward pass that keeps the map after each stage.

        Args:
            x: input images [B, in_channels, H, W].
        """
        x = self.stem_forward(x)
        maps: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return self.finish(maps)

    def finish(self, maps: list[Tensor]) -> Taps:
        """Tail, pooling and classifier: from the maps after all stages to the logits."""
        final_map = self.tail(maps[-1])
        feature = global_average_pool(final_map)
        return Taps(maps, final_map, feature, self.classifier(feature))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> logits [B, C]."""
        return self.forward_taps(x).logits


class _Call(NamedTuple):
    """One recorded call of a named submodule."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    version: int


@contextmanager
def _recorded(modules: dict[str, nn.Module]) -> Iterator[list[_Call]]:
    """Record the calls of the named modules; nothing stays on them afterwards."""
    calls: list[_Call] = []

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            calls.append(_Call(name, args, kwargs, out, _version(out)))

        return hook

    handles = [
        module.register_forward_hook(hook_for(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _version(value: Any) -> int:
    """Counter of a tensor's in-place changes; 0 for inference tensors, which have no counter."""
    if not isinstance(value, Tensor) or value.is_inference():
        return 0
    return value._version


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    return type(value).__name__


def _find(module: nn.Module, name: str, argument: str) -> nn.Module:
    known = {key: found for key, found in module.named_modules(remove_duplicate=False) if key}
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known) or [key for key, _ in module.named_children()]
    raise ValueError(
        f"{argument}: expected a submodule of {type(module).__name__}, got {name!r}; "
        f"close names: {', '.join(close) or 'none'}"
    )


class _AdaptedNetwork(StagedNetwork):
    """A torch module as a StagedNetwork; the module's own forward pass does the work."""

    def __init__(
        self,
        module: nn.Module,
        stages: tuple[tuple[str, ...], ...],
        classifier: str,
        tail: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.module = module
        self._stage_names = stages
        self._tail_names = tail
        self._classifier_name = classifier

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return tuple(
            self._chain(names) if len(names) > 1 else self.module.get_submodule(names[0])
            for names in self._stage_names
        )

    @property
    def tail(self) -> nn.Module:
        return self._chain(self._tail_names)

    def _chain(self, names: Sequence[str]) -> nn.Sequential:
        return nn.Sequential(*(self.module.get_submodule(name) for name in names))

    @property
    def classifier(self) -> nn.Linear:
        found = self.module.get_submodule(self._classifier_name)
        assert isinstance(found, nn.Linear)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)

    def forward_taps(self, x: Tensor) -> Taps:
        in_stages = [name for names in self._stage_names for name in names]
        names = (*in_stages, *self._tail_names, self._classifier_name)
        with _recorded({name: self.module.get_submodule(name) for name in names}) as calls:
            logits = self.module(x)
        ran = tuple(call.name for call in calls)
        if ran != names:
            raise ValueError(
                f"stages: expected the forward pass to run {', '.join(names)}, each once and in "
                f"this order, got {', '.join(ran) or 'none of them'}"
            )
        ends = {names[-1] for names in self._stage_names}
        mapped = [call for call in calls[: len(in_stages)] if call.name in ends]
        for call in mapped:
            if not isinstance(call.output, Tensor) or call.output.dim() != 4:
                raise ValueError(
                    f"stages: expected a 4-D map [B, c, h, w] after {call.name!r}, got "
                    f"{_describe(call.output)}"
                )
            if _version(call.output) != call.version:
                raise ValueError(
                    f"stages: expected the map after {call.name!r} to stay as it is, got an "
                    "in-place change by what runs after it; make that operation out-of-place"
                )
        self._check_chain(calls[:-1])
        # A Linear has one input, but the module may pass it by keyword.
        feature = next(iter((*calls[-1].args, *calls[-1].kwargs.values())))
        self._check_ends(calls[-2].output, feature, logits)
        return Taps([call.output for call in mapped], calls[-2].output, feature, logits)

    def _check_chain(self, calls: list[_Call]) -> None:
        """Raises unless each call takes the output of the one before, as in an auxiliary head."""
        for before, after in zip(calls[:-1], calls[1:], strict=True):
            argument = "tail" if after.name in self._tail_names else "stages"
            if len(after.args) != 1 or after.kwargs:
                raise ValueError(
                    f"{argument}: expected {after.name!r} to take one positional input, got "
                    f"{len(after.args)} positional and {len(after.kwargs)} keyword"
                )
            if after.args[0] is not before.output:
                raise ValueError(
                    f"{argument}: expected the input of {after.name!r} to be the output of "
                    f"{before.name!r}, got another value ({_describe(after.args[0])} after "
                    f"{_describe(before.output)}), so an auxiliary head cannot chain them"
                )

    def _check_ends(self, last: Any, feature: Any, logits: Any) -> None:
        width = self.feature_dim
        if not isinstance(last, Tensor) or last.dim() != 4 or last.shape[1] != width:
            raise ValueError(
                f"tail: expected a map of {width} channels, classifier.in_features, before "
                f"pooling, got {_describe(last)}"
            )
        for what, value, columns in (
            ("the input of the classifier", feature, width),
            ("the output of the module", logits, self.num_classes),
        ):
            if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[1] != columns:
                raise ValueError(
                    f"module: expected {what} to be [B, {columns}], got {_describe(value)}"
                )


def staged(
    module: nn.Module,
    stages: Sequence[str | Sequence[str]],
    *,
    classifier: str = "fc",
    tail: Sequence[str] = (),
) -> StagedNetwork:
    """Adapt any torch module whose stages are submodules that follow each other directly.

    The module keeps its own forward pass; its state-dict keys appear under ``module.``. The
    stages are checked on each ``forward_taps``, which is where they run. An auxiliary head
    pools its last map by a global average whatever the module itself does there, and runs
    nothing between stages, tail and pooling that is not named here.

    Args:
        module: network from [B, in_channels, H, W] to logits [B, C].
        stages: dotted names of the stages in the order they run; a stage of several modules that
            follow each other is given as a list of their names.
        classifier: dotted name of the final ``nn.Linear``; its input is the feature [B, D].
        tail: dotted names of the modules between the last stage and the pooling, such as a
            final normalisation.

    Returns:
        The staged network around ``module`` itself, not around a copy.

    Raises:
        ValueError: a name is not found, or the classifier is not linear. Later, ``forward_taps``
            raises it if the stages do not run once each in this order, do not feed each other,
            change a map in place, or give maps of the wrong shape.

    Examples:
        >>> from torch import nn
        >>> from mclfast import staged
        >>> network = nn.Sequential()
        >>> for name, part in {
        ...     "low": nn.Conv2d(3, 8, 3), "high": nn.Conv2d(8, 16, 3),
        ...     "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(16, 10),
        ... }.items():
        ...     network.add_module(name, part)
        >>> staged(network, ["low", "high"], classifier="fc").num_classes
        10
    """
    for argument, names in (("stages", stages), ("tail", tail)):
        if isinstance(names, str):
            raise ValueError(f"{argument}: expected a list of names, got the string {names!r}")
    chains = tuple((stage,) if isinstance(stage, str) else tuple(stage) for stage in stages)
    if not all(chains) or not chains:
        raise ValueError("stages: expected at least one name, got an empty list")
    for argument, names in (*(("stages", chain) for chain in chains), ("tail", tuple(tail))):
        for name in names:
            _find(module, name, argument)
    found = _find(module, classifier, "classifier")
    if not isinstance(found, nn.Linear):
        raise ValueError(
            f"classifier: expected {classifier!r} to be a Linear, got {type(found).__name__}"
        )
    return _AdaptedNetwork(module, chains, classifier, tuple(tail))


def class_name(backbone: StagedNetwork) -> str:
    """Class name of a network, or of the module that :func:`staged` adapted to one."""
    return type(getattr(backbone, "module", backbone)).__name__
