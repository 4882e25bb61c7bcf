"""Every header of csrc compiles alone; an instruction set is used for the kernels' headers only."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from helpers.emulated import EMULATION, ROOT

CSRC = ROOT / "csrc"
DISPATCH = CSRC / "cpu" / "dispatch"
COMPILER = os.environ.get("CXX", "c++").split()
SETS = {
    "avx2": "-DMCLFAST_VECTOR_BYTES=32 -mavx2 -mfma",
    "avx512": "-DMCLFAST_VECTOR_BYTES=64 -mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma",
}
x86 = platform.machine() == "x86_64"

needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER[0]) is None or os.name != "posix", reason="needs gcc or clang"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")


def each_header(*patterns: str):
    found = [path.relative_to(CSRC).as_posix() for p in patterns for path in CSRC.rglob(p)]
    return pytest.mark.parametrize("header", sorted(found))


def include(header: str) -> str:
    return f'#include "{CSRC / header}"\n'


def run(command: list[str], text: str, cwd: Path) -> str:
    """What the command prints for the text as its input."""
    done = subprocess.run(command, input=text, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def flag_sets(header: str) -> list[list[str]]:
    """The flags of each compilation: one for every instruction set where there are several."""
    text = (CSRC / header).read_text()
    if "<ATen/" in text or "<torch/" in text:
        return [["-std=c++20", *(f"-I{folder}" for folder in include_paths())]]
    if header.startswith("cuda/"):
        return [["-std=c++17", f"-I{EMULATION}"]]
    # Without flags too: this is how an editor sees a header.
    sets = SETS if x86 and "MCLFAST_CAPABILITY" in text else {}
    flags = [[f"-DMCLFAST_CAPABILITY={name}", *more.split()] for name, more in sets.items()]
    return [["-std=c++17", *more] for more in [[], *flags]]


@each_header("*.h", "*.cuh")
def test_header_is_read_once(header):
    code = [line for line in (CSRC / header).read_text().splitlines() if line[:2] != "//"]
    assert code[0] == "#pragma once", f"{header} does not begin with #pragma once"


@needs_compiler
@each_header("*.h", "*.cuh")
def test_header_compiles_alone(header, tmp_path):
    for flags in flag_sets(header):
        command = [*COMPILER, *flags, "-w", "-fsyntax-only", "-x", "c++", "-"]
        run(command, 2 * include(header), tmp_path)


@needs_nvcc
@each_header("cuda/*.h", "cuda/*.cuh")
def test_cuda_header_compiles_alone(header, tmp_path):
    source = tmp_path / "header.cu"
    source.write_text(include(header))
    flags = ["-std=c++17", "-arch=sm_80", "-Werror", "all-warnings"]
    run(["nvcc", *flags, "-ptx", str(source), "-o", str(tmp_path / "header.ptx")], "", tmp_path)


def foreign_code(source: str) -> set[str]:
    """Files with code in the target region of a kernels_*.cpp that are none of the kernels' own."""
    # Read from standard input, so that its includes start in the current folder.
    text = run([*COMPILER, "-std=c++17", "-E", "-x", "c++", "-"], source, DISPATCH)
    region = re.search(
        r"^#pragma (?:GCC push_options|clang attribute push)(.*)"
        r"^#pragma (?:GCC pop_options|clang attribute pop)",
        text,
        re.DOTALL | re.MULTILINE,
    )
    assert region is not None
    file, found = "<stdin>", set()
    for line in region[1].splitlines():
        if marker := re.match(r'# \d+ "([^"]*)"', line):
            file = marker[1]
        elif line.strip() and not line.startswith("#"):
            found.add(file)
    assert any(file.endswith("vec.h") for file in found)
    return {file for file in found if "MCLFAST_CAPABILITY" not in (DISPATCH / file).read_text()}


@needs_compiler
@pytest.mark.skipif(not x86, reason="instruction sets of x86_64")
@pytest.mark.parametrize("name", SETS)
def test_target_region_holds_kernels_only(name):
    source = (DISPATCH / f"kernels_{name}.cpp").read_text()
    assert foreign_code(source) == set()
    # An include too late: its inline functions would be compiled for the instruction set.
    define = "#define MCLFAST_CAPABILITY"
    late = source.replace(define, f"#include <vector>\n{define}")
    assert any("vector" in file for file in foreign_code(late))
