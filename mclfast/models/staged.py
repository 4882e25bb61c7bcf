"""Backbones cut into ordered stages, and the adapter that cuts any torch module.

An auxiliary head branches off after a stage, so mutual learning between stages needs three
things from a backbone: the map after each stage, the pooled feature, and fresh copies of the
stages that follow.
"""

import copy
import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mclfast._base.transforms import under_transform
from mclfast.models.glue import Glue, glue_between
from mclfast.models.pooling import Layout, Pool, Pooling, shape_of

#: A classifier is a linear layer, or a convolution of one pixel that runs before the pooling.
Classifier = nn.Linear | nn.Conv2d


class Taps(NamedTuple):
    """Values that one forward pass of a :class:`StagedNetwork` keeps.

    Attributes:
        maps: one map [B, c, h, w] per stage, in order, before the tail; of an adapted network
            also tokens [B, N, c], maps [B, h, w, c] or rows [B, c].
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

    Every submodule is reset by its own ``reset_parameters`` (attention of torch: its
    ``_reset_parameters``), children before parents so that the rule of an outer module has the last
    word; then ``init_weights`` is applied to each. A parameter that none of them can set is kept
    where all its elements are equal, as no training leaves it.

    Args:
        module: module to copy; it is not changed.
        init_weights: rule applied to every submodule of the copy; None for no rule.

    Returns:
        The copy, on the same device and with the same dtype.

    Raises:
        ValueError: a submodule owns parameters that neither ``reset_parameters`` nor
            ``init_weights`` sets, so that its copy would keep the trained values.
    """
    fresh = copy.deepcopy(module)
    unset: list[tuple[str, nn.Module, str]] = []
    for name, submodule in fresh.named_modules():
        if _reset_of(submodule) is None:
            for key, value in submodule.named_parameters(recurse=False):
                if not _constant(value):
                    unset.append((name, submodule, key))
                    # A mark that a rule overwrites.
                    with torch.no_grad():
                        value.fill_(float("nan"))
    for submodule in reversed(list(fresh.modules())):
        reset = _reset_of(submodule)
        if reset is not None:
            reset()
    if init_weights is not None:
        fresh.apply(init_weights)
    left = [found for found in unset if _is_marked(getattr(found[1], found[2]))]
    if left:
        name, owner, _ = left[0]
        keys = ", ".join(key for _, other, key in left if other is owner)
        raise ValueError(
            f"module: cannot re-initialise {type(owner).__name__} at {name!r}: it owns {keys} but "
            "has no reset_parameters(); add that method, give staged a rule as init_weights=, or "
            "override StagedNetwork.refinement"
        )
    # A head taken off a frozen backbone still has to learn.
    return fresh.requires_grad_(True)


def _reset_of(module: nn.Module) -> Callable[[], object] | None:
    names = ["reset_parameters"]
    if isinstance(module, nn.MultiheadAttention):
        names.append("_reset_parameters")
    for name in names:
        found = getattr(module, name, None)
        if callable(found):
            reset: Callable[[], object] = found
            return reset
    return None


def _is_marked(value: Tensor) -> bool:
    return value.is_meta or bool(value.isnan().any())


def _constant(value: Tensor) -> bool:
    """Whether two or more elements of a tensor are equal, which no training leaves them.

    Integers are not trained.
    """
    if not (value.is_floating_point() or value.is_complex()):
        return True
    if value.is_meta or value.numel() < 2:
        return False
    return bool((value == value.flatten()[0]).all())


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
    def pooling(self) -> Callable[[Tensor], Tensor]:
        """Function from the map after the tail to the pooled feature [B, D]."""
        return global_average_pool

    @property
    def classifier(self) -> Classifier:
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
        return _ends_of(self.classifier)[0]

    @property
    def num_classes(self) -> int:
        """Number of logits C."""
        return _ends_of(self.classifier)[1]

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

    def forward_end(self, x: Tensor) -> Taps:
        """As :meth:`forward_taps`, for callers that do not read the maps after the stages.

        Args:
            x: input images [B, in_channels, H, W].
        """
        return self.forward_taps(x)

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
            calls.append(_Call(name, args, kwargs, out, _version(first_tensor(out))))

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


def _ends_of(classifier: Classifier) -> tuple[int, int]:
    """Numbers of inputs and outputs of a classifier."""
    if isinstance(classifier, nn.Linear):
        return classifier.in_features, classifier.out_features
    return classifier.in_channels, classifier.out_channels


def first_tensor(value: Any) -> Any:
    """The first element of a tuple, list, mapping or dataclass; any other value as it is.

    Blocks of transformers give tuples of their tokens and of what else was asked for.
    """
    if isinstance(value, (tuple, list)) and value:
        return value[0]
    if isinstance(value, Mapping) and value:
        return next(iter(value.values()))
    if is_dataclass(value) and not isinstance(value, type):
        return next(iter(vars(value).values()), value)
    return value


class _Chain(nn.Sequential):
    """Modules that follow each other; the first tensor of an output goes on."""

    def forward(self, x: Any) -> Any:
        for module in self:
            x = first_tensor(module(x))
        return x


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
        output: str | int | None,
        pooling: Pooling,
        init_weights: Callable[[nn.Module], None] | None,
    ) -> None:
        super().__init__()
        self.module = module
        self._stage_names = stages
        self._tail_names = tail
        self._classifier_name = classifier
        self._output = output
        self._pooling = pooling
        self._init_weights = init_weights
        self._in_stages = tuple(name for names in stages for name in names)
        # No submodules of this network: its own forward pass makes these calls by itself.
        self._glue: dict[str, Glue] = glue_between(module, (*self._in_stages, *tail))
        self._glue_is_checked = not self._glue

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return tuple(self._chain(names) for names in self._stage_names)

    @property
    def tail(self) -> nn.Module:
        return self._chain(self._tail_names, always=True)

    def _chain(self, names: Sequence[str], always: bool = False) -> nn.Module:
        parts: list[nn.Module] = []
        for name in names:
            # It leads from the module before, which a head has run by then.
            if name in self._glue:
                parts.append(self._glue[name])
            parts.append(self.module.get_submodule(name))
        return _Chain(*parts) if always or len(parts) != 1 else parts[0]

    @property
    def pooling(self) -> Callable[[Tensor], Tensor]:
        # The type checker does not see that a named tuple can be called.
        return cast(Callable[[Tensor], Tensor], self._pooling)

    @property
    def classifier(self) -> Classifier:
        found = self.module.get_submodule(self._classifier_name)
        assert isinstance(found, (nn.Linear, nn.Conv2d))
        return found

    def init_weights(self, module: nn.Module) -> None:
        if self._init_weights is not None:
            self._init_weights(module)

    def forward(self, x: Tensor) -> Tensor:
        logits = self._logits_of(self.module(x))
        self._check_rows("the output of the module", logits, self.num_classes)
        return logits

    def forward_end(self, x: Tensor) -> Taps:
        last = (*self._in_stages, *self._tail_names)[-1:]
        calls, logits = self._run((*last, self._classifier_name), x)
        return self._ends([], calls, logits)

    def forward_taps(self, x: Tensor) -> Taps:
        calls, logits = self._run((*self._in_stages, *self._tail_names, self._classifier_name), x)
        ends = {names[-1] for names in self._stage_names}
        mapped = [call for call in calls[: len(self._in_stages)] if call.name in ends]
        for call in mapped:
            tap = first_tensor(call.output)
            if not isinstance(tap, Tensor) or not 2 <= tap.dim() <= 4:
                raise ValueError(
                    f"stages: expected a map [B, c, h, w] or [B, h, w, c], tokens [B, N, c] or "
                    f"rows [B, c] after {call.name!r}, got {shape_of(tap)}"
                )
            if _version(tap) != call.version:
                raise ValueError(
                    f"stages: expected the map after {call.name!r} to stay as it is, got an "
                    "in-place change by what runs after it; make that operation out-of-place"
                )
        self._check_chain(calls[:-1])
        return self._ends([first_tensor(call.output) for call in mapped], calls, logits)

    def _run(self, names: tuple[str, ...], x: Tensor) -> tuple[list[_Call], Any]:
        """Calls of the named submodules in a forward pass, and the logits."""
        with _recorded({name: self.module.get_submodule(name) for name in names}) as calls:
            output = self.module(x)
        ran = tuple(call.name for call in calls)
        if ran != names:
            raise ValueError(
                f"stages: expected the forward pass to run {', '.join(names)}, each once and in "
                f"this order, got {', '.join(ran) or 'none of them'}"
            )
        return calls, self._logits_of(output)

    def _logits_of(self, output: Any) -> Any:
        """The logits in an output, where the option ``output`` says they are."""
        key = self._output
        if key is None:
            return output
        try:
            if isinstance(key, str) and not isinstance(output, Mapping):
                return getattr(output, key)
            return output[key]
        except (AttributeError, KeyError, IndexError, TypeError):
            raise ValueError(
                f"output: expected the module to give something with {key!r}, got "
                f"{_contents(output)}"
            ) from None

    def _ends(self, maps: list[Tensor], calls: list[_Call], logits: Any) -> Taps:
        """The taps of a forward pass whose last call is that of the classifier."""
        # A classifier has one input, but the module may pass it by keyword.
        feature = next(iter((*calls[-1].args, *calls[-1].kwargs.values())))
        if isinstance(self.classifier, nn.Conv2d) and isinstance(feature, Tensor):
            feature = feature.mean(dim=(2, 3)) if feature.dim() == 4 else feature
        self._check_rows("the output of the module", logits, self.num_classes)
        self._check_rows("the input of the classifier", feature, self.feature_dim)
        # Without a name for the last map, the feature is a map of one place.
        last = first_tensor(calls[-2].output) if len(calls) > 1 else feature[:, :, None, None]
        return Taps(maps, self._pooling.as_map(last), feature, logits)

    def _check_chain(self, calls: list[_Call]) -> None:
        """Raises unless each call takes the output of the one before, as in an auxiliary head."""
        for before, after in zip(calls[:-1], calls[1:], strict=True):
            argument = "tail" if after.name in self._tail_names else "stages"
            if len(after.args) < 1 or not _are_defaults(
                self.module.get_submodule(after.name), after.args, after.kwargs
            ):
                raise ValueError(
                    f"{argument}: expected {after.name!r} to take one positional input, got "
                    f"{len(after.args)} positional and {len(after.kwargs)} keyword"
                )
            given = first_tensor(before.output)
            glue = self._glue.get(after.name)
            if glue is None and after.args[0] is not given:
                raise ValueError(
                    f"{argument}: expected the input of {after.name!r} to be the output of "
                    f"{before.name!r}, got another value ({shape_of(after.args[0])} after "
                    f"{shape_of(given)}), so an auxiliary head cannot chain them"
                )
        if not (self._glue_is_checked or calls[0].args[0].is_meta) and _runs_by_itself():
            self._check_glue(calls)

    @torch.no_grad()
    def _check_glue(self, calls: list[_Call]) -> None:
        """Raises unless the traced calls between the stages give what the module itself gave.

        Once. In training mode that is open where they depend on the mode, as they may draw numbers.
        """
        checked = True
        for before, after in zip(calls[:-1], calls[1:], strict=True):
            glue = self._glue.get(after.name)
            if glue is None:
                continue
            if self.training and glue.depends_on_mode:
                checked = False
                continue
            found = copy.deepcopy(glue).train(self.training)(first_tensor(before.output))
            wanted = after.args[0]
            if found.shape != wanted.shape or not torch.allclose(found, wanted, equal_nan=True):
                raise ValueError(
                    f"stages: expected the calls between {before.name!r} and {after.name!r} to "
                    f"depend on nothing else, got another input of {after.name!r} "
                    f"({shape_of(wanted)}) than they give ({shape_of(found)})"
                )
        self._glue_is_checked = checked

    def _check_rows(self, what: str, value: Any, columns: int) -> None:
        if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[1] != columns:
            hint = ""
            if what.startswith("the output") and not isinstance(value, Tensor):
                hint = "; name the logits in it with output="
            raise ValueError(
                f"module: expected {what} to be [B, {columns}], got {shape_of(value)}{hint}"
            )


def _runs_by_itself() -> bool:
    """Whether values can be compared: no transform, compiler or CUDA graph records this run."""
    return (
        not under_transform()
        and not torch.compiler.is_compiling()
        and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    )


def _contents(output: Any) -> str:
    """The type of an output and the names in it, for an error message."""
    kind = type(output).__name__
    if isinstance(output, Mapping):
        return f"{kind} with {', '.join(map(str, output))}"
    if isinstance(output, (tuple, list)):
        return f"{kind} of {len(output)}"
    if is_dataclass(output):
        return f"{kind} with {', '.join(vars(output))}"
    return kind


def _are_defaults(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether all inputs of a call but the first are what the module takes by default."""
    if len(args) == 1 and not kwargs:
        return True
    # The class's own, as a memory mode may hide it by one that takes anything.
    signature = inspect.signature(type(module).forward)
    try:
        given = signature.bind(module, *args, **kwargs).arguments
    except TypeError:
        return False
    more = list(given.items())[2:]
    for name, value in more:
        default = signature.parameters[name].default
        plain = isinstance(value, (bool, int, float, str))
        if value is not default and not (
            plain and type(value) is type(default) and value == default
        ):
            return False
    return True


def staged(
    module: nn.Module,
    stages: Sequence[str | Sequence[str]] = (),
    *,
    classifier: str = "fc",
    tail: Sequence[str] = (),
    output: str | int | None = None,
    pool: Pool = "mean",
    layout: Layout | None = None,
    init_weights: Callable[[nn.Module], None] | None = None,
) -> StagedNetwork:
    """Adapt any torch module whose stages are submodules that follow each other.

    The module keeps its own forward pass; its state-dict keys appear under ``module.``. The stages
    give maps [B, c, h, w] or [B, h, w, c], tokens [B, N, c] or rows [B, c], and are checked on each
    ``forward_taps``, which is where auxiliary heads read them. A head runs copies of the later
    stages and of the tail, with the calls of functions and of modules without parameters that
    the module has between them, if these can be traced and need nothing but the map. Then it pools
    its last map as ``pool`` says, whatever the module itself does there.

    Args:
        module: network from [B, in_channels, H, W] to logits [B, C].
        stages: dotted names of the stages in the order they run; a stage of several modules that
            follow each other is given as a list of their names. None at all for methods that need
            logits or features alone.
        classifier: dotted name of the final ``nn.Linear``, whose input is the feature [B, D], or of
            a final ``nn.Conv2d`` of one pixel, whose input averaged over its places is the feature.
        tail: dotted names of the modules between the last stage and the pooling, such as a
            final normalisation.
        output: key, attribute or place of the logits in what the module gives; None if it gives
            the logits themselves.
        pool: how a head pools its last map, "mean" over all places or "first" for the first token,
            the class token of a transformer.
        layout: where the maps have their channels, "channels_first" or "channels_last"; None to
            tell it from the width D, and maps that have it on both axes are "channels_first".
        init_weights: rule for the fresh copies of a head, called with each submodule, for
            modules that own parameters without a ``reset_parameters``.

    Returns:
        The staged network around ``module`` itself, not around a copy.

    Raises:
        ValueError: a name is not found, the classifier is not linear, or an option is unknown.
            Later, ``forward_taps`` raises it if the stages do not run once each in this order, do
            not feed each other, change a map in place, or give maps of the wrong shape.

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
    if not all(chains):
        raise ValueError("stages: expected at least one name in each stage, got an empty list")
    if tail and not chains:
        raise ValueError(f"tail: expected none without stages, got {', '.join(tail)}")
    for argument, names in (*(("stages", chain) for chain in chains), ("tail", tuple(tail))):
        for name in names:
            _find(module, name, argument)
    if pool not in ("mean", "first"):
        raise ValueError(f"pool: expected 'mean' or 'first', got {pool!r}")
    if layout not in (None, "channels_first", "channels_last"):
        raise ValueError(
            f"layout: expected 'channels_first', 'channels_last' or None, got {layout!r}"
        )
    if output is not None and (isinstance(output, bool) or not isinstance(output, (str, int))):
        raise ValueError(f"output: expected a name, a number or None, got {output!r}")
    found = _find(module, classifier, "classifier")
    pixel = isinstance(found, nn.Conv2d) and set(found.kernel_size) == {1} and found.groups == 1
    if not isinstance(found, Classifier) or not (pixel or isinstance(found, nn.Linear)):
        raise ValueError(
            f"classifier: expected {classifier!r} to be a Linear, or a Conv2d of one pixel, got "
            f"{type(found).__name__}"
        )
    pooling = Pooling(_ends_of(found)[0], pool, layout)
    return _AdaptedNetwork(module, chains, classifier, tuple(tail), output, pooling, init_weights)


def linear_classifier(network: StagedNetwork, argument: str) -> nn.Linear:
    """The classifier of a network for callers that set its weights.

    Args:
        network: network whose classifier is wanted.
        argument: name of the argument in the error message.

    Raises:
        ValueError: the classifier is a convolution, which the network may follow by more layers.
    """
    found = network.classifier
    if not isinstance(found, nn.Linear):
        raise ValueError(
            f"{argument}: expected a Linear as the classifier, got {type(found).__name__} of "
            f"{class_name(network)}"
        )
    return found


def class_name(backbone: StagedNetwork) -> str:
    """Class name of a network, or of the module that :func:`staged` adapted to one."""
    return type(getattr(backbone, "module", backbone)).__name__
