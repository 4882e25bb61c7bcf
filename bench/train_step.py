"""Time and peak memory of a whole training step of L-MCL: the plain loop and ours, in turn.

Both get the same batch, ready on the device. Augmentation is left out: it is the same work for
both, unless a loop does it on the host.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mclfast.bench import measure
from mclfast.bench.problem import Unavailable
from mclfast.bench.published_forms.train_step import PublishedStep
from mclfast.cohort.outputs import Batch
from mclfast.config import TrainConfig
from mclfast.execution.parts import make_parts
from mclfast.execution.step import TrainStep
from mclfast.methods.lmcl import LayerwiseMCL

Row = dict[str, Any]
Call = Callable[[], object]

PUBLISHED = "published"
#: The plain loop in PyTorch's own layout, as published, and with channels last.
PLAIN: dict[str, dict[str, Any]] = {
    PUBLISHED: {"channels_last": "off"},
    "published_channels_last": {"channels_last": "on"},
}
#: Ours by name, each with the settings that it adds.
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "sequential": {"memory": "sequential"},
    "contiguous": {"channels_last": "off"},
    "channels_last": {"channels_last": "on"},
    "compiled": {"compile_peers": True},
    "stack": {"peers_parallel": "stack"},
}
#: Ordinary steps from one bilevel step to the next in the published settings.
BILEVEL_EVERY = 50


@dataclass(frozen=True)
class StepCase:
    """A cohort, its data and the way it is trained.

    Attributes:
        variant: a name in :data:`PLAIN` or :data:`OURS`.
        network: every peer.
        peers: number of networks M.
        batch: images B, two of each class.
        side: height and width of the images, in pixels.
        classes: number of logits.
        device: "cpu" or "cuda".
        bilevel: the bilevel step in place of the ordinary one.
    """

    variant: str
    network: str = "resnet32"
    peers: int = 2
    batch: int = 128
    side: int = 32
    classes: int = 100
    device: str = "cpu"
    bilevel: bool = False

    @property
    def name(self) -> str:
        """In words, for a table."""
        step = "bilevel step" if self.bilevel else "step"
        return f"{self.variant}, {step}, M = {self.peers} {self.network}, B = {self.batch}"


def make_step(case: StepCase, **settings: Any) -> TrainStep:
    """The training step of a case, with the published settings of CIFAR-100."""
    config = TrainConfig.from_values(
        {
            "method": "lmcl",
            "cohort": [case.network] * case.peers,
            "data": "cifar100",
            "batch_size": case.batch,
            "images_per_class": 2,
            "lr": 0.1,
            "weight_decay": 5e-4,
            "bilevel_every": BILEVEL_EVERY,
            "device": case.device,
            "augment": False,
        }
        | (PLAIN | OURS)[case.variant]
        | settings
    )
    return step_of(config, classes=case.classes, side=case.side)


def step_of(config: TrainConfig, *, classes: int, side: int) -> TrainStep:
    """The training step of a config for two colour images of each class; no image is made.

    Args:
        config: settings of the step.
        classes: number of classes.
        side: height and width of the images, in pixels.
    """
    torch.manual_seed(config.seed)
    cohort, method = make_parts(config, classes, in_channels=3)
    labels = torch.arange(2 * classes) % classes
    return TrainStep(cohort, method, config, labels=labels, image_shape=(3, side, side))


def make_batch(case: StepCase) -> tuple[Tensor, Batch]:
    """Normal noise float32 [B, 3, side, side] and its labels, two images of each class."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch, 3, case.side, case.side, generator=generator)
    labels = torch.arange(case.batch) // 2 % case.classes
    index = torch.arange(case.batch) % (2 * case.classes)
    d = case.device
    return images.to(d), Batch(labels.to(d), index.to(d), step=0, epoch=0)


class Steps:
    """Networks and optimisers of a case, and its steps on one batch; all are built at first use."""

    def __init__(self, case: StepCase) -> None:
        self.case = case

    @functools.cached_property
    def _steps(self) -> tuple[Call, Call]:
        images, batch = make_batch(self.case)
        step = make_step(self.case)
        step.cohort.train()
        step.method.train()
        if self.case.variant not in PLAIN:
            return lambda: step(images, batch), lambda: step.bilevel(images, batch)
        assert isinstance(step.method, LayerwiseMCL)
        plain = PublishedStep(step.cohort, step.method, step.config)
        return lambda: plain(images, batch.labels), lambda: plain.bilevel(images, batch.labels)

    def __call__(self) -> object:
        """The step that the case is about."""
        return self._steps[self.case.bilevel]()

    def whole(self) -> None:
        """A whole step of training: an ordinary step, and the bilevel step if the case has one."""
        for step in self._steps[: self.case.bilevel + 1]:
            step()


def tiny(case: StepCase) -> StepCase:
    """The same kind of step as small as can be, which loads libraries and starts threads."""
    return dataclasses.replace(case, network="resnet8", peers=2, batch=4, side=8, classes=2)


def peak(case: StepCase, timeout: float = 900) -> int:
    """Bytes that training needs at most, in a process of its own: networks, gradients, optimiser,
    activations and loss. Measured on the process on a CPU, by torch's allocator on a GPU.

    Raises:
        Unavailable: the process failed, or this system does not tell.
    """
    return measure.child_peak({"train_step": dataclasses.asdict(case)}, timeout)


def run_cases(
    cases: Sequence[StepCase], *, budget: float, rounds: tuple[int, int], memory: bool = True
) -> list[Row]:
    """Times cases in turn.

    Args:
        cases: cases that differ in the variant alone.
        budget: seconds of timing, after the least rounds.
        rounds: least and most rounds.
        memory: measure peak memory as well, first.

    Returns:
        One row per case, with times in ms, images/s, peak in MiB, and the ratios published / own.
    """
    peaks: dict[str, float | str] = {}
    for case in cases if memory else ():
        try:
            peaks[case.name] = peak(case) / measure.MIB
        except Unavailable as reason:
            peaks[case.name] = str(reason)
    calls: dict[str, Call] = {case.name: Steps(case) for case in cases}
    for call in calls.values():
        call()
    timings = measure.interleaved(
        calls, device=cases[0].device, budget=budget, min_rounds=rounds[0], max_rounds=rounds[1]
    )
    rows = []
    for case in cases:
        timing = timings[case.name]
        row: Row = dataclasses.asdict(case)
        row |= {key: timing.quantile(q) for key, q in (("p20", 0.2), ("p50", 0.5), ("p80", 0.8))}
        row["samples"] = len(timing.samples)
        if not case.bilevel:
            row["images_per_s"] = 1e3 * case.batch / row["p50"]
        found = peaks.get(case.name)
        row["peak_mib" if isinstance(found, float) else "peak_error"] = found
        plain = dataclasses.replace(case, variant=PUBLISHED).name
        if plain in timings:
            row["ratio_published"] = timing.ratio(timings[plain])
        rows.append(row)
    return rows


def with_bilevel(rows: Sequence[Row], every: int = BILEVEL_EVERY) -> list[Row]:
    """Images/s with a bilevel step at every 50th: computed from the two measured step times.

    Args:
        rows: results of :func:`run_cases`.
        every: steps from one bilevel step to the next.

    Returns:
        One row per case that has both times, with the seconds of ``every`` steps of which one has
        a bilevel step, what the bilevel steps add (%), and the ratio published / own.
    """
    times = {(_group(row), row["bilevel"]): row["p50"] for row in rows}
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = _group(row)
        if row["bilevel"] and (key, False) in times:
            plain, extra = times[key, False], times[key, True]
            total = every * plain + extra
            found[key] = {
                **{name: row[name] for name in _GROUP},
                "every": every,
                "seconds": total / 1e3,
                "images_per_s": 1e3 * every * row["batch"] / total,
                "added_percent": 100 * extra / (every * plain),
                "ordinary_steps": extra / plain,
            }
    for key, row in found.items():
        theirs = found.get((PUBLISHED, *key[1:]))
        if theirs is not None:
            row["ratio_published"] = theirs["seconds"] / row["seconds"]
    return list(found.values())


_GROUP = ("variant", "network", "peers", "batch", "side", "device")


def _group(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _GROUP)


def table(rows: Sequence[Row]) -> str:
    """Times, images/s, peaks and ratios, aligned."""
    lines = [("step", "M", "B", "ms", "20-80 %", "images/s", "peak MiB", "x published")]
    for row in rows:
        lines.append(
            (
                row["variant"] + (" bilevel" if row["bilevel"] else ""),
                str(row["peers"]),
                str(row["batch"]),
                f"{row['p50']:.0f}",
                f"{row['p20']:.0f}-{row['p80']:.0f}",
                f"{row['images_per_s']:.1f}" if "images_per_s" in row else "-",
                f"{row['peak_mib']:.0f}" if row.get("peak_mib") else "-",
                f"{row['ratio_published']:.2f}" if "ratio_published" in row else "-",
            )
        )
    return _aligned(lines)


def bilevel_table(rows: Sequence[Row]) -> str:
    """Rows of :func:`with_bilevel`, aligned."""
    lines = [("with a bilevel step at every 50th", "M", "images/s", "added %", "x published")]
    for row in rows:
        ratio = f"{row['ratio_published']:.2f}" if "ratio_published" in row else "-"
        found = f"{row['images_per_s']:.1f}", f"{row['added_percent']:.1f}", ratio
        lines.append((row["variant"], str(row["peers"]), *found))
    return _aligned(lines)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
