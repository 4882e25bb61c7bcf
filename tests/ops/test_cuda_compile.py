"""nvcc compiles the kernels without spills; the torch binding is valid C++. No GPU needed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ARCHITECTURES = ("80", "90a", "100")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH"),
]


def reports(output: str) -> list[dict[str, str | int]]:
    """One entry per kernel and architecture from what ptxas -v prints."""
    pattern = re.compile(
        r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    found = []
    for match in pattern.finditer(output):
        entry: dict[str, str | int] = dict(match.groupdict())
        for key in ("stack", "stores", "loads", "registers"):
            entry[key] = int(match[key])
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        entry["shared"] = int(shared[1]) if shared else 0
        found.append(entry)
    return found


@pytest.mark.parametrize("source", sorted(SOURCES.glob("*.cu")), ids=lambda path: path.stem)
def test_kernels_compile_without_spills(source, tmp_path):
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    # The flags of setup.py, and warnings as errors.
    command = ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", "-Werror", "all-warnings", *targets]
    run = subprocess.run(
        [*command, "-c", str(source), "-o", str(tmp_path / "kernel.o")],
        capture_output=True,
        text=True,
    )
    output = run.stdout + run.stderr
    if run.returncode != 0 and "Unsupported gpu architecture" in output:
        pytest.skip("this nvcc does not know " + ", ".join(ARCHITECTURES))
    assert run.returncode == 0, output[-4000:]
    found = reports(output)
    kernels = len(re.findall("Compiling entry function", output))
    assert len(found) == kernels and kernels >= len(ARCHITECTURES)
    for entry in found:
        assert entry["stack"] == entry["stores"] == entry["loads"] == 0, entry
        assert entry["registers"] <= 128, entry  # two blocks of 256 threads per multiprocessor
        assert entry["shared"] == 0, entry  # all of it is dynamic


def test_a_kernel_that_spills_is_reported(tmp_path):
    source = tmp_path / "spill.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) spill(float* x) {\n"
        "  float v[96];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 96; ++i) v[i] = x[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 96; ++i) x[i * 1024 + threadIdx.x] = v[i] * v[95 - i];\n"
        "}\n"
    )
    command = ["nvcc", "-arch=sm_90", "-Xptxas", "-v", "-c", str(source)]
    run = subprocess.run(
        [*command, "-o", str(tmp_path / "spill.o")], capture_output=True, text=True
    )
    (entry,) = reports(run.stdout + run.stderr)
    assert entry["stack"] > 0 and entry["stores"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="command line of gcc")
def test_binding_is_valid_cxx(tmp_path):
    """With CPU builds of torch, whose headers lack one generated file of the CUDA part."""
    stub = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    if torch.version.cuda is None:
        stub.parent.mkdir(parents=True)
        stub.touch()
    folders = [*include_paths(), str(tmp_path)]
    # nvcc passes a .cpp on to the C++ compiler, with the include folders of its toolkit.
    run = subprocess.run(
        ["nvcc", "-std=c++20", *(f"-I{folder}" for folder in folders), "-Xcompiler"]
        + ["-fsyntax-only,-Wall,-Werror=return-type", "-c", str(SOURCES / "ops.cpp")]
        + ["-o", str(tmp_path / "ops.o")],
        capture_output=True,
        text=True,
    )
    assert "error" not in run.stderr, run.stderr[-4000:]
    assert run.returncode == 0, run.stderr[-4000:]
