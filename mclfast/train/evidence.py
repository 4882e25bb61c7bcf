"""The bad step of a run, kept in its folder for ``mclfast replay``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mclfast.cohort.outputs import Batch
from mclfast.execution.non_finite import Finding, NonFiniteError
from mclfast.train import checkpoint

#: Written at the first step of a run whose numbers are not finite.
EVIDENCE = "non_finite.pt"


@dataclass(frozen=True)
class Evidence:
    """A step that made numbers that are not finite.

    Attributes:
        finding: which step, and what was found in it.
        images: images of the step, or views of them, in host memory.
        batch: the step's batch, in host memory.
        state: state of the run before the step; None where the step had changed it already.
    """

    finding: Finding
    images: Tensor | list[Tensor]
    batch: Batch
    state: dict[str, Any] | None


def write(
    folder: Path, error: NonFiniteError, images: Tensor | list[Tensor], state: dict[str, Any] | None
) -> None:
    """Keeps the step of an error in the folder of its run.

    Args:
        folder: the run folder.
        error: the error, with the step's batch.
        images: images of the step, or views of them.
        state: state of the run before the step, None if it is gone.
    """
    views = [images] if isinstance(images, Tensor) else images
    content = {
        "finding": asdict(error.finding),
        "views": [view.detach().cpu() for view in views],
        "single": isinstance(images, Tensor),
        "labels": error.batch.labels.cpu(),
        "index": error.batch.index.cpu(),
        "state": state,
    }
    checkpoint.save(folder / EVIDENCE, content)


def read(folder: Path) -> Evidence:
    """Reads what :func:`write` has kept.

    Raises:
        FileNotFoundError: nothing is kept in the folder; the text begins with ``path``.
        ValueError: the file is damaged.
    """
    path = folder / EVIDENCE
    if not path.is_file():
        raise FileNotFoundError(
            f"path: expected the folder of a run with {EVIDENCE}, which is written at a step "
            f"whose numbers are not finite, found none in {folder}"
        )
    content = checkpoint.load(path)
    try:
        finding = Finding(**content["finding"])
        batch = Batch(content["labels"], content["index"], finding.step, finding.epoch)
        views = content["views"]
        images = views[0] if content["single"] else views
        return Evidence(finding, images, batch, content["state"])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"path: expected an intact file {path}, got: {error!r}") from None
