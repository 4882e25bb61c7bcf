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
        cpu: state of the CPU's generator.
        cuda: one state for every GPU; empty if this process uses no GPU.
    """

    cpu: Tensor
    cuda: list[Tensor]


def rng_state() -> RngState:
    """State of the generators of the CPU and, if this process uses a GPU, of all GPUs.

    All GPUs are read, because the place of a parameter does not tell which device will use it. The
    host keeps these states, so that no device is waited for.
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return RngState(torch.get_rng_state(), [torch.cuda.get_rng_state(gpu) for gpu in gpus])


def set_rng_state(state: RngState) -> None:
    """Goes back to a state of :func:`rng_state`, taken with as many GPUs as here or with more."""
    torch.set_rng_state(state.cpu.cpu())
    # A run may go on with fewer GPUs than it was saved with, or with none.
    for gpu, value in zip(range(torch.cuda.device_count()), state.cuda, strict=False):
        torch.cuda.set_rng_state(value.cpu(), gpu)


@contextmanager
def rng_restored() -> Iterator[None]:
    """Sets the generators back after the block to their states of before."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
