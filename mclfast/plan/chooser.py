"""The memory mode that ``memory="auto"`` stands for: the fastest that fits."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from mclfast._base.checks import shortened
from mclfast._base.machine import free_memory
from mclfast._base.sizes import format_bytes
from mclfast.config import TrainConfig
from mclfast.execution import modes
from mclfast.execution.step import TrainStep
from mclfast.methods.base import Method
from mclfast.plan.estimate import Choice, estimate
from mclfast.plan.rehearsal import rehearse_bilevel
from mclfast.plan.sizes_of_data import DataFacts

#: From the fastest to the one that needs least.
MODES = ("ordinary", "checkpoint", "sequential")

#: Share of a device's memory that a run may take: estimates are off by a few percent, and other
#: processes and the libraries' own workspaces want some.
SHARE = 0.85

#: In the ordinary mode a bilevel step adds less than this many times what an ordinary step does:
#: 2.1 to 2.5 times by forward mode, 3.4 times by gradients of gradients, on which networks without
#: forward mode fall back.
BILEVEL_AT_MOST = 5


class Chosen(NamedTuple):
    """A memory mode, and why.

    Attributes:
        memory: name of the mode.
        reason: one line, which starts with the name.
    """

    memory: str
    reason: str


class Need(NamedTuple):
    """Bytes that steps add to what is there before them.

    Attributes:
        size: the number of bytes.
        bound: "under" or "over" it, where more need not be known; "" where it is the number.
    """

    size: int
    bound: str = ""

    def __str__(self) -> str:
        return f"{self.bound} {format_bytes(self.size)}".lstrip()


def choose(step: TrainStep, known: DataFacts, free: int | None = None) -> Chosen:
    """Chooses by a rehearsal of a step, see :mod:`mclfast.plan.rehearsal`.

    Args:
        step: the step of the run, on its device; stays as it is.
        known: sizes of the data, which are in memory already.
        free: bytes still free on that device; None to measure them.

    Raises:
        OSError: a system that does not say how much memory is free.
        ValueError: networks or a method that cannot be rehearsed, or settings that no mode allows.
    """
    room = free_memory(step.device) if free is None else free
    limit = int(SHARE * room)
    refused = {mode: _refusal(step, mode) for mode in MODES}
    modes = [mode for mode in MODES if refused[mode] is None]
    if not modes:
        raise ValueError(refused[MODES[0]])
    needs: dict[str, Need] = {}
    steps = _Steps(step, known, limit)
    for mode in modes:
        try:
            needs[mode] = steps.need(mode)
        except Exception as error:
            # Networks of one's own may do what tensors without values cannot.
            reason = " ".join(str(error).split())
            raise ValueError(
                f"memory: expected one of {', '.join(modes)} for a run that cannot be rehearsed, "
                f"got auto ({shortened(reason, 200)})"
            ) from error
        if needs[mode].size <= limit:
            break
    fits = needs[mode].size <= limit
    # The ordinary mode never needs less than another one.
    chosen = mode if fits else min(modes[1:] or modes, key=lambda name: needs[name].size)
    listed = ", ".join(f"{name} {need}" for name, need in needs.items())
    reason = (
        f"{chosen}: its steps {'fit' if fits else 'need least, but do not fit'} into {SHARE:.0%} "
        f"of the {format_bytes(room)} free on {step.device} (needed: {listed})"
    )
    if not fits:
        reason += "; try fewer peers, a smaller batch_size, or offload peers"
        reason += "".join(f"; not tried: {why}" for why in dict.fromkeys(refused.values()) if why)
    return Chosen(chosen, reason)


def _refusal(step: TrainStep, mode: str) -> str | None:
    choice = Choice(mode, "none", step.config.amp)
    return refusal(step.config, step.method, step.device, choice)


class _Steps:
    """The needs of a step in each mode; a bilevel step, slow to rehearse, only where it must be.

    Args:
        step: stays as it is.
        known: sizes of the data.
        limit: bytes that the steps may add.
    """

    def __init__(self, step: TrainStep, known: DataFacts, limit: int) -> None:
        self._step, self._known, self._limit = step, known, limit
        self._bilevel: dict[bool, int] = {}

    def need(self, mode: str) -> Need:
        """Bytes that the steps add in a mode, as exactly as it takes to tell whether they fit."""
        c = self._step.config
        found = estimate(
            self._step,
            self._known,
            Choice(mode, "none", c.amp),
            c.batch_size,
            device=self._step.device.type,
            bilevel=False,
            graphed=c.cuda_graphs,
        )
        size = found.total - found.kept
        if not self._step.has_bilevel:
            return Need(size)
        if size > self._limit:
            return Need(size, "over")
        if mode == "ordinary" and BILEVEL_AT_MOST * size <= self._limit:
            return Need(BILEVEL_AT_MOST * size, "under")
        found = found.with_bilevel(self._bilevel_bytes(one_at_a_time=mode != "ordinary"))
        return Need(found.total - found.kept)

    def _bilevel_bytes(self, *, one_at_a_time: bool) -> int:
        """The same for each mode but the ordinary one."""
        if one_at_a_time not in self._bilevel:
            c = self._step.config
            self._bilevel[one_at_a_time] = rehearse_bilevel(
                self._step, one_at_a_time=one_at_a_time, amp=c.amp, batch_size=c.batch_size
            )
        return self._bilevel[one_at_a_time]


def refusal(
    config: TrainConfig, method: Method, device: torch.device, choice: Choice
) -> str | None:
    """Why training would refuse a choice, in its words; None where it would not.

    Args:
        config: settings of the run; its memory, offload and amp do not matter.
        method: the method of the run.
        device: the device that the run is for; it need not be here.
        choice: the settings.
    """
    try:
        config = dataclasses.replace(config, **choice._asdict())
        modes.check(config.memory, config, method, device)
    except ValueError as error:
        return str(error)
    return None
