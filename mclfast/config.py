"""The settings of a training run, typed and checked: ``TrainConfig``.

A run is described by the fields of :class:`TrainConfig` and by the options of its method. The
command line, recipes and a saved ``config.yaml`` hold both in one flat list of names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mclfast import data, methods, models
from mclfast._base.checks import check_not_negative, check_positive, check_width, unknown_name
from mclfast._base.settings import coerce, coerce_fields, field_types, setting

# Far more than any method was published with; a list of names that long is a mistake.
_MOST_NETWORKS = 256


@dataclass
class TrainConfig:
    """Settings of one run; the defaults train two small networks on ten digits of each class."""

    method: str = setting("lmcl", "training method")
    cohort: tuple[str, ...] = setting(
        ("resnet8", "resnet8"), "networks trained together, separated by commas; one trains alone"
    )
    topology: Literal["independent", "shared_stem", "tree"] = setting(
        "independent",
        "modules that networks share: none; stem and first stages; the same, and one more stage "
        "within each pair of networks",
    )
    split_stage: int = setting(1, "number of stages that all networks share, in a shared topology")
    data: str = setting("digits", "data set")
    data_root: str | None = setting(None, "folder with the data set's archive or images")
    image_size: int | None = setting(
        None, "side in pixels that image files are resized to; none for the data set's own"
    )
    workers: int | None = setting(
        None, "processes that decode streamed images; none for one per core, 0 for none"
    )
    train_per_class: int | None = setting(
        None, "labelled training images per class; none for the data set's own number"
    )
    seed: int = setting(0, "seed of weights, batches and augmentation (not of the split)")
    epochs: int = setting(60, "passes over the sampler's batches")
    batch_size: int = setting(60, "images per step")
    sampler: Literal["balanced", "shuffle"] = setting(
        "balanced",
        "balanced: images_per_class images of each class in a batch; shuffle: random order",
    )
    images_per_class: int = setting(6, "images of each class in a balanced batch")
    augment: bool = setting(True, "random crops (and flips where the data set has them)")
    lr: float = setting(0.05, "initial learning rate")
    momentum: float = setting(0.9, "SGD momentum")
    nesterov: bool = setting(True, "Nesterov momentum in the ordinary step")
    weight_decay: float = setting(5e-4, "weight decay of all parameters")
    schedule: Literal["cosine", "multistep"] = setting(
        "cosine", "schedule of the learning rate, set anew for each epoch"
    )
    warmup_epochs: int = setting(
        0, "number of first epochs in which the learning rate rises linearly to the schedule's"
    )
    milestones: tuple[int, ...] = setting(
        (), "epochs at which the multistep schedule multiplies the learning rate by lr_decay"
    )
    lr_decay: float = setting(0.1, "factor of the multistep schedule")
    non_finite: Literal["raise", "skip", "rollback"] = setting(
        "raise",
        "what to do at a step whose loss or gradients are infinite or NaN: end the run, leave the "
        "step out (waits for a GPU in each step), or go back to the last checkpoint and leave the "
        "step out",
    )
    clip_grad_norm: float | None = setting(None, "largest gradient norm; none for no clipping")
    amp: Literal["off", "bf16", "fp16"] = setting("off", "automatic mixed precision")
    channels_last: Literal["auto", "on", "off"] = setting(
        "auto",
        "store weights and feature maps with channels last, which speeds up convolutions; auto: on "
        "a CPU, and on a GPU with amp",
    )
    compile_peers: bool = setting(
        False, "compile each network's forward pass in training by torch.compile"
    )
    cuda_graphs: bool = setting(
        False,
        "replay the ordinary step as a CUDA graph; for losses that do not change from step to step",
    )
    peers_parallel: Literal["off", "auto", "stack", "streams"] = setting(
        "off",
        "how networks run in a step: one after another (off), equal ones stacked into one (stack), "
        "on CUDA streams (streams), or the fastest of these on the first batch (auto)",
    )
    memory: Literal["ordinary", "checkpoint", "sequential", "auto"] = setting(
        "ordinary",
        "activations that a step keeps: all (ordinary), the inputs of blocks (checkpoint), or "
        "those of one network at a time (sequential); auto takes the fastest mode that fits",
    )
    offload: Literal["none", "peers"] = setting(
        "none",
        "peers: with memory sequential, keep parameters, gradients and momentum of networks in "
        "host memory until their turn",
    )
    checkpoint_every: int = setting(
        0, "steps between checkpoints within an epoch; 0 for checkpoints at the end of epochs only"
    )
    projection_dim: int = setting(128, "dimension of the embeddings")
    bilevel_every: int = setting(
        10, "steps between bilevel steps, counted over the whole run; 0 for never"
    )
    inner_steps: int = setting(2, "SGD steps on the inner loss in a bilevel step")
    outer_steps: int = setting(1, "SGD steps on the outer loss in a bilevel step")
    eval_every: int = setting(
        1, "epochs between evaluations on the test set; the last epoch is always evaluated"
    )
    eval_batch_size: int = setting(256, "images per evaluation batch")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    options: Any = field(default=None)

    def __post_init__(self) -> None:
        coerce_fields(self)
        options = methods.method_class(self.method).Options
        if self.options is None:
            self.options = options()
        # Not isinstance, as options of another method may be derived from these.
        if type(self.options) is not options:
            raise TypeError(
                f"options: expected {options.__qualname__} for method {self.method}, "
                f"got {type(self.options).__qualname__}"
            )
        self._check()

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Makes a config from fields and options of the method.

        Args:
            values: values by name; text is converted to the type of the field.

        Raises:
            ValueError: a name is unknown, or a value has the wrong type or is impossible.
        """
        method = coerce("method", str, values.get("method", cls.method))
        option_class = methods.method_class(method).Options
        own, theirs = field_types(cls), field_types(option_class)
        for name in values:
            if name not in own and name not in theirs:
                raise unknown_setting("field", name, method)
        options = option_class(**{k: v for k, v in values.items() if k in theirs})
        return cls(**{k: v for k, v in values.items() if k in own}, options=options)

    def to_values(self) -> dict[str, Any]:
        """All fields and options by name, in plain YAML types; ``from_values`` reads them back."""
        values = {name: getattr(self, name) for name in field_types(type(self))}
        values |= dataclasses.asdict(self.options)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def _check(self) -> None:
        if len(self.cohort) > _MOST_NETWORKS:
            raise ValueError(
                f"cohort: expected at most {_MOST_NETWORKS} networks, got {len(self.cohort)}"
            )
        for name in self.cohort:
            if name not in models.available() and not models.is_external(name):
                raise unknown_name("cohort", name, models.available())
        if not self.cohort:
            raise ValueError("cohort: expected at least one network, got none")
        if self.data not in data.available():
            raise unknown_name("data", self.data, data.available())
        for name in (
            "epochs",
            "batch_size",
            "images_per_class",
            "inner_steps",
            "eval_every",
            "eval_batch_size",
        ):
            _at_least(name, getattr(self, name), 1)
        check_width("projection_dim", self.projection_dim)
        for name in ("warmup_epochs", "bilevel_every", "checkpoint_every", "outer_steps", "seed"):
            _at_least(name, getattr(self, name), 0)
        if self.workers is not None:
            _at_least("workers", self.workers, 0)
        for milestone in self.milestones:
            _at_least("milestones", milestone, 0)
        check_not_negative("weight_decay", self.weight_decay)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected a value in [0, 1), got {self.momentum}")
        if self.seed >= 2**63:
            raise ValueError(f"seed: expected a value < 2**63, got {self.seed}")
        for name in ("lr", "lr_decay"):
            check_positive(name, getattr(self, name))
        if self.clip_grad_norm is not None:
            check_positive("clip_grad_norm", self.clip_grad_norm)
        for name in ("image_size", "train_per_class"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        if self.offload == "peers":
            self._check_offload()
        if self.sampler == "balanced" and self.batch_size % self.images_per_class:
            raise ValueError(
                f"images_per_class: expected a divisor of batch_size {self.batch_size}, "
                f"got {self.images_per_class}"
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError("momentum: expected a value > 0 with nesterov, got 0")
        self._check_throughput()
        if self.schedule == "multistep" and not self.milestones:
            raise ValueError("milestones: expected at least one epoch for multistep, got none")

    def _check_throughput(self) -> None:
        """Raises ValueError if settings of speed exclude one another."""
        if self.peers_parallel != "off" and self.compile_peers:
            raise ValueError(
                f"peers_parallel: expected off with compile_peers, got {self.peers_parallel}"
            )
        if self.offload != "none" and self.compile_peers:
            raise ValueError(f"offload: expected none with compile_peers, got {self.offload}")
        if self.cuda_graphs and self.compile_peers:
            raise ValueError("cuda_graphs: expected false with compile_peers, got true")
        if self.cuda_graphs and self.amp == "fp16":
            raise ValueError(
                "cuda_graphs: expected false with amp fp16, whose scaler decides on the host, "
                "got true"
            )

    def _check_offload(self) -> None:
        """Raises ValueError if a setting needs gradients of all peers, which offload never has."""
        for name, wanted, fits in (
            ("memory", "sequential", self.memory == "sequential"),
            ("topology", "independent", self.topology == "independent"),
            (
                "clip_grad_norm",
                "none, as that is a norm over all peers,",
                self.clip_grad_norm is None,
            ),
            (
                "amp",
                "off or bf16, as fp16 skips a step by the gradients of all peers,",
                self.amp != "fp16",
            ),
            (
                "non_finite",
                "raise or rollback, as peers are updated one at a time,",
                self.non_finite != "skip",
            ),
        ):
            if not fits:
                raise ValueError(
                    f"{name}: expected {wanted} with offload peers, got {getattr(self, name)}"
                )


def unknown_setting(
    argument: str, name: str, method: str, spell: Callable[[str], str] = str
) -> ValueError:
    """The error for a name that is neither a field of the config nor an option of its method.

    Args:
        argument: argument that gave the name, for the error message.
        name: the unknown name.
        method: name of the method.
        spell: turns the name of a field into the spelling of ``name``, such as with dashes.
    """
    options = {m: field_types(methods.method_class(m).Options) for m in methods.available()}
    owners = [m for m, names in options.items() if name in map(spell, names)]
    if owners:
        owner = " or ".join(owners)
        return ValueError(
            f"{name}: expected a setting of method {method}, got one of method {owner}"
        )
    return unknown_name(argument, name, map(spell, field_types(TrainConfig) | options[method]))


def field_help(cls: type) -> dict[str, str]:
    """Help text of each field of a settings dataclass, by its name."""
    return {f.name: f.metadata.get("help", "") for f in dataclasses.fields(cls)}


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{name}: expected a value >= {least}, got {value}")


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Learning rate of an epoch.

    The cosine schedule gives ``lr * (1 + cos(pi * epoch / epochs)) / 2``; the multistep schedule
    multiplies ``lr`` by ``lr_decay`` at each milestone. In the first ``warmup_epochs`` epochs,
    both are multiplied by ``(epoch + 1) / (warmup_epochs + 1)``: a linear warm-up that does not
    delay the schedule.

    Source of the warm-up: arXiv 1706.02677, section 2.2, where the rate rises step by step.

    Args:
        config: settings of the run.
        epoch: number of the epoch, from 0.
    """
    warmup = min(1.0, (epoch + 1) / (config.warmup_epochs + 1))
    if config.schedule == "cosine":
        return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
    passed = sum(epoch >= milestone for milestone in config.milestones)
    return config.lr * warmup * config.lr_decay**passed
