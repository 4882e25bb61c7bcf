"""The memory of a run under each choice of settings, and the largest run that fits in each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from mclfast.config import TrainConfig
from mclfast.execution.step import TrainStep
from mclfast.plan.chooser import MODES, SHARE, refusal
from mclfast.plan.estimate import Choice, Estimate, estimate
from mclfast.plan.rehearsal import rehearse_bilevel
from mclfast.plan.sizes_of_data import DataFacts, facts
from mclfast.plan.stand_in import stand_in_step


@dataclass(frozen=True)
class Row:
    """One choice.

    Attributes:
        estimate: the memory that the choice needs.
        fits: whether that is within the limit.
        largest_batch: images per step that fit, with the cohort as it is.
        largest_cohort: peers that fit with the last network repeated, the batch as it is; None for
            a method that does not take one peer more.
    """

    estimate: Estimate
    fits: bool
    largest_batch: int
    largest_cohort: int | None


@dataclass(frozen=True)
class Plan:
    """Attributes:
    config: the run; its batches and networks are those of the estimates.
    data: what memory depends on in its data.
    device: type of the device, "cpu" or "cuda".
    memory: bytes of its memory.
    limit: bytes of these to plan with, see :data:`mclfast.plan.chooser.SHARE`.
    rows: one for each choice, in the order asked for.
    left_out: choices that training would refuse, with the reasons.
    """

    config: TrainConfig
    data: DataFacts
    device: str
    memory: int
    limit: int
    rows: Sequence[Row]
    left_out: Sequence[tuple[Choice, str]]


def choices(
    memory: Iterable[str] = MODES,
    offload: Iterable[str] = ("none", "peers"),
    amp: Iterable[str] = ("off", "bf16"),
) -> list[Choice]:
    """All combinations; peers are offloaded in sequential mode alone."""
    offload = list(offload)
    return [
        Choice(m, o, a)
        for a in amp
        for m in memory
        for o in offload
        if o == "none" or m == "sequential"
    ]


def make_plan(
    config: TrainConfig,
    device: str,
    memory: int,
    asked: Sequence[Choice],
    *,
    track: Callable[[Sequence[Choice]], Iterable[Choice]] = iter,
) -> Plan:
    """Rehearses a run under each choice.

    Args:
        config: the run; its memory, offload and amp do not matter.
        device: type of the device that it is for, "cpu" or "cuda"; it need not be here.
        memory: bytes of memory there.
        asked: the choices.
        track: goes through the choices that a run can have and shows how far it got.

    Raises:
        ValueError, OSError, ImportError: a run that cannot be, as training it would raise.
    """
    known = facts(config)
    limit = int(SHARE * memory)
    planner = _Planner(config, known, device, limit)
    # Settings that do not go together, with the reason in the words of the training run.
    refused = {choice: planner.refusal(choice) for choice in asked}
    left_out = [(choice, reason) for choice, reason in refused.items() if reason]
    if len(left_out) == len(asked):
        raise ValueError(left_out[0][1])
    possible = [choice for choice in asked if refused[choice] is None]
    rows = [planner.row(choice) for choice in track(possible)]
    return Plan(config, known, device, memory, limit, rows, left_out)


class _Planner:
    def __init__(self, config: TrainConfig, known: DataFacts, device: str, limit: int) -> None:
        self._config, self._known = config, known
        self._device, self._limit = device, limit
        self._step = stand_in_step(config, known)
        self._larger = self._with_one_more()
        self._bilevel: dict[tuple[TrainStep, bool, str, str], int] = {}

    def _with_one_more(self) -> TrainStep | None:
        cohort = (*self._config.cohort, self._config.cohort[-1])
        try:
            return stand_in_step(dataclasses.replace(self._config, cohort=cohort), self._known)
        except ValueError:
            return None

    def refusal(self, choice: Choice) -> str | None:
        return refusal(self._config, self._step.method, torch.device(self._device), choice)

    def row(self, choice: Choice) -> Row:
        c = self._config
        bilevel = self._bilevel_bytes(self._step, choice)
        here = self._estimate(self._step, choice, c.batch_size, bilevel)
        # Slow to rehearse: taken to grow in proportion, which is never too little.
        twice = self._estimate(self._step, choice, 2 * c.batch_size, 2 * bilevel)
        batch = largest(_lines(c.batch_size, here, 2 * c.batch_size, twice), self._limit)
        unit = c.images_per_class if c.sampler == "balanced" else 1
        cohort = None
        if self._larger is not None:
            count = here.networks
            if choice.memory == "ordinary":
                bilevel = bilevel * (count + 1) // count
            else:
                # One peer's activations, whatever their number: far less than in proportion.
                bilevel = self._bilevel_bytes(self._larger, choice)
            more = self._estimate(self._larger, choice, c.batch_size, bilevel)
            cohort = largest(_lines(count, here, count + 1, more), self._limit)
        fits = here.total <= self._limit
        return Row(here, fits, batch // unit * unit, cohort)

    def _bilevel_bytes(self, step: TrainStep, choice: Choice) -> int:
        """The same for each memory mode but the ordinary one."""
        key = step, choice.memory != "ordinary", choice.amp, choice.offload
        if key not in self._bilevel:
            self._bilevel[key] = rehearse_bilevel(
                step,
                one_at_a_time=key[1],
                amp=key[2],
                batch_size=self._config.batch_size,
                offload=key[3],
            )
        return self._bilevel[key]

    def _estimate(self, step: TrainStep, choice: Choice, batch_size: int, bilevel: int) -> Estimate:
        pinned = getattr(self._config.options, "bank_storage", "device") == "pinned"
        found = estimate(
            step,
            self._known,
            choice,
            batch_size,
            device=self._device,
            bilevel=False,
            graphed=self._config.cuda_graphs,
            pinned=pinned,
        )
        return found.with_bilevel(bilevel)


def _lines(size: int, here: Estimate, other: int, there: Estimate) -> list[Line]:
    """How each kind of step grows from one size to another one."""
    pairs = zip(here.peaks, there.peaks, strict=True)
    return [((size, need), (other, more)) for need, more in pairs]


#: The size that no search goes beyond.
MOST = 10**6

#: Two sizes, and what they need.
Line = tuple[tuple[int, int], tuple[int, int]]


def largest(lines: Sequence[Line], limit: int) -> int:
    """The largest size in 0 to :data:`MOST` at which every need is within a limit.

    Activations, parameters and the state of the optimiser grow in proportion to images and to
    peers. The losses compare each peer with every other one, but keep so little that a line through
    two cohorts is 1 % off at eight times their size.

    Args:
        lines: two points (size, bytes) of each need, which grows along a straight line.
        limit: bytes.
    """
    low, high = 0, MOST
    while low < high:
        middle = (low + high + 1) // 2
        if all(_on(line, middle) <= limit for line in lines):
            low = middle
        else:
            high = middle - 1
    return low


def _on(line: Line, size: int) -> float:
    (x0, y0), (x1, y1) = line
    return y0 + (y1 - y0) * (size - x0) / (x1 - x0)
