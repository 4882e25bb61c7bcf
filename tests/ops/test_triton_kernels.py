"""Runs ``triton_cases.py``: compiled where there is a GPU, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mclfast

pytest.importorskip("triton")


@pytest.mark.parametrize("part", ["test_rows", "not test_rows"])
def test_kernels_equal_the_reference(part):
    # A process of its own: the variable acts when triton is imported, and would make the Triton
    # backend look available to the tests that follow.
    env = dict(os.environ, PYTHONPATH=str(Path(mclfast.__file__).resolve().parents[1]))
    env.setdefault("OMP_NUM_THREADS", "1")  # the tiles are small
    env.pop("TRITON_INTERPRET", None)
    if not torch.cuda.is_available():
        env["TRITON_INTERPRET"] = "1"
    folder = Path(__file__).resolve().parents[1] / "helpers"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", part]
    run = subprocess.run(
        [*command, str(folder / "triton_cases.py")],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
