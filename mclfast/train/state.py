"""The state of a run: all that training changes, and whether a saved one belongs to a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from mclfast._base.checks import shortened
from mclfast._base.random import RngState, rng_state, set_rng_state
from mclfast._base.schema import MAPPING, check_fields
from mclfast.data.dataset import Dataset
from mclfast.execution.step import TrainStep
from mclfast.train.state_checks import check_state

#: Where a run computes, and where its data lie, may change; what it computes may not.
FREE_SETTINGS = frozenset(
    {
        "device",
        "memory",
        "offload",
        "checkpoint_every",
        "eval_batch_size",
        "data_root",
        "workers",
        "channels_last",
        "compile_peers",
        "cuda_graphs",
        "peers_parallel",
        "non_finite",
    }
)


@dataclass
class EpochSoFar:
    """The part of an epoch that a checkpoint within it keeps; empty between epochs.

    Attributes:
        totals: sums of the loss and its parts over the steps done, each 0-dim.
        seconds: time taken.
        skipped: steps that were left out, as their numbers were not finite.
    """

    totals: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    skipped: int = 0


class Place(NamedTuple):
    """How far a run has come.

    Attributes:
        step: training steps done.
        epoch_so_far: losses and time of the epoch that is not finished.
        history: one record per finished epoch.
        left_out: numbers of the steps that a rollback has found to leave out.
    """

    step: int
    epoch_so_far: EpochSoFar
    history: list[dict[str, float]]
    left_out: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Identity:
    """Facts that tell one run from another.

    Attributes:
        settings: all settings by name, with the true names of networks and data.
        data: facts of the data set, as :func:`data_facts` gives them.
    """

    settings: dict[str, Any]
    data: dict[str, Any]


def data_facts(data: Dataset) -> dict[str, Any]:
    """Facts that tell one data set from another, wherever its files lie."""
    facts = {
        "training images": len(data.train),
        "test images": len(data.test),
        "class_names": list(data.class_names),
        "mean": list(data.mean),
        "std": list(data.std),
    }
    if data.train.fingerprint is not None:
        # Their numbers mean the same images only while these are the same files.
        facts["training files"] = data.train.fingerprint
    return facts


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """The settings, or facts of the data, that make a run another one: name, value before, now."""
    for name, value in before.items():
        if name not in FREE_SETTINGS and now.get(name) != value:
            yield name, value, now.get(name)


def gather(identity: Identity, step: TrainStep, place: Place) -> dict[str, Any]:
    """Everything that training changes, as tensors and plain values."""
    return {
        "settings": identity.settings,
        "data": identity.data,
        **step.state_dict(),
        "rng": rng_state()._asdict(),
        "step": place.step,
        "epoch_so_far": asdict(place.epoch_so_far),
        "history": place.history,
        "left_out": sorted(place.left_out),
    }


def restore(
    state: dict[str, Any], identity: Identity, step: TrainStep, steps_per_epoch: int
) -> Place:
    """Brings a training step, and the global generators, to a state that :func:`gather` gave.

    Args:
        state: content of a checkpoint, possibly an older one.
        identity: facts of the run that goes on.
        step: gets the saved values.
        steps_per_epoch: number of steps of each epoch.

    Returns:
        How far the saved run had come.

    Raises:
        ValueError: the state is of other settings, other data or other networks, or no run can
            have saved it.
    """
    try:
        check_fields("checkpoint", "it", state, {"settings": MAPPING, "data": MAPPING})
        pairs = ((state["settings"], identity.settings), (state["data"], identity.data))
        for saved, mine in pairs:
            for name, *values in differences(saved, mine):
                want, got = (shortened(repr(value), 80) for value in values)
                raise ValueError(
                    f"{name}: expected {want} as in the checkpoint being resumed, got {got}"
                )
        check_state(state, step, steps_per_epoch)
        step.load_state_dict(state)
        set_rng_state(RngState(**state["rng"]))
        # Older checkpoints were written between epochs only.
        so_far = EpochSoFar(**state.get("epoch_so_far", {}))
        totals = {name: total.to(step.device) for name, total in so_far.totals.items()}
        left_out = frozenset(state.get("left_out", ()))
        return Place(state["step"], replace(so_far, totals=totals), state["history"], left_out)
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"checkpoint: expected the state of these networks and this method, got: {reason}"
        ) from None
