"""Fixtures and settings of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers import golden
from mclfast.ops import backends

if "OMP_NUM_THREADS" not in os.environ:
    # Test processes that each take all cores slow one another down.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(params=["reference", "cpu"])
def backend(request) -> Iterator[str]:
    """Makes "auto" take each backend for CPU tensors in turn."""
    status = backends.backend_report()[request.param]
    if not status.available:
        pytest.skip(f"backend {request.param}: {status.reason}")
    with backends.use_backend(request.param):
        yield request.param


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Networks as small as those of the tests are slower on more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of the values recorded from the published implementations."""
    return golden.FOLDER
