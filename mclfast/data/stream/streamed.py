"""Image sets too large for memory: files read, decoded and cropped by worker processes.

Worker processes are started by a server process. They are not forked from this process, which has
threads and perhaps a GPU context. A script that trains on a streamed set therefore needs the usual

    if __name__ == "__main__":
        main()

or ``workers=0``, which decodes in the training process.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mclfast.data.picture import check_side
from mclfast.data.source import Views
from mclfast.data.stream import decode


class Reader(Protocol):
    """Reads image files by number; it is pickled and sent to the worker processes."""

    @property
    def fingerprint(self) -> str:
        """Text that differs if the files are numbered otherwise."""

    def __len__(self) -> int:
        """Number of files N."""

    def read(self, index: int) -> bytes:
        """The content of a file; raises OSError if it cannot be read."""

    def describe(self, index: int) -> str:
        """The place of a file, as an error message names it."""

    def subset(self, index: Tensor) -> Reader:
        """The files with these numbers, int64 [n], in that order."""


class StreamedSet:
    """Labelled images in files: a training image is a random crop, mirrored half of the time.

    There is only one pass at a time: a second call of ``pixels`` ends the first.

    Args:
        reader: reads the content of the files 0 to N - 1.
        labels: int64 [N].
        size: side S in pixels of the images that are made of the files.
        workers: number of processes that read and decode; None for one per core, 0 to decode in
            this process.

    Raises:
        TypeError: labels have another dtype.
        ValueError: there is no file, the number of labels differs from N, or size or workers is
            out of range.
        ImportError: Pillow is not installed.
    """

    def __init__(
        self, reader: Reader, labels: Tensor, *, size: int, workers: int | None = None
    ) -> None:
        decode.require_pillow()
        check_side(size)
        if workers is not None and workers < 0:
            raise ValueError(f"workers: expected at least 0, got {workers}")
        if labels.dtype != torch.int64:
            raise TypeError(f"labels: expected torch.int64, got {labels.dtype}")
        if labels.shape != (len(reader),) or len(reader) == 0:
            raise ValueError(
                f"labels: expected [N] for N={len(reader)} > 0 files, got {list(labels.shape)}"
            )
        self.labels = labels
        self.image_shape = (3, size, size)
        self.workers = core_count() if workers is None else workers
        self.reader = reader
        self._loader = _Loader(_Decoder(reader, size), self.workers)

    @property
    def makes_views(self) -> bool:
        """True: crops and flips are drawn when the files are decoded."""
        return True

    @property
    def fingerprint(self) -> str:
        """Text that differs if the files are numbered otherwise."""
        return self.reader.fingerprint

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.labels)

    def to(self, device: torch.device | str) -> StreamedSet:
        """The same set with its labels on ``device``."""
        # A copy, so that both share the worker processes.
        moved = copy.copy(self)
        moved.labels = self.labels.to(device)
        return moved

    def subset(self, index: Tensor) -> StreamedSet:
        """The images with these numbers, int64 [n], in that order."""
        return StreamedSet(
            self.reader.subset(index.cpu()),
            self.labels[index.to(self.labels.device)],
            size=self.image_shape[1],
            workers=self.workers,
        )

    def pixels(
        self,
        rows: Sequence[Tensor] | Tensor,
        device: torch.device | str,
        *,
        views: Views | None = None,
    ) -> Iterator[Tensor]:
        """Yields uint8 [B, 3, S, S] for each row of numbers, see ``ImageSource.pixels``.

        The pixels do not depend on the number of workers.

        Raises:
            ValueError: a file cannot be read or decoded; the text names it.
        """
        device = torch.device(device)
        jobs = [
            _Job(
                row.cpu().numpy(),
                None if views is None else views.of_row(i),
                decode.SCALE[0] if views is None else views.min_area,
            )
            for i, row in enumerate(rows)
        ]
        for batch in self._loader.run(jobs, pin=device.type == "cuda"):
            if batch.error:
                raise ValueError(batch.error)
            yield batch.pixels.to(device, non_blocking=True)


def core_count() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Job(NamedTuple):
    """One batch to make.

    Attributes:
        numbers: image numbers int64 [B].
        views: seed and step of random views; None for the views of evaluation.
        min_area: smallest share of an image's area that a crop covers.
    """

    numbers: np.ndarray
    views: tuple[int, int] | None
    min_area: float


class _Decoded(NamedTuple):
    """One batch uint8 [B, 3, S, S]; if ``error`` is not empty, the batch is incomplete."""

    pixels: Tensor
    error: str


class _Decoder(Dataset[_Decoded]):
    """Makes the batches, in a worker or in this process."""

    def __init__(self, reader: Reader, size: int) -> None:
        self._reader = reader
        self._size = size

    def __getitem__(self, job: _Job) -> _Decoded:
        pixels = torch.empty(len(job.numbers), 3, self._size, self._size, dtype=torch.uint8)
        for row, index in enumerate(job.numbers.tolist()):
            try:
                pixels[row] = self._view(self._reader.read(index), index, job)
            # Decoders raise many types of errors on damaged files. An error is handed over as text,
            # as an exception from another process has its whole traceback in its message.
            except Exception as problem:
                where = self._reader.describe(index)
                return _Decoded(pixels, f"{where}: expected a readable image, got {problem!r}")
        return _Decoded(pixels, "")

    def _view(self, data: bytes, index: int, job: _Job) -> Tensor:
        if job.views is None:
            return decode.evaluation_view(data, self._size)
        generator = decode.view_generator(*job.views, index)
        return decode.training_view(data, self._size, generator, job.min_area)


class _Jobs:
    """The jobs that the loader iterates over; replaced for every pass, while its workers stay."""

    def __init__(self) -> None:
        self.items: Sequence[_Job] = ()

    def __iter__(self) -> Iterator[_Job]:
        return iter(self.items)


class _Loader:
    """A ``DataLoader`` whose workers are started by the first pass and serve all passes."""

    def __init__(self, decoder: _Decoder, workers: int) -> None:
        self._decoder = decoder
        self._workers = workers
        self._jobs = _Jobs()
        self._loader: DataLoader[_Decoded] | None = None
        self._passes = 0

    def run(self, jobs: Sequence[_Job], *, pin: bool) -> Iterator[_Decoded]:
        """Yields the batches in the order of the jobs, in pinned memory if ``pin`` is set."""
        self._passes += 1
        current = self._passes
        self._jobs.items = jobs
        if self._loader is None or self._loader.pin_memory != pin:
            self._loader = self._start(pin)
        for batch in self._loader:
            yield batch
            if self._passes != current:
                raise RuntimeError(
                    "pixels: expected one pass over a streamed set at a time, got a second one "
                    "before the first had ended"
                )

    def _start(self, pin: bool) -> DataLoader[_Decoded]:
        processes: dict[str, Any] = {}
        if self._workers:
            processes = {
                "num_workers": self._workers,
                "multiprocessing_context": _context(),
                "persistent_workers": True,
                "worker_init_fn": _init_worker,
            }
        return DataLoader(
            self._decoder,
            batch_size=None,
            sampler=self._jobs,
            pin_memory=pin,
            # The loader draws a seed for its workers, which must not come from the run's generator.
            generator=torch.Generator(),
            **processes,
        )


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The server imports this module once for all workers.
    context.set_forkserver_preload([__name__])
    _start_server()
    return context


# Signals that a terminal or a scheduler may send to all processes of a group. The main process
# saves first and then ends the others itself: the loss of one would interrupt it at any place.
_OF_A_GROUP = (signal.SIGINT, signal.SIGTERM) + tuple(
    getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name)
)
# Seconds that a worker lives on after SIGTERM.
_GRACE = 10.0


def _start_server() -> None:
    """Starts the server of the workers, which ends with this process and by no signal of a group.

    Workers end when their parent does, and that is the server. A process inherits what is blocked
    when it is started; here nothing that comes meanwhile is lost.
    """
    from multiprocessing import forkserver, resource_tracker  # some systems have none

    # Started by the server's start otherwise, which would unblock signals.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_A_GROUP)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_main_process() -> None:
    main = multiprocessing.parent_process()
    if main is not None:
        main.join()
        os._exit(1)


def _end_soon(number: int, _: FrameType | None) -> None:
    timer = threading.Timer(_GRACE, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()


def _init_worker(_: int) -> None:
    for number in _OF_A_GROUP:
        signal.signal(number, _end_soon if number == signal.SIGTERM else signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        # Blocked in the server that this process is a copy of.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_A_GROUP)
    # A main process that is killed cannot end them, and the loader watches only the parent, which
    # is the server.
    threading.Thread(target=_end_with_main_process, daemon=True).start()
    # Pillow warns of damaged metadata each time it reads such a file; ImageNet has some.
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
