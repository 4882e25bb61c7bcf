"""The random number generators that networks and losses draw from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class RngState(NamedTuple):
    """States of the global generators.

    Attributes:
        cpu: of the CPU.
        cuda: of every GPU that this process uses.
    """

    cpu: Tensor
    cuda: list[Tensor]


def rng_state() -> RngState:
    """State of the generators of the CPU and of all GPUs, where this process uses any.

    Waits for no device: the host keeps them. Where parameters lie does not say where they are used.
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return RngState(torch.get_rng_state(), [torch.cuda.get_rng_state(gpu) for gpu in gpus])


def set_rng_state(state: RngState) -> None:
    """Goes back to a state that :func:`rng_state` gave, on a machine with as many GPUs or fewer."""
    torch.set_rng_state(state.cpu.cpu())
    # A run may go on with fewer GPUs than it was saved with, or with none.
    for gpu, value in zip(range(torch.cuda.device_count()), state.cuda, strict=False):
        torch.cuda.set_rng_state(value.cpu(), gpu)


@contextmanager
def rng_restored() -> Iterator[None]:
    """Leaves the generators as they were."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
