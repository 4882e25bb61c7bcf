"""The random number generators that networks and losses draw from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

RngState = tuple[Tensor, list[Tensor]]


def rng_state() -> RngState:
    """State of the generators of the CPU and of all GPUs, where this process uses any.

    Waits for no device: the host keeps them. Where parameters lie does not say where they are used.
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return torch.get_rng_state(), [torch.cuda.get_rng_state(gpu) for gpu in gpus]


def set_rng_state(state: RngState) -> None:
    """Goes back to a state that :func:`rng_state` gave."""
    torch.set_rng_state(state[0])
    for gpu, value in enumerate(state[1]):
        torch.cuda.set_rng_state(value, gpu)


@contextmanager
def rng_restored() -> Iterator[None]:
    """Leaves the generators as they were."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
