"""The report of ``mclfast env`` for bug reports: versions, system, extension and backends."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import torch

from mclfast._version import __version__
from mclfast.ops import backends

# Versions are read from metadata, as importing is slow and some packages may be broken.
_OPTIONAL = (
    "triton",
    "torchvision",
    "timm",
    "scikit-learn",
    "matplotlib",
    "pillow",
    "safetensors",
    "kornia",
    "datasets",
    "tensorboard",
    "wandb",
    "pytest-benchmark",
)


def _git(path: Path, *arguments: str) -> str:
    result = subprocess.run(
        # No locks, so that a report does not get in the way of a git command of the user.
        ["git", "--no-optional-locks", "-C", str(path), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    return result.stdout.strip()


def git_hash(path: str | os.PathLike[str]) -> str | None:
    """The commit of the git checkout that holds a folder; never raises.

    Args:
        path: a folder, or a file in it.

    Returns:
        Twelve digits, followed by "-dirty" if tracked files are changed; None if there is no
        checkout or no git.
    """
    try:
        folder = Path(path)
        folder = folder if folder.is_dir() else folder.parent
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, ValueError, TypeError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changed else commit


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def root() -> Path:
    """Folder that holds the package: a checkout, or the place where packages are installed."""
    return Path(__file__).resolve().parents[1]


def report_dict() -> dict[str, dict[str, Any]]:
    """The report as JSON values: section -> name -> value."""
    extension = backends.extension()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "mclfast": {
            "version": __version__,
            "path": str(root() / "mclfast"),
            # Without .git, an installed package may lie inside the checkout of another project.
            "git": git_hash(root()) if (root() / ".git").exists() else None,
        },
        "system": {
            "python": platform.python_version(),
            "executable": sys.executable,
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
        },
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "gpus": gpus,
            "threads": torch.get_num_threads(),
            "numpy": numpy.__version__,
        },
        "extension": {
            "path": None if extension is None else extension.__file__,
            "status": backends.extension_reason(),
            **(backends.build_info() or {}),
        },
        "backends": {
            name: {"available": status.available, "reason": status.reason}
            for name, status in backends.backend_report().items()
        },
        "packages": {name: _version_of(name) for name in _OPTIONAL},
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return f"{'yes' if value['available'] else 'no':<5}{_text(value['reason'])}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    # The message of a loader may have several lines.
    return "none" if value is None else " ".join(str(value).split())


def report() -> str:
    """The report as aligned plain text."""
    lines = []
    for section, values in report_dict().items():
        lines.append(section)
        lines += [f"  {name:<18}{_text(value)}" for name, value in values.items()]
    return "\n".join(lines)
