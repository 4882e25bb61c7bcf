"""The state of a run: all that training changes, and whether a saved one belongs to a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mclfast._base.checks import shortened
from mclfast._base.random import RngState, rng_state, set_rng_state
from mclfast.data.dataset import Dataset

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
    }
)


class Stateful(Protocol):
    """A module, an optimiser or a scaler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


#: What holds the tensors of a run, by name; None where a run has no such part.
Parts = Mapping[str, Stateful | Mapping[str, Stateful] | None]


@dataclass
class EpochSoFar:
    """What a checkpoint within an epoch keeps of it; empty between epochs.

    Attributes:
        totals: sums of the loss and its parts over the steps done, each 0-dim.
        seconds: time taken.
    """

    totals: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0


class Place(NamedTuple):
    """How far a run has come.

    Attributes:
        step: training steps done.
        epoch_so_far: of the epoch that is not finished.
        history: one record per epoch that is.
    """

    step: int
    epoch_so_far: EpochSoFar
    history: list[dict[str, float]]


@dataclass(frozen=True)
class Identity:
    """What tells one run from another.

    Attributes:
        settings: by name, with the true names of networks and data.
        data: see :func:`data_facts`.
    """

    settings: dict[str, Any]
    data: dict[str, Any]


def data_facts(data: Dataset) -> dict[str, Any]:
    """What tells one data set from another, wherever its files lie."""
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


def gather(identity: Identity, parts: Parts, place: Place) -> dict[str, Any]:
    """Everything that training changes, as tensors and plain values; wait for the device before."""
    return {
        "settings": identity.settings,
        "data": identity.data,
        **{name: _saved(part) for name, part in parts.items()},
        "rng": rng_state()._asdict(),
        "step": place.step,
        "epoch_so_far": asdict(place.epoch_so_far),
        "history": place.history,
    }


def restore(state: dict[str, Any], identity: Identity, parts: Parts, device: torch.device) -> Place:
    """Brings parts, and the global generators, to a state that :func:`gather` gave.

    Args:
        state: of a checkpoint, possibly an older one.
        identity: of the run that goes on.
        parts: get the saved values.
        device: of the run.

    Returns:
        How far the run had come.

    Raises:
        ValueError: the state is of other settings, other data or other networks.
    """
    try:
        for saved, mine in ((state["settings"], identity.settings), (state["data"], identity.data)):
            for name, *values in differences(saved, mine):
                want, got = (shortened(repr(value), 80) for value in values)
                raise ValueError(
                    f"{name}: expected {want} as in the checkpoint being resumed, got {got}"
                )
        for name, part in parts.items():
            if part is not None:
                _load(part, state, name)
        set_rng_state(RngState(**state["rng"]))
        # Older checkpoints were written between epochs only.
        so_far = EpochSoFar(**state.get("epoch_so_far", {}))
        totals = {name: total.to(device) for name, total in so_far.totals.items()}
        return Place(state["step"], replace(so_far, totals=totals), state["history"])
    except (KeyError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"checkpoint: expected the state of these networks and this method, got: {reason}"
        ) from None


def _saved(part: Stateful | Mapping[str, Stateful] | None) -> dict[str, Any] | None:
    if part is None:
        return None
    if isinstance(part, Mapping):
        return {name: own.state_dict() for name, own in part.items()}
    return part.state_dict()


def _load(part: Stateful | Mapping[str, Stateful], state: Mapping[str, Any], name: str) -> None:
    if not isinstance(part, Mapping):
        part.load_state_dict(state[name])
        return
    for key, own in part.items():
        own.load_state_dict(state[name][key])
