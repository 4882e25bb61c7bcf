"""What a run needs in a memory mode: what it keeps, and what its steps add for a while."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from mclfast.methods.banked import BankMethod
from mclfast.plan.live_bytes import HOST, WORKSPACE
from mclfast.plan.rehearsal import (
    ACTIVATIONS,
    GRADIENTS,
    LOSS,
    OPTIMIZER,
    Rehearsed,
    rehearse,
)
from mclfast.plan.stand_in import DataFacts, scaled_bytes

if TYPE_CHECKING:
    from mclfast.train import Trainer

PARAMETERS, BANK, DATA, HEAP = "parameters", "bank", "data set", "heap"
#: What memory goes to, in the order of the report.
PARTS = (ACTIVATIONS, PARAMETERS, GRADIENTS, OPTIMIZER, LOSS, BANK, DATA, WORKSPACE, HEAP)

#: On a CPU, gaps between freed blocks that the C library's allocator does not give back, as a share
#: of what a step allocates and frees. Measured with glibc for eleven cases of networks, peers and
#: batches: 0.28 to 0.76.
HEAP_SHARE = 0.45


class Choice(NamedTuple):
    """Settings that trade memory for time or precision.

    Attributes:
        memory, offload, amp: values of the settings of these names in ``TrainConfig``.
    """

    memory: str
    offload: str = "none"
    amp: str = "off"

    def __str__(self) -> str:
        words = [self.memory, *(["offload"] if self.offload == "peers" else ())]
        return " + ".join([*words, *([self.amp] if self.amp != "off" else ())])


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of each kind of step.

    Attributes:
        choice: of the settings.
        networks: number of peers.
        batch_size: images per step.
        parts: of an ordinary step, by the names of :data:`PARTS`; they add up to ``step``.
        bilevel: of a bilevel step in all, 0 where there is none.
        evaluation: of an evaluation batch in all.
        host: in host memory beside a GPU.
        whole_loss: see :class:`mclfast.plan.rehearsal.Rehearsed`.
    """

    choice: Choice
    networks: int
    batch_size: int
    parts: Mapping[str, int]
    bilevel: int
    evaluation: int
    host: int = 0
    whole_loss: bool = True

    @property
    def step(self) -> int:
        """The peak of an ordinary step."""
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        """The most that the run needs at any time."""
        return max(self.step, self.bilevel, self.evaluation)


class Kept(NamedTuple):
    """Bytes that a run keeps from its first step to its last.

    Attributes:
        parameters: with buffers; of the cohort, its moving average and the method.
        bank: memory banks, queues of keys and what is drawn from them for a batch.
        data: images and labels.
        host: in host memory beside a GPU.
    """

    parameters: int
    bank: int
    data: int
    host: int = 0

    @property
    def on_device(self) -> int:
        return self.parameters + self.bank + self.data


def kept(
    trainer: Trainer, known: DataFacts, batch_size: int, *, pinned: bool = False, offload: bool
) -> Kept:
    """What a trainer keeps.

    Args:
        trainer: may be a stand-in, for fewer images than the true set has.
        known: the true set.
        batch_size: images per step.
        pinned: memory banks lie in host memory.
        offload: so do the parameters of the peers.
    """
    cohort, method = trainer.cohort, trainer.method
    nets = [cohort, *([trainer.average] if trainer.average else ())]
    images = len(trainer.data.train)
    parameters = sum(p.nbytes for m in (*nets, method) for p in m.parameters())
    parameters += sum(b.nbytes for m in nets for b in m.buffers())
    away = sum(p.nbytes for p in cohort.parameters()) if offload else 0
    bank = scaled_bytes(list(method.buffers()), images, known.train)
    banks = 0
    if pinned and isinstance(method, BankMethod) and method.bank is not None:
        banks = scaled_bytes(list(method.bank.buffers()), images, known.train)
    drawn = _drawn_bytes(method, batch_size)
    return Kept(parameters - away, bank - banks + drawn, known.nbytes, away + banks)


def _drawn_bytes(method: nn.Module, batch_size: int) -> int:
    """Indices of the positives and negatives of a batch, of the last one and of the next."""
    if not isinstance(method, BankMethod) or method.sampler is None:
        return 0
    sampler = method.sampler
    negatives = 1 if sampler.shared_negatives else batch_size
    count = batch_size * (1 + sampler.num_positives) + negatives * sampler.num_negatives
    return 2 * count * 8


def combine(
    kept_: Kept, came: Rehearsed, choice: Choice, networks: int, batch_size: int, *, heap: bool
) -> Estimate:
    """One estimate of what a run keeps and of what its steps were seen to add.

    Args:
        kept_: what it keeps.
        came: what its steps add.
        choice, networks, batch_size: as in :class:`Estimate`.
        heap: add the share of :data:`HEAP_SHARE`.
    """
    held = {PARAMETERS: kept_.parameters, BANK: kept_.bank, DATA: kept_.data}
    host = came.step.get(HOST, 0)
    share = HEAP_SHARE if heap else 0.0
    lasting = sum(came.step.get(kind, 0) for kind in (OPTIMIZER, GRADIENTS))

    def with_gaps(size: int) -> int:
        return size + int(share * max(0, size - lasting))

    step = sum(came.step.values()) - host
    parts = came.step | held | {HEAP: with_gaps(step) - step}
    return Estimate(
        choice,
        networks,
        batch_size,
        {name: parts[name] for name in PARTS if parts.get(name)},
        bilevel=kept_.on_device + with_gaps(came.bilevel) if came.bilevel else 0,
        evaluation=kept_.on_device + with_gaps(came.evaluation),
        host=kept_.host + host,
        whole_loss=came.whole_loss,
    )


def estimate(
    trainer: Trainer,
    known: DataFacts,
    choice: Choice,
    batch_size: int,
    *,
    device: str,
    bilevel: bool = True,
    pinned: bool = False,
) -> Estimate:
    """What a run needs at its peak.

    Args:
        trainer: of the run, or a stand-in for it; stays as it is.
        known: the data set.
        choice: the settings.
        batch_size: images per step.
        device: type of the device that the run is for, "cpu" or "cuda".
        bilevel: count the bilevel step.
        pinned: memory banks lie in host memory.
    """
    came = rehearse(
        trainer,
        **choice._asdict(),
        batch_size=batch_size,
        foreach=device != "cpu",
        bilevel=bilevel,
    )
    offload = choice.offload == "peers"
    held = kept(trainer, known, batch_size, pinned=pinned, offload=offload)
    networks = len(trainer.cohort.peers)
    return combine(held, came, choice, networks, batch_size, heap=device == "cpu")
