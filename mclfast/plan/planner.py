"""What every choice of memory settings needs for a run, and the largest run that fits in each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mclfast.config import TrainConfig
from mclfast.plan.choose import MODES
from mclfast.plan.estimate import Choice, Estimate, estimate
from mclfast.plan.search import Line, largest
from mclfast.plan.stand_in import DataFacts, facts, stand_in_trainer

if TYPE_CHECKING:
    from mclfast.train import Trainer


@dataclass(frozen=True)
class Row:
    """One choice.

    Attributes:
        estimate: what it needs.
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
    limit: bytes of its memory.
    rows: one for each choice, in the order asked for.
    left_out: choices that cannot be, with the reasons.
    """

    config: TrainConfig
    data: DataFacts
    device: str
    limit: int
    rows: Sequence[Row]
    left_out: Sequence[tuple[Choice, str]]


def choices(
    memory: Iterable[str] = MODES, offload: Iterable[str] = ("none", "peers"),
    amp: Iterable[str] = ("off", "bf16"),
) -> list[Choice]:
    """All combinations; peers are offloaded in sequential mode alone."""
    offload = list(offload)
    return [
        Choice(m, o, a) for a in amp for m in memory for o in offload
        if o == "none" or m == "sequential"
    ]  # fmt: skip


def make_plan(config: TrainConfig, device: str, limit: int, asked: Sequence[Choice]) -> Plan:
    """Rehearses a run under each choice.

    Args:
        config: the run; its memory, offload and amp do not matter.
        device: type of the device that it is for, "cpu" or "cuda"; it need not be here.
        limit: bytes of memory there.
        asked: the choices.

    Raises:
        ValueError, OSError, ImportError: a run that cannot be, as training it would raise.
    """
    known = facts(config)
    planner = _Planner(config, known, device, limit)
    rows, left_out = [], []
    for choice in asked:
        try:
            # Settings that do not go together, with the reason in the words of the config.
            dataclasses.replace(config, **choice._asdict())
        except ValueError as error:
            left_out.append((choice, str(error)))
            continue
        rows.append(planner.row(choice))
    return Plan(config, known, device, limit, rows, left_out)


class _Planner:
    def __init__(self, config: TrainConfig, known: DataFacts, device: str, limit: int) -> None:
        self._config, self._known = config, known
        self._device, self._limit = device, limit
        self._trainer = stand_in_trainer(config, known)
        self._larger = self._with_one_more()

    def _with_one_more(self) -> Trainer | None:
        cohort = (*self._config.cohort, self._config.cohort[-1])
        try:
            return stand_in_trainer(dataclasses.replace(self._config, cohort=cohort), self._known)
        except ValueError:
            return None

    def row(self, choice: Choice) -> Row:
        c = self._config
        here = self._estimate(self._trainer, choice, c.batch_size)
        twice = self._estimate(self._trainer, choice, 2 * c.batch_size, bilevel=False)
        step = c.images_per_class if c.sampler == "balanced" else 1
        batch = largest(_lines(c.batch_size, here, 2 * c.batch_size, twice), self._limit)
        cohort = None
        if self._larger is not None:
            more = self._estimate(self._larger, choice, c.batch_size, bilevel=False)
            cohort = largest(_lines(here.networks, here, more.networks, more), self._limit)
        fits = here.total <= self._limit
        return Row(here, fits, batch // step * step, cohort)

    def _estimate(
        self, trainer: Trainer, choice: Choice, batch_size: int, *, bilevel: bool = True
    ) -> Estimate:
        pinned = getattr(self._config.options, "bank_storage", "device") == "pinned"
        return estimate(
            trainer, self._known, choice, batch_size, device=self._device, bilevel=bilevel,
            pinned=pinned,
        )  # fmt: skip


def _lines(size: int, here: Estimate, other: int, there: Estimate) -> list[Line]:
    """How each kind of step grows from one size to another one."""
    # A bilevel step is slow to rehearse: taken to grow in proportion, which is never too little.
    bilevel = here.bilevel * other // size
    return [
        ((size, here.step), (other, there.step)),
        ((size, here.evaluation), (other, there.evaluation)),
        ((size, here.bilevel), (other, bilevel)),
    ]
