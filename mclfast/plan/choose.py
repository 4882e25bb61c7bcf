"""The memory mode that ``memory="auto"`` stands for: the fastest that fits."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import torch

from mclfast._base.checks import shortened
from mclfast._base.machine import free_memory
from mclfast._base.sizes import format_bytes
from mclfast.config import TrainConfig
from mclfast.execution import layout, offload
from mclfast.execution.cuda_graphs import check_graphs
from mclfast.methods import Method
from mclfast.plan.estimate import Choice, estimate
from mclfast.plan.rehearsal import has_bilevel, rehearse_bilevel
from mclfast.plan.stand_in import facts_of

if TYPE_CHECKING:
    from mclfast.train.trainer import Trainer
if TYPE_CHECKING:
    from mclfast.plan.estimate import Choice

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
        memory: its name.
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


def choose(trainer: Trainer, free: int | None = None) -> Chosen:
    """Chooses by a rehearsal of a trainer's steps, see :mod:`mclfast.plan.rehearsal`.

    Args:
        trainer: on its device, with parameters, banks and data; stays as it is.
        free: bytes still free on that device; None to measure them.

    Raises:
        OSError: a system that does not say how much memory is free.
        ValueError: networks or a method that cannot be rehearsed, or settings that no mode allows.
    """
    room = free_memory(trainer.device) if free is None else free
    limit = int(SHARE * room)
    refused = {mode: _refusal(trainer, mode) for mode in MODES}
    modes = [mode for mode in MODES if refused[mode] is None]
    if not modes:
        raise ValueError(refused[MODES[0]])
    needs: dict[str, Need] = {}
    steps = _Steps(trainer, limit)
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
        f"of the {format_bytes(room)} free on {trainer.device} (needed: {listed})"
    )
    if not fits:
        reason += "; try fewer peers, a smaller batch_size, or offload peers"
        reason += "".join(f"; not tried: {why}" for why in dict.fromkeys(refused.values()) if why)
    return Chosen(chosen, reason)


def _refusal(trainer: Trainer, mode: str) -> str | None:
    choice = Choice(mode, "none", trainer.config.amp)
    return refusal(trainer.config, trainer.method, trainer.device, choice)


class _Steps:
    """The steps of a trainer; a bilevel step, slow to rehearse, is rehearsed where it must be.

    Args:
        trainer: stays as it is.
        limit: of what the steps may add, in bytes.
    """

    def __init__(self, trainer: Trainer, limit: int) -> None:
        self._trainer, self._limit = trainer, limit
        self._bilevel: dict[bool, int] = {}

    def need(self, mode: str) -> Need:
        """What the steps add in a mode, as far as it takes to tell whether that fits."""
        t, c = self._trainer, self._trainer.config
        found = estimate(
            t,
            facts_of(t.data),
            Choice(mode, "none", c.amp),
            c.batch_size,
            device=t.device.type,
            bilevel=False,
            graphed=c.cuda_graphs,
        )
        size = found.total - found.kept
        if not has_bilevel(t):
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
            c = self._trainer.config
            self._bilevel[one_at_a_time] = rehearse_bilevel(
                self._trainer, one_at_a_time=one_at_a_time, amp=c.amp, batch_size=c.batch_size
            )
        return self._bilevel[one_at_a_time]


def refusal(
    config: TrainConfig, method: Method, device: torch.device, choice: Choice
) -> str | None:
    """Why training would refuse a choice, in its words; None where it would not.

    Args:
        config: of the run; its memory, offload and amp do not matter.
        method: of the run.
        device: of the run; need not be here.
        choice: the settings.
    """
    try:
        config = dataclasses.replace(config, **choice._asdict())
        layout.check_memory(config, config.memory)
        if config.offload == "peers":
            offload.check_method(method)
        if config.cuda_graphs:
            check_graphs(config, method, config.memory, device)
    except ValueError as error:
        return str(error)
    return None
