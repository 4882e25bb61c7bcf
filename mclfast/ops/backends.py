"""Which implementations of the losses exist here, and why the others do not."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

# Before mclfast._C, which finds the libraries of torch only when they are loaded.
import torch

from mclfast._base.checks import unknown_name

_REBUILD = "reinstall with: MCLFAST_BUILD_EXT=1 pip install --no-build-isolation ."


class BackendUnavailableError(RuntimeError):
    """A backend that exists, but not on this machine; the text says why and what to do."""


class BackendStatus(NamedTuple):
    """Whether a backend can be used and the reason, in words."""

    available: bool
    reason: str


@functools.cache
def _load_extension() -> tuple[ModuleType | None, str]:
    """The extension, and what it is or why it is missing."""
    try:
        module = importlib.import_module("mclfast._C")
    except (ImportError, OSError) as error:
        return None, f"mclfast._C cannot be imported ({error}); {_REBUILD}"
    info = module.build_info()
    # The C++ interface of torch changes between minor versions.
    if info["torch"].split(".")[:2] != torch.__version__.split(".")[:2]:
        return None, (
            f"mclfast._C was compiled for torch {info['torch']}, this is torch "
            f"{torch.__version__}; {_REBUILD}"
        )
    return module, f"extension loaded ({info['compiler']}, {info['parallel']})"


def extension() -> ModuleType | None:
    """The C++ extension ``mclfast._C``, or None; ``extension_reason`` says why."""
    return _load_extension()[0]


def extension_reason() -> str:
    """What the extension is, or why there is none."""
    return _load_extension()[1]


def build_info() -> dict[str, Any] | None:
    """What the extension was compiled with, or None without an extension."""
    module = extension()
    return None if module is None else dict(module.build_info())


def _probe_cpu() -> BackendStatus:
    if extension() is None:
        return BackendStatus(False, extension_reason())
    if not hasattr(torch.ops.mclfast_cpu, "dual_batch_norm"):
        return BackendStatus(False, f"the extension is older than this package; {_REBUILD}")
    return BackendStatus(True, extension_reason())


def _probe_triton() -> BackendStatus:
    try:
        version = importlib.import_module("triton").__version__
    except (ImportError, RuntimeError, OSError) as error:
        return BackendStatus(
            False, f"triton cannot be imported ({error}); try: pip install 'mclfast[triton]'"
        )
    if torch.cuda.is_available():
        return BackendStatus(True, f"triton {version} on {torch.cuda.get_device_name()}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return BackendStatus(True, f"triton {version}, interpreted (TRITON_INTERPRET=1)")
    return BackendStatus(False, f"triton {version}, but no GPU and TRITON_INTERPRET is not 1")


def _probe_cuda() -> BackendStatus:
    module = extension()
    if module is None:
        return BackendStatus(False, extension_reason())
    if not module.build_info()["with_cuda"]:
        return BackendStatus(False, f"the extension was compiled without CUDA; {_REBUILD}")
    if not torch.cuda.is_available():
        return BackendStatus(False, "the extension has CUDA kernels, but there is no GPU")
    return BackendStatus(True, f"CUDA kernels on {torch.cuda.get_device_name()}")


_PROBES: dict[str, Callable[[], BackendStatus]] = {
    "triton": _probe_triton,
    "cuda": _probe_cuda,
    "cpu": _probe_cpu,
    "reference": lambda: BackendStatus(True, "plain PyTorch, any device"),
}

# What "auto" takes for tensors on a device, where it is available. The Triton kernels are those of
# the in-batch losses, the CUDA kernels those of the memory-bank losses.
_BEST = {"cpu": "cpu", "cuda": "triton"}
_BEST_FOR_BANKS = {"cuda": "cuda"}
_WITHOUT_FLOAT64 = ("triton", "cuda")


@functools.cache
def _status(name: str) -> BackendStatus:
    return _PROBES[name]()


def backend_report() -> dict[str, BackendStatus]:
    """The status of every backend."""
    return {name: _status(name) for name in _PROBES}


def check_name(backend: str) -> None:
    """Raises ValueError for a name that is neither "auto" nor a backend."""
    if backend != "auto" and backend not in _PROBES:
        raise unknown_name("backend", backend, ["auto", *_PROBES])


_chosen: ContextVar[str] = ContextVar("backend", default="auto")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within it, losses called with ``backend="auto"`` take a backend by name.

    A call that names a backend keeps its own. What the backend cannot do raises as if the call had
    named it. Functions compiled by ``torch.compile`` keep the backend they were traced with.

    Args:
        name: "auto" or a name that ``mclfast env`` lists.

    Raises:
        ValueError: there is no such backend.

    Examples:
        >>> import torch
        >>> import mclfast
        >>> embeddings, labels = mclfast.unit_norm(torch.randn(8, 16)), torch.arange(8) % 4
        >>> with mclfast.use_backend("reference"):
        ...     plain = mclfast.supcon_loss(embeddings, labels)
        >>> torch.allclose(plain, mclfast.supcon_loss(embeddings, labels))
        True
    """
    check_name(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen() -> str:
    """The name given to :func:`use_backend`, "auto" outside of it."""
    return _chosen.get()


def available(name: str) -> bool:
    """Whether a backend can be used here, and :func:`use_backend` has chosen no other one."""
    return chosen() in ("auto", name) and _status(name).available


def resolve(backend: str, device: str, *, banks: bool = False) -> str:
    """Turns the argument ``backend`` of a loss into the name of a backend for a device.

    Args:
        backend: "auto" (the choice of :func:`use_backend`, else the best for the device) or a name.
        device: device type of the embeddings, "cpu" or "cuda".
        banks: for a memory-bank loss.

    Returns:
        The name of an available backend; "auto" falls back to "reference".

    Raises:
        ValueError: there is no such backend, or it does not take tensors of this device, or has
            no such losses.
        BackendUnavailableError: it is not available here; the text says why and what to do.
    """
    if backend == "auto":
        backend = chosen()
    if backend == "auto":
        names = _BEST | _BEST_FOR_BANKS if banks else _BEST
        best = names.get(device, "reference")
        return best if _status(best).available else "reference"
    check_name(backend)
    without = "triton" if banks else "cuda"
    if backend == without:
        kind, on_gpu = ("memory-bank", "cuda") if banks else ("in-batch", "triton")
        raise ValueError(
            f"backend: expected one with {kind} losses (auto, cpu, {on_gpu} or reference), "
            f"got {backend!r}"
        )
    status = _status(backend)
    if not status.available:
        raise BackendUnavailableError(
            f"backend {backend!r} is not available: {status.reason}. "
            "Pass backend='auto' or 'reference'; `mclfast env` lists all backends"
        )
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    takes = {"triton": "cpu" if interpreted else "cuda", "cuda": "cuda", "cpu": "cpu"}.get(backend)
    if takes and device != takes:
        raise ValueError(
            f"backend: expected one for {device} tensors, got {backend!r}, which takes {takes}"
        )
    return backend


# torch.compile takes the answer as a constant instead of tracing the probes. The public decorator
# does just this, but loads the whole compiler.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]
chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve_for(backend: str, *tensors: torch.Tensor, banks: bool = False) -> str:
    """:func:`resolve` for the device of the first tensor; "auto" takes no backend without float64
    where one of the tensors has it.
    """
    found = resolve(backend, tensors[0].device.type, banks=banks)
    backend = backend if backend != "auto" else chosen()
    has_float64 = any(tensor.dtype == torch.float64 for tensor in tensors)
    return "reference" if backend == "auto" and found in _WITHOUT_FLOAT64 and has_float64 else found
