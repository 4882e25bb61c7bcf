"""Whether a run can have saved a state: a checkpoint may be intact and hold what no run writes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mclfast._base.schema import MAPPING, Kind, check_fields, integer, list_of, number
from mclfast._base.tensors import finite_sum
from mclfast.execution.step import TrainStep
from mclfast.train.history import check_history

_GENERATOR = Kind(
    "the state of a generator (uint8)",
    lambda value: isinstance(value, Tensor) and value.dtype == torch.uint8 and value.dim() == 1,
)
_SUM = Kind(
    "a finite 0-dim tensor",
    lambda value: isinstance(value, Tensor) and value.dim() == 0 and math.isfinite(value),
)
_PRESENT = Kind("a value as other parameters have", lambda value: value is not None)
_FIELDS = {"step": integer(0), "history": list_of(MAPPING), "rng": MAPPING}
#: Settings of an optimiser that the settings of the run fix; the learning rate changes.
_FIXED = (
    "momentum",
    "dampening",
    "weight_decay",
    "nesterov",
    "maximize",
    "betas",
    "eps",
    "differentiable",
)
#: Ways to compute that a device decides on.
_WAYS = ("foreach", "fused", "capturable")


def check_state(state: Mapping[str, Any], step: TrainStep, steps_per_epoch: int) -> None:
    """Accepts a state that a run of these settings can have saved.

    Args:
        state: content of a checkpoint, whose settings and data are those of the run.
        step: the training step that it is for; nothing of it is changed.
        steps_per_epoch: number of steps of each epoch.

    Raises:
        ValueError: a value is absent, of another kind, not finite, or does not agree with others;
            the text begins with ``checkpoint``.
    """
    check_fields("checkpoint", "it", state, _FIELDS)
    check_fields("checkpoint", "rng", state["rng"], {"cpu": _GENERATOR})
    check_fields("checkpoint", "rng", state["rng"], {"cuda": list_of(_GENERATOR)})
    size, wanted = state["rng"]["cpu"].numel(), torch.get_rng_state().numel()
    if size != wanted:
        raise ValueError(f"checkpoint: expected {wanted} bytes as cpu in rng, got {size}")
    _check_place(state, len(step.cohort.networks), steps_per_epoch, step.config.epochs)
    for name, module in (("cohort", step.cohort), ("method", step.method)):
        _check_module(name, module, state[name])
    if step.average is not None and state["average"] is not None:
        _check_module("average", step.average, state["average"])
    if step.scaler.is_enabled():
        fields = {"scale": number(1e-30), "_growth_tracker": integer(0)}
        check_fields("checkpoint", "scaler", state["scaler"], fields)
    optimizers: dict[str, torch.optim.Optimizer | None]
    optimizers = {"optimizer": step.optimizer, "meta_optimizer": step.meta_optimizer}
    saved = {name: state[name] for name in optimizers}
    for name, own in step.method.own_optimizers().items():
        optimizers[name], saved[name] = own, state["own_optimizers"][name]
    for name, optimizer in optimizers.items():
        if optimizer is not None and saved[name] is not None:
            _check_optimizer(name, optimizer, saved[name])


def _check_place(state: Mapping[str, Any], peers: int, steps_per_epoch: int, epochs: int) -> None:
    step, history = state["step"], state["history"]
    check_history("checkpoint", "history", history, peers)
    done = len(history)
    # The last step of an epoch may be done and the evaluation after it not.
    least, most = done * steps_per_epoch, (done + 1) * steps_per_epoch
    if done > epochs or not least <= step <= (least if done == epochs else most):
        raise ValueError(
            f"checkpoint: expected step {least} to {most} after {done} epochs of {steps_per_epoch} "
            f"steps, {epochs} in all, got {step}"
        )
    if done and history[-1].get("step", least) != least:
        raise ValueError(
            f"checkpoint: expected step {least} in the last record of history, got "
            f"{history[-1]['step']}"
        )
    # An older checkpoint was written between epochs only.
    so_far = state.get("epoch_so_far", {"totals": {}, "seconds": 0.0})
    check_fields("checkpoint", "it", {"epoch_so_far": so_far}, {"epoch_so_far": MAPPING})
    fields = {"totals": MAPPING, "seconds": number(0)}
    check_fields("checkpoint", "epoch_so_far", so_far, fields)
    skipped = {"skipped": integer(0), "left_out": list_of(integer(0))}
    others = {"skipped": so_far.get("skipped", 0), "left_out": state.get("left_out", [])}
    check_fields("checkpoint", "it", others, skipped)
    totals = so_far["totals"]
    summed = step > least + others["skipped"]
    wanted = dict.fromkeys(totals, _SUM) | ({"loss": _SUM} if summed else {})
    check_fields("checkpoint", "totals", totals, wanted)


def _check_module(name: str, module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Raises ValueError where a tensor is absent, of another shape, or not finite."""
    check_fields("checkpoint", "it", {name: saved}, {name: MAPPING})
    for key, own in module.state_dict().items():
        # Absent and surplus names are found by the step, with better words.
        if key not in saved or not isinstance(own, Tensor):
            continue
        _check_tensor(f"{name}.{key}", saved[key], own.shape)


def _check_tensor(name: str, value: Any, shape: torch.Size) -> None:
    if not isinstance(value, Tensor) or value.shape != shape:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"checkpoint: expected shape {list(shape)} of {name}, got {got}")
    # The sum takes no copy of a large bank.
    if not math.isfinite(finite_sum(value)):
        raise ValueError(f"checkpoint: expected finite values of {name}, got infinite or NaN ones")


def _check_optimizer(name: str, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Raises ValueError where PyTorch would take buffers or settings that are not the run's."""
    check_fields("checkpoint", "it", {name: saved}, {name: MAPPING})
    fields = {
        "state": Kind("a mapping", lambda v: isinstance(v, dict)),
        "param_groups": list_of(MAPPING),
    }
    check_fields("checkpoint", name, saved, fields)
    groups, own_groups = saved["param_groups"], optimizer.param_groups
    if len(groups) != len(own_groups):
        raise ValueError(
            f"checkpoint: expected {len(own_groups)} param_groups in {name}, got {len(groups)}"
        )
    for index, (group, own) in enumerate(zip(groups, own_groups, strict=True)):
        place = f"param_groups[{index}] of {name}"
        check_fields("checkpoint", place, group, {"lr": number(0), "params": list_of(integer(0))})
        if len(group["params"]) != len(own["params"]):
            raise ValueError(
                f"checkpoint: expected {len(own['params'])} params in {place}, got "
                f"{len(group['params'])}"
            )
        for key in _FIXED:
            if key in own and _plain(group.get(key)) != _plain(own[key]):
                raise ValueError(
                    f"checkpoint: expected {key} {own[key]} in {place}, got {group.get(key)}"
                )
        for key in _WAYS:
            if group.get(key) not in (None, True, False):
                raise ValueError(
                    f"checkpoint: expected true, false or null as {key} in {place}, got "
                    f"{group[key]!r}"
                )
    entries = [values for values in saved["state"].values() if isinstance(values, dict)]
    names = {key for values in entries for key, value in values.items() if value is not None}
    parameters = list(_parameters(optimizer))
    for index, values in saved["state"].items():
        place = f"state[{index!r}] of {name}"
        if type(index) is not int or not 0 <= index < len(parameters):
            raise ValueError(f"checkpoint: expected {len(parameters)} parameters, got {place}")
        check_fields("checkpoint", place, {"state": values}, {"state": MAPPING})
        # A parameter that lost its momentum would start anew without a word.
        check_fields("checkpoint", place, values, dict.fromkeys(names, _PRESENT))
        for key, value in values.items():
            # A count of steps is a single number, all else has the shape of the parameter; SGD
            # without momentum has none.
            if value is not None:
                shape = torch.Size() if key == "step" else parameters[index].shape
                _check_tensor(f"{key} in {place}", value, shape)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
