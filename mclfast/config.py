"""The settings of a training run: one flat list of fields, typed and checked.

A run is described by the fields of :class:`TrainConfig` and by the options of its method. On the
command line, in a recipe and in a saved ``config.yaml`` they stand side by side in one namespace.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mclfast import data, methods, models
from mclfast._checks import check_positive, unknown_name


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class TrainConfig:
    """Settings of one run; the defaults train two small peers on ten digits a class."""

    method: str = _field("lmcl", "training method")
    cohort: tuple[str, ...] = _field(
        ("resnet8", "resnet8"), "peer networks, separated by commas; one alone is no cohort"
    )
    data: str = _field("digits", "data set")
    data_root: str | None = _field(None, "folder with the data set's archive or images")
    image_size: int | None = _field(None, "side in pixels that images of a folder are brought to")
    train_per_class: int | None = _field(
        None, "labelled training images per class; none for the data set's own number"
    )
    seed: int = _field(0, "seed of weights, batches and augmentation (not of the split)")
    epochs: int = _field(60, "passes over the sampler's batches")
    batch_size: int = _field(60, "images per step")
    sampler: Literal["balanced", "shuffle"] = _field(
        "balanced", "balanced: images_per_class images of each class drawn; shuffle: plain order"
    )
    images_per_class: int = _field(6, "images of each class in a balanced batch")
    augment: bool = _field(True, "random crops (and flips where the data set has them)")
    lr: float = _field(0.05, "initial learning rate")
    momentum: float = _field(0.9, "SGD momentum")
    nesterov: bool = _field(True, "Nesterov momentum in the ordinary step")
    weight_decay: float = _field(5e-4, "on all parameters")
    schedule: Literal["cosine", "multistep"] = _field(
        "cosine", "learning-rate schedule, by epoch, without warm-up"
    )
    milestones: tuple[int, ...] = _field((), "epochs at which multistep multiplies by lr_decay")
    lr_decay: float = _field(0.1, "factor of the multistep schedule")
    clip_grad_norm: float | None = _field(None, "largest gradient norm; none for no clipping")
    amp: Literal["off", "bf16", "fp16"] = _field("off", "automatic mixed precision")
    projection_dim: int = _field(128, "width of the embeddings")
    bilevel_every: int = _field(
        10, "steps between bilevel steps, counted over the whole run; 0 for never"
    )
    inner_steps: int = _field(2, "SGD steps on the inner loss in a bilevel step")
    outer_steps: int = _field(1, "SGD steps on the outer loss in a bilevel step")
    eval_batch_size: int = _field(256, "images per evaluation batch")
    device: str = _field("auto", "auto, cpu, cuda or cuda:N")
    options: Any = field(default=None)

    def __post_init__(self) -> None:
        cls = methods.method_class(self.method)
        if self.options is None:
            self.options = cls.Options()
        self._check()

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> TrainConfig:
        """A config from flat fields; unknown names, wrong types and impossible values raise."""
        method = values.get("method", cls.method)
        option_class = methods.method_class(str(method)).Options
        own, theirs = field_types(cls), field_types(option_class)
        config: dict[str, Any] = {}
        options: dict[str, Any] = {}
        for name, value in values.items():
            if name in own:
                config[name] = coerce(name, own[name], value)
            elif name in theirs:
                options[name] = coerce(name, theirs[name], value)
            else:
                raise unknown_name("field", name, [*own, *theirs])
        return cls(**config, options=option_class(**options))

    def to_values(self) -> dict[str, Any]:
        """The flat fields, with plain YAML types; ``from_values`` reads them back."""
        values = {name: getattr(self, name) for name in field_types(type(self))}
        values |= dataclasses.asdict(self.options)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def _check(self) -> None:
        for name in self.cohort:
            if name not in models.available():
                raise unknown_name("cohort", name, models.available())
        if not self.cohort:
            raise ValueError("cohort: expected at least one network, got none")
        if self.data not in data.available():
            raise unknown_name("data", self.data, data.available())
        for name in (
            "epochs", "batch_size", "images_per_class", "projection_dim", "inner_steps",
            "eval_batch_size",
        ):  # fmt: skip
            _at_least(name, getattr(self, name), 1)
        for name in ("bilevel_every", "outer_steps", "momentum", "weight_decay", "seed"):
            _at_least(name, getattr(self, name), 0)
        if self.seed >= 2**63:
            raise ValueError(f"seed: expected a value < 2**63, got {self.seed}")
        for name in ("lr", "lr_decay"):
            check_positive(name, getattr(self, name))
        if self.clip_grad_norm is not None:
            check_positive("clip_grad_norm", self.clip_grad_norm)
        for name in ("image_size", "train_per_class"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        if self.sampler == "balanced" and self.batch_size % self.images_per_class:
            raise ValueError(
                f"images_per_class: expected a divisor of batch_size {self.batch_size}, "
                f"got {self.images_per_class}"
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError("momentum: expected a value > 0 with nesterov, got 0")
        if self.schedule == "multistep" and not self.milestones:
            raise ValueError("milestones: expected at least one epoch for multistep, got none")


def field_types(cls: type) -> dict[str, Any]:
    """Type of each field of a settings dataclass, without the nested options."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.name != "options"}


def field_help(cls: type) -> dict[str, str]:
    """Meaning of each field of a settings dataclass."""
    return {f.name: f.metadata.get("help", "") for f in dataclasses.fields(cls)}


def coerce(name: str, kind: Any, value: Any) -> Any:
    """``value``, from YAML or the command line, as the type of its field."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        kind = next(a for a in args if a is not type(None))
        return coerce(name, kind, value)
    if origin is Literal:
        # YAML reads a bare `off` as false.
        value = "off" if value is False and "off" in args else value
        if value not in args:
            raise ValueError(f"{name}: expected one of {', '.join(args)}; got {value!r}")
        return value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise ValueError(f"{name}: expected a list separated by commas, got {value!r}")
        return tuple(
            coerce(name, args[0], i.strip() if isinstance(i, str) else i)
            for i in items
            if i != ""
        )
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if isinstance(value, bool):
            return value
        if str(value).lower() not in words:
            raise ValueError(f"{name}: expected true or false, got {value!r}")
        return words[str(value).lower()]
    if kind is str:
        if not isinstance(value, (str, Path)):
            raise ValueError(f"{name}: expected text, got {value!r}")
        return str(value)
    return _number(name, kind, value)


def _number(name: str, kind: type, value: Any) -> Any:
    what = "an integer" if kind is int else "a number"
    try:
        if isinstance(value, bool):
            raise ValueError
        number = kind(value)
        if kind is int and float(value) != number:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}: expected {what}, got {value!r}") from None
    return number


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{name}: expected a value >= {least}, got {value}")
