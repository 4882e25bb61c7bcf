"""The random number generators that networks and losses draw from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

RngState = tuple[Tensor, dict[torch.device, Tensor]]


def rng_state(devices: set[torch.device]) -> RngState:
    """State of the CPU's generator and of those of the GPUs among ``devices``; waits for none."""
    cuda = {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}
    return torch.get_rng_state(), cuda


def set_rng_state(state: RngState) -> None:
    """Goes back to a state that :func:`rng_state` gave."""
    torch.set_rng_state(state[0])
    for device, value in state[1].items():
        torch.cuda.set_rng_state(value, device)


@contextmanager
def rng_restored(devices: set[torch.device]) -> Iterator[None]:
    """Leaves the generators as they were."""
    state = rng_state(devices)
    try:
        yield
    finally:
        set_rng_state(state)
