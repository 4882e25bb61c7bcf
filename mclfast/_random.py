"""The global random number generators of the CPU and of the device of a run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RandomState(NamedTuple):
    """States of both generators; ``device`` is None where that is the CPU."""

    cpu: Tensor
    device: Tensor | None


def random_state(device: torch.device) -> RandomState:
    """The states now; does not wait for the device."""
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return RandomState(torch.get_rng_state(), own)


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Goes back to what :func:`random_state` gave."""
    torch.set_rng_state(state.cpu)
    if state.device is not None:
        torch.cuda.set_rng_state(state.device, device)
