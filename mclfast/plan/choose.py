"""The memory mode that ``memory="auto"`` stands for: the fastest that fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mclfast._checks import shortened
from mclfast.plan.estimate import Choice, Estimate, combine, kept
from mclfast.plan.free_memory import free_memory
from mclfast.plan.rehearsal import rehearse
from mclfast.plan.sizes import format_bytes
from mclfast.plan.stand_in import facts_of

if TYPE_CHECKING:
    from mclfast.train import Trainer

#: From the fastest to the one that needs least.
MODES = ("ordinary", "checkpoint", "sequential")
#: Share of the free memory that a mode may take: estimates are off by a few percent, and other
#: processes and the libraries' own workspaces want some.
SHARE = 0.85


class Chosen(NamedTuple):
    """A memory mode, and why.

    Attributes:
        memory: its name.
        reason: one line, which starts with the name.
    """

    memory: str
    reason: str


def choose(trainer: Trainer, free: int | None = None) -> Chosen:
    """Chooses by a rehearsal of a trainer's steps, see :mod:`mclfast.plan.rehearsal`.

    Args:
        trainer: on its device, with parameters, banks and data; stays as it is.
        free: bytes still free on that device; None to measure them.

    Raises:
        OSError: a system that does not say how much memory is free.
        ValueError: networks or a method that cannot be rehearsed.
    """
    room = free_memory(trainer.device) if free is None else free
    limit = int(SHARE * room)
    needs: dict[str, int] = {}
    for mode in MODES:
        try:
            needs[mode] = still_needed(trainer, mode)
        except Exception as error:
            # Networks of one's own may do what tensors without values cannot.
            reason = " ".join(str(error).split())
            raise ValueError(
                f"memory: expected one of {', '.join(MODES)} for a run that cannot be rehearsed, "
                f"got auto ({shortened(reason, 200)})"
            ) from error
        if needs[mode] <= limit:
            break
    fits = needs[mode] <= limit
    chosen = mode if fits else min(needs, key=lambda name: needs[name])
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in needs.items())
    reason = (
        f"{chosen}: its steps {'fit' if fits else 'need least, but do not fit'} into {SHARE:.0%} "
        f"of the {format_bytes(room)} free on {trainer.device} (needed: {listed})"
    )
    if not fits:
        reason += "; try fewer peers, a smaller batch_size, or offload peers"
    return Chosen(chosen, reason)


def still_needed(trainer: Trainer, memory: str) -> int:
    """Bytes that a trainer's steps add to what it holds already.

    Args:
        trainer: stays as it is.
        memory: name of a memory mode.
    """
    c = trainer.config
    cpu = trainer.device.type == "cpu"
    came = rehearse(
        trainer, memory=memory, offload="none", amp=c.amp, batch_size=c.batch_size,
        foreach=not cpu,
    )  # fmt: skip
    held = kept(trainer, facts_of(trainer.data), c.batch_size, offload=False)
    full: Estimate = combine(
        held, came, Choice(memory, "none", c.amp), len(trainer.cohort.peers), c.batch_size, heap=cpu
    )
    return full.total - held.on_device
