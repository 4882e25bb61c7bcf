"""The memory of a run in a memory mode: kept throughout, and added by its steps for a while."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from mclfast.execution.step import TrainStep
from mclfast.methods._banked import BankMethod
from mclfast.plan.live_bytes import HOST, WORKSPACE
from mclfast.plan.rehearsal import (
    ACTIVATIONS,
    GRADIENTS,
    LOSS,
    OPTIMIZER,
    rehearse,
    rehearse_bilevel,
)
from mclfast.plan.sizes_of_data import DataFacts
from mclfast.plan.stand_in import scaled_bytes

PARAMETERS, BANK, DATA, HEAP = "parameters", "bank", "data set", "heap"
#: The uses of memory, in the order of the report.
PARTS = (ACTIVATIONS, PARAMETERS, GRADIENTS, OPTIMIZER, LOSS, BANK, DATA, WORKSPACE, HEAP)

#: On a CPU, gaps between freed blocks that the C library's allocator does not give back, as a share
#: of what a step allocates and frees. A middle value: ``bench/bench_resident.py`` measured 0.06 to
#: 1.46 with glibc for six cases of networks, peers and batches.
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
        choice: the settings that trade memory for time.
        networks: number of peers.
        batch_size: images per step.
        parts: bytes of an ordinary step, by the names of :data:`PARTS`; they add up to ``step``.
        host: bytes in host memory beside a GPU.
        whole_loss: whether the method's own loss was counted, not a stand-in for it.
        graphed: the step is recorded as a CUDA graph, whose memory nothing else can use.
        evaluation: bytes of an evaluation batch in all.
        bilevel: bytes of a bilevel step in all, 0 without bilevel steps.
    """

    choice: Choice
    networks: int
    batch_size: int
    parts: Mapping[str, int]
    host: int = 0
    whole_loss: bool = True
    graphed: bool = False
    evaluation: int = 0
    bilevel: int = 0

    @property
    def step(self) -> int:
        """The peak of an ordinary step."""
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        """The most that the run needs at any time."""
        return max(self.peaks)

    @property
    def peaks(self) -> tuple[int, int, int]:
        """Memory at the peak of ordinary steps, of bilevel steps and of evaluation."""
        beside = self.step - self.lasting if self.graphed else 0
        return self.step, self.bilevel + beside, self.evaluation + beside

    @property
    def kept(self) -> int:
        """Memory in use before the first step."""
        return sum(self.parts.get(part, 0) for part in (PARAMETERS, BANK, DATA))

    @property
    def lasting(self) -> int:
        """Memory in use between steps."""
        return self.kept + self.parts.get(OPTIMIZER, 0)

    def adding(self, size: int) -> int:
        """Total memory at the moment an operation adds ``size`` bytes to what the run keeps."""
        return self.kept + size + (_gaps(size, self.parts) if HEAP in self.parts else 0)

    def with_bilevel(self, size: int) -> Estimate:
        """The same with a bilevel step that adds some bytes; 0 where there is none."""
        return dataclasses.replace(self, bilevel=self.adding(size) if size else 0)


class Kept(NamedTuple):
    """Bytes that a run keeps from its first step to its last.

    Attributes:
        parameters: parameters and buffers of the cohort, its moving average and the method.
        bank: memory banks, queues of keys and what is drawn from them for a batch.
        data: images and labels.
        host: bytes in host memory beside a GPU.
    """

    parameters: int
    bank: int
    data: int
    host: int = 0


def kept(
    step: TrainStep, known: DataFacts, batch_size: int, *, pinned: bool = False, offload: bool
) -> Kept:
    """Bytes that a run keeps between its steps.

    Args:
        step: the step of the run, or a stand-in for fewer images than the true set has.
        known: the true set.
        batch_size: images per step.
        pinned: memory banks lie in host memory.
        offload: so do the parameters of the peers.
    """
    cohort, method = step.cohort, step.method
    nets = [cohort, *([step.average] if step.average else ())]
    images = step.num_samples
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


def estimate(
    step: TrainStep,
    known: DataFacts,
    choice: Choice,
    batch_size: int,
    *,
    device: str,
    bilevel: bool = True,
    graphed: bool = False,
    pinned: bool = False,
) -> Estimate:
    """Estimates the memory of a run at its peaks.

    Args:
        step: the step of the run, or a stand-in for it; stays as it is.
        known: the data set.
        choice: the settings.
        batch_size: images per step.
        device: type of the device that the run is for, "cpu" or "cuda".
        bilevel: rehearse the bilevel step too, which takes as long as some ten ordinary ones.
        graphed: whether the step is recorded as a CUDA graph.
        pinned: memory banks lie in host memory.
    """
    came = rehearse(step, **choice._asdict(), batch_size=batch_size, foreach=device != "cpu")
    away = choice.offload == "peers"
    held = kept(step, known, batch_size, pinned=pinned, offload=away)
    parts = came.step | {PARAMETERS: held.parameters, BANK: held.bank, DATA: held.data}
    host = parts.pop(HOST, 0)
    if device == "cpu":
        parts[HEAP] = _gaps(sum(came.step.values()) - host, parts)
    found = Estimate(
        choice,
        len(step.cohort.peers),
        batch_size,
        {name: parts[name] for name in PARTS if parts.get(name)},
        host=held.host + host,
        whole_loss=came.whole_loss,
        graphed=graphed,
    )
    found = dataclasses.replace(found, evaluation=found.adding(came.evaluation))
    if not bilevel:
        return found
    alone = choice.memory != "ordinary"
    return found.with_bilevel(
        rehearse_bilevel(
            step, one_at_a_time=alone, amp=choice.amp, batch_size=batch_size, offload=choice.offload
        )
    )


def _gaps(size: int, parts: Mapping[str, int]) -> int:
    """Gaps in the heap, for a step on a CPU that adds ``size`` bytes to what the run keeps."""
    lasting = parts.get(OPTIMIZER, 0) + parts.get(GRADIENTS, 0)
    return int(HEAP_SHARE * max(0, size - lasting))
