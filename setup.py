"""The only build logic of mclfast: which packages ship, and whether ``mclfast._C`` is compiled.

Environment:
    MCLFAST_BUILD_EXT: 0 = never compile; 1 = compile or fail; auto (default) = compile when torch
        and a C++ compiler are there, and carry on as pure Python otherwise or when it fails.
    MCLFAST_SANITIZE: 1 = compile with AddressSanitizer and UndefinedBehaviorSanitizer;
        thread = with ThreadSanitizer.
    FORCE_CUDA: 1 = compile ``csrc/cuda`` although no CUDA toolkit matching torch was found.
    CXX, MAX_JOBS, TORCH_CUDA_ARCH_LIST: read by torch.utils.cpp_extension.

torch is no build requirement: pip would compile against a torch of its own choice, whose ABI may
differ from the one in use. So compiling takes ``pip install --no-build-isolation``.

All files are compiled with the same flags. A file for one instruction set marks its functions with
``#pragma GCC target`` or ``__attribute__((target(...)))``, placed after the headers that other
files include too: with -mavx2 for the whole file, inline functions of those headers would be
compiled for AVX2 as well, and the linker may pick these copies for callers that must run on any
CPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def say(text: str) -> None:
    # stderr, so that `python setup.py --name` stays usable in scripts.
    print(f"mclfast setup: {text}", file=sys.stderr)


def fail(text: str) -> NoReturn:
    sys.exit(f"mclfast setup: {text}")


def build_mode() -> str:
    mode = os.environ.get("MCLFAST_BUILD_EXT", "auto")
    if mode not in ("0", "1", "auto"):
        fail(f"MCLFAST_BUILD_EXT must be 0, 1 or auto, got {mode!r}")
    return mode


def cxx_compiler() -> str | None:
    """The compiler torch will call, or None."""
    default = "cl" if sys.platform == "win32" else "c++"
    return shutil.which(os.environ.get("CXX", default).split(" ")[0])


def obstacle() -> str | None:
    """Why the extension cannot be compiled here, or None."""
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except Exception as error:  # a broken torch raises OSError or RuntimeError
        return (
            f"torch cannot be imported here ({type(error).__name__}: {error}); "
            "install torch, then: pip install --no-build-isolation ..."
        )
    if cxx_compiler() is None:
        return "no C++ compiler found (set CXX)"
    return None


def sources(*patterns: str) -> list[str]:
    """Files below csrc/, relative to this folder as setuptools wants them."""
    return sorted(
        path.relative_to(ROOT).as_posix()
        for pattern in patterns
        for path in (ROOT / "csrc").glob(pattern)
    )


def wants_cuda() -> bool:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    # nvcc on the PATH says nothing about torch: a CPU build of torch cannot use what it compiles.
    found = torch.version.cuda is not None and CUDA_HOME is not None
    return (found or os.environ.get("FORCE_CUDA") == "1") and bool(sources("cuda/*.cu"))


def host_flags() -> list[str]:
    if sys.platform == "win32":
        return ["/O2"]
    flags = ["-O3", "-fvisibility=hidden", *sanitizer_flags()]
    # at::parallel_for is an inline template and runs serially without this. There is no -fopenmp
    # for the linker: the symbols then resolve to the OpenMP runtime torch has loaded, where a
    # second one would ignore torch.set_num_threads. Clang needs another runtime: it goes without.
    version = subprocess.run([str(cxx_compiler()), "--version"], capture_output=True, text=True)
    if sys.platform == "linux" and "clang" not in version.stdout:
        flags.append("-fopenmp")
    return flags


def sanitizer_flags() -> list[str]:
    """For the compiler and the linker; ``make asan`` and ``make tsan`` run the tests with them."""
    kinds = {
        "1": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"],
        "thread": ["-fsanitize=thread", "-g"],
    }
    return kinds.get(os.environ.get("MCLFAST_SANITIZE", ""), [])


def extension() -> Any:
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    files = sources("*.cpp", "cpu/**/*.cpp")
    flags = {"cxx": host_flags()}
    if not wants_cuda():
        say(f"compiling {len(files)} C++ files without CUDA: {' '.join(flags['cxx'])}")
        return CppExtension(
            "mclfast._C", files, extra_compile_args=flags, extra_link_args=sanitizer_flags()
        )
    files += sources("cuda/*.cpp", "cuda/*.cu")
    flags["nvcc"] = ["-O3"]
    flags["cxx"].append("-DMCLFAST_WITH_CUDA")
    say(f"compiling {len(files)} C++ and CUDA files: {' '.join(flags['cxx'])}")
    return CUDAExtension("mclfast._C", files, extra_compile_args=flags)


def build_command(mode: str) -> Any:
    from torch.utils.cpp_extension import BuildExtension

    class TolerantBuild(BuildExtension):  # type: ignore[misc]
        """Carries on without the extension when it does not compile.

        setuptools' own ``optional`` does not catch what torch raises.
        """

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (Exception, SystemExit) as error:
                first_line = str(error).partition("\n")[0]
                say(
                    f"the extension did not compile ({first_line}); carrying on as pure Python. "
                    "MCLFAST_BUILD_EXT=1 with pip -v shows the errors"
                )
                self.extensions = []
                self.distribution.ext_modules = []

    return BuildExtension if mode == "1" else TolerantBuild


def build_arguments() -> dict[str, Any]:
    """Decides on the extension, says so, and returns what ``setup`` needs for it."""
    mode = build_mode()
    if mode == "0":
        say("extension: no, MCLFAST_BUILD_EXT=0")
        return {}
    reason = obstacle()
    if reason is not None:
        if mode == "1":
            fail(f"MCLFAST_BUILD_EXT=1, but {reason}")
        say(f"extension: no, {reason}")
        say("mclfast works without it, as pure Python")
        return {}
    import torch

    say(f"extension: yes, MCLFAST_BUILD_EXT={mode}, torch {torch.__version__}, {cxx_compiler()}")
    return {"ext_modules": [extension()], "cmdclass": {"build_ext": build_command(mode)}}


setup(
    packages=[
        *find_packages(include=["mclfast", "mclfast.*"]),
        "mclfast.kernels",
        *(f"mclfast.kernels.{name}" for name in find_packages("kernels")),
        "mclfast.bench",
        *(f"mclfast.bench.{name}" for name in find_packages("bench")),
        "mclfast.recipes",
    ],
    package_dir={
        "mclfast": "mclfast",
        "mclfast.kernels": "kernels",
        "mclfast.bench": "bench",
        "mclfast.recipes": "recipes",
    },
    package_data={"mclfast": ["py.typed"], "mclfast.recipes": ["*.yaml"]},
    **build_arguments(),
)
