"""Which implementations of the fused ops exist here, and why the others do not.

A backend is available once its requirements are met and it implements every op in ``_OPS``. To
add one, list its ops there.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

# Before mclfast._C, which finds the libraries of torch only when they are loaded.
import torch

from mclfast._checks import unknown_name

_REBUILD = "reinstall with: MCLFAST_BUILD_EXT=1 pip install --no-build-isolation ."

# Names in torch.ops.mclfast that a backend implements; empty while it has none.
_OPS: dict[str, tuple[str, ...]] = {
    "cuda": (),
    "triton": (),
    "cpu": (),
}


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
    return BackendStatus(extension() is not None, extension_reason())


def _probe_cuda() -> BackendStatus:
    info = build_info()
    if info is None:
        return BackendStatus(False, extension_reason())
    if not info["with_cuda"]:
        return BackendStatus(False, "the extension was compiled without CUDA")
    if not torch.cuda.is_available():
        return BackendStatus(False, "no CUDA device")
    return BackendStatus(True, "extension loaded with CUDA")


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


# Best first: "auto" takes the first that is available.
_PROBES: dict[str, Callable[[], BackendStatus]] = {
    "cuda": _probe_cuda,
    "triton": _probe_triton,
    "cpu": _probe_cpu,
    "reference": lambda: BackendStatus(True, "plain PyTorch"),
}


@functools.cache
def _status(name: str) -> BackendStatus:
    status = _PROBES[name]()
    if name == "reference":
        return status
    ops = _OPS[name]
    if not ops:
        return BackendStatus(False, f"{status.reason}; it implements no loss yet")
    missing = [op for op in ops if not hasattr(torch.ops.mclfast, op)]
    if status.available and missing:
        return BackendStatus(False, f"{status.reason}; lacks {', '.join(missing)}; {_REBUILD}")
    return status


def backend_report() -> dict[str, BackendStatus]:
    """The status of every backend, best first."""
    return {name: _status(name) for name in _PROBES}


def check_name(backend: str) -> None:
    """Raises ValueError for a name that is neither "auto" nor a backend."""
    if backend != "auto" and backend not in _PROBES:
        raise unknown_name("backend", backend, ["auto", *_PROBES])


def resolve(backend: str) -> str:
    """Turns the argument ``backend`` of a loss into the name of an available backend.

    Args:
        backend: "auto" (the best that is available) or the name of one.

    Returns:
        The name of an available backend.

    Raises:
        ValueError: there is no such backend.
        BackendUnavailableError: it is not available here; the text says why and what to do.
    """
    if backend == "auto":
        # A backend without ops is not even probed: probing may import triton.
        for name, ops in _OPS.items():
            if ops and _status(name).available:
                return name
        return "reference"
    if backend == "reference":
        return backend
    check_name(backend)
    status = _status(backend)
    if not status.available:
        raise BackendUnavailableError(
            f"backend {backend!r} is not available: {status.reason}. "
            "Pass backend='auto' or 'reference'; `mclfast env` lists all backends"
        )
    return backend
