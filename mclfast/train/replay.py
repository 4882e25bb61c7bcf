"""The bad step of a run once more, with a look at every module: ``mclfast replay``."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mclfast.cohort.outputs import Batch
from mclfast.config import TrainConfig
from mclfast.execution import layout
from mclfast.execution.non_finite import Finding, NonFiniteError, Watch
from mclfast.execution.step import TrainStep
from mclfast.train import checkpoint, evidence
from mclfast.train import folder as run_folder
from mclfast.train.builder import build
from mclfast.train.evidence import Evidence
from mclfast.train.trainer import Trainer
from mclfast.train.transfer import build_transfer, split_origin, transfer_config


@dataclass(frozen=True)
class Replayed:
    """What came out of a step that was made again.

    Attributes:
        kept: the step as the run has kept it.
        begun: step from which the steps before it were made again; the step itself if its state
            was kept.
        same_images: whether the data still give the images that were kept; these are used.
        again: what was found this time; None if all numbers were finite.
        module: first module whose output was not finite, and whether its input was; None if the
            outputs of all were.
        operation: first operation whose gradient was NaN, where outputs and terms were finite.
    """

    kept: Evidence
    begun: int
    same_images: bool
    again: Finding | None
    module: str | None
    operation: str | None


class _Reached(Exception):
    """The step is about to be made."""

    def __init__(self, images: Tensor | list[Tensor], batch: Batch) -> None:
        self.images, self.batch = images, batch


def replay(folder: Path, *, device: str | None = None, progress: bool = True) -> Replayed:
    """Makes the step again that a run has kept, from the same state, and says what was in it.

    The run's folder stays as it is.

    Args:
        folder: the run folder.
        device: device in place of the run's.
        progress: show a progress bar of the steps before it, if they have to be made again.

    Raises:
        FileNotFoundError: the run has kept no step; the text begins with ``path``.
        ValueError: a file is damaged, or the step is not reached any more.
    """
    kept = evidence.read(folder)
    trainer = _trainer(folder, device)
    state = kept.state or _checkpoint_before(folder, kept.finding.step)
    if state is not None:
        trainer.load_state(state)
    begun = trainer.step
    reached = _run_up_to(trainer, kept.finding.step, progress)
    images = _on(trainer.device, kept.images)
    same = _equal(images, reached.images)
    batch = dataclasses.replace(
        reached.batch,
        labels=kept.batch.labels.to(trainer.device),
        index=kept.batch.index.to(trainer.device),
    )
    again, module, operation = _examined(trainer.train_step, images, batch, kept.finding)
    return Replayed(kept, begun, same, again, module, operation)


def _trainer(folder: Path, device: str | None) -> Trainer:
    """The trainer of a run, which writes nothing and runs each module by itself."""
    values = run_folder.read_settings(folder, "path")
    origin = split_origin(values)
    changes: dict[str, Any] = {
        "compile_peers": False,
        "cuda_graphs": False,
        "peers_parallel": "off",
    }
    if values.get("non_finite") == "rollback":
        # Its steps to leave out are part of its state.
        changes["non_finite"] = "raise"
    if device is not None:
        changes["device"] = device
    if origin is None:
        return build(TrainConfig.from_values(values | changes))
    return build_transfer(*origin, transfer_config(*origin, values | changes))


def _checkpoint_before(folder: Path, step: int) -> dict[str, Any] | None:
    """The checkpoint of a run, unless it has gone past a step since; then the run starts anew."""
    path = folder / run_folder.CHECKPOINT
    state = checkpoint.load(path) if path.is_file() else None
    return state if state is not None and state["step"] <= step else None


def _run_up_to(trainer: Trainer, step: int, progress: bool) -> _Reached:
    """Trains until a step is about to be made."""
    compute = trainer.train_step.compute

    def stopping(images: Tensor | list[Tensor], batch: Batch) -> Any:
        if batch.step == step:
            raise _Reached(images, batch)
        return compute(images, batch)

    trainer.train_step.compute = stopping
    try:
        trainer.fit(progress=progress and trainer.step < step)
    except _Reached as reached:
        return reached
    finally:
        trainer.train_step.compute = compute
    raise ValueError(f"path: expected a run that comes to step {step}, got one that leaves it out")


def _examined(
    step: TrainStep, images: Tensor | list[Tensor], batch: Batch, kept: Finding
) -> tuple[Finding | None, str | None, str | None]:
    """Makes the step, and the bilevel step if that was the bad one."""
    step.config = dataclasses.replace(step.config, non_finite="raise")
    step.watch = Watch(at_once=True)
    with layout.plain_calls(step.cohort), _first_bad_output(step) as found:
        try:
            step(images, batch)
            if kept.term == "bilevel":
                step.bilevel(images, batch)
        except NonFiniteError as error:
            finding = error.finding
        else:
            return None, None, None
        operation = None
        if not found and finding.term is None:
            # Nothing of the step remains, so it can be made once more.
            operation = _first_bad_gradient(step, images, batch)
    return finding, found[0] if found else None, operation


@contextmanager
def _first_bad_output(step: TrainStep) -> Iterator[list[str]]:
    """Fills a list with the first module of which an output is not finite."""
    found: list[str] = []
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not _finite(output):
                entered = "finite" if _finite(inputs) else "not finite"
                found.append(f"{name} ({type(module).__name__}), whose input is {entered}")

        handles.append(module.register_forward_hook(look))

    for owner, root in (("cohort", step.cohort), ("method", step.method)):
        for name, module in root.named_modules():
            watch(f"{owner} {name}".rstrip(), module)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        value = list(value.values())
    return all(map(_finite, value)) if isinstance(value, (list, tuple)) else True


def _first_bad_gradient(step: TrainStep, images: Tensor | list[Tensor], batch: Batch) -> str | None:
    """The operation whose backward is the first to give NaN, and the line that called it."""
    with warnings.catch_warnings(record=True) as caught, suppress(NonFiniteError):
        warnings.simplefilter("always")
        try:
            with torch.autograd.set_detect_anomaly(True):
                step(images, batch)
        except RuntimeError as error:
            # The warning has the traceback of the call, whose last line is the innermost.
            lines = [line.strip() for w in caught for line in str(w.message).split("\n")]
            places = [line for line in lines if line.startswith('File "')]
            return ", called in ".join([str(error).split("\n", 1)[0].rstrip("."), *places[-1:]])
    return None


def _on(device: torch.device, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    if isinstance(images, Tensor):
        return images.to(device)
    return [view.to(device) for view in images]


def _equal(a: Tensor | list[Tensor], b: Tensor | list[Tensor]) -> bool:
    left, right = ([x] if isinstance(x, Tensor) else x for x in (a, b))
    return len(left) == len(right) and all(
        x.shape == y.shape and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)
        for x, y in zip(left, right, strict=True)
    )
