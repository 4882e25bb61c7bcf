"""Backends of the losses: the ones available here, why others are not, and which one to use."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

# Imported before mclfast._C, which finds the libraries of torch only when they are loaded.
import torch

from mclfast._base.checks import unknown_name

_REBUILD = "reinstall with: MCLFAST_BUILD_EXT=1 pip install --no-build-isolation ."


class BackendUnavailableError(RuntimeError):
    """Raised for a backend that is not available on this machine; the text says what to do."""


class BackendStatus(NamedTuple):
    """Whether a backend can be used here, and the reason in words."""

    available: bool
    reason: str


@functools.cache
def _load_extension() -> tuple[ModuleType | None, str]:
    """The extension or None, with a description of it or the reason why it is missing."""
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
    """The C++ extension ``mclfast._C``; None if it is missing, see :func:`extension_reason`."""
    return _load_extension()[0]


def extension_reason() -> str:
    """Description of the extension, or the reason why there is none."""
    return _load_extension()[1]


def build_info() -> dict[str, Any] | None:
    """Compiler, versions and options that the extension was built with; None without one."""
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


#: For every backend, the function that finds out whether it can be used here.
PROBES: dict[str, Callable[[], BackendStatus]] = {
    "triton": _probe_triton,
    "cuda": _probe_cuda,
    "cpu": _probe_cpu,
    "reference": lambda: BackendStatus(True, "plain PyTorch, any device"),
}

# The backend that "auto" takes for tensors on a device, if it is available. Triton kernels exist
# for the in-batch losses, CUDA kernels for the memory-bank losses.
_BEST = {"cpu": "cpu", "cuda": "triton"}
_BEST_FOR_BANKS = {"cuda": "cuda"}
_WITHOUT_FLOAT64 = ("triton", "cuda")


@functools.cache
def status_of(name: str) -> BackendStatus:
    """The status of a backend, found once and then remembered."""
    return PROBES[name]()


def probe_again() -> None:
    """Forgets the status of all backends, for example after an installation at run time."""
    _load_extension.cache_clear()
    status_of.cache_clear()


def backend_report() -> dict[str, BackendStatus]:
    """The status of every backend."""
    return {name: status_of(name) for name in PROBES}


def check_name(backend: str) -> None:
    """Raises ValueError for a name that is neither "auto" nor a backend."""
    if backend != "auto" and backend not in PROBES:
        raise unknown_name("backend", backend, ["auto", *PROBES])


_chosen: ContextVar[str] = ContextVar("backend", default="auto")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes losses that are called with ``backend="auto"`` in the block take a backend by name.

    A call that names a backend keeps its own. A loss that the chosen backend cannot compute raises,
    as if the call had named the backend. Functions compiled by ``torch.compile`` keep the backend
    that they were traced with; other threads keep their own choice.

    Args:
        name: "auto" or a name that ``mclfast env`` lists.

    Raises:
        ValueError: the name is unknown.
        BackendUnavailableError: the backend is not available here.

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
    if name != "auto" and not status_of(name).available:
        raise _unavailable(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def _unavailable(name: str) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"backend {name!r} is not available: {status_of(name).reason}. "
        "Pass backend='auto' or 'reference'; `mclfast env` lists all backends"
    )


def chosen() -> str:
    """The name that :func:`use_backend` was called with; "auto" outside of its block."""
    return _chosen.get()


def available(name: str) -> bool:
    """Whether a backend can be used here, and :func:`use_backend` has chosen no other one."""
    return chosen() in ("auto", name) and status_of(name).available


def resolve(backend: str, device: str, *, banks: bool = False) -> str:
    """Turns the argument ``backend`` of a loss into the name of a backend for a device.

    Args:
        backend: "auto" for the choice of :func:`use_backend` or else the best on the device, or the
            name of a backend.
        device: device type of the embeddings, "cpu" or "cuda".
        banks: whether the loss is a memory-bank loss, not an in-batch one.

    Returns:
        The name of an available backend; "auto" falls back to "reference".

    Raises:
        ValueError: the name is unknown, or the backend does not take tensors of this device or has
            no losses of this kind.
        BackendUnavailableError: the backend is not available here; the text says why and what to
            do.
    """
    if backend == "auto":
        backend = chosen()
    if backend == "auto":
        names = _BEST | _BEST_FOR_BANKS if banks else _BEST
        best = names.get(device, "reference")
        return best if status_of(best).available else "reference"
    check_name(backend)
    without = "triton" if banks else "cuda"
    if backend == without:
        kind, on_gpu = ("memory-bank", "cuda") if banks else ("in-batch", "triton")
        raise ValueError(
            f"backend: expected one with {kind} losses (auto, cpu, {on_gpu} or reference), "
            f"got {backend!r}"
        )
    if not status_of(backend).available:
        raise _unavailable(backend)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    takes = {"triton": "cpu" if interpreted else "cuda", "cuda": "cuda", "cpu": "cpu"}.get(backend)
    if takes and device != takes:
        raise ValueError(
            f"backend: expected one for {device} tensors, got {backend!r}, which takes {takes}"
        )
    return backend


# With this mark torch.compile takes the answer as a constant instead of tracing the probes. The
# public decorator does no more than this, but loads the whole compiler.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]
chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve_for(backend: str, *tensors: torch.Tensor, banks: bool = False) -> str:
    """:func:`resolve` for the device of the first tensor.

    For "auto", a float64 tensor rules out the backends that do not take float64.
    """
    found = resolve(backend, tensors[0].device.type, banks=banks)
    backend = backend if backend != "auto" else chosen()
    has_float64 = any(tensor.dtype == torch.float64 for tensor in tensors)
    return "reference" if backend == "auto" and found in _WITHOUT_FLOAT64 and has_float64 else found
