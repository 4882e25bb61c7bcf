"""Ahead-of-time compilation of the kernels for sm_90, as their launchers launch them; no GPU.

    python -m mclfast.kernels._aot --d 64 128 --dtype float32 bfloat16 float16

prints one JSON object per kernel: registers, stack, shared memory and tensor-core instructions.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mclfast.kernels import info_nce, mcl_backward, mcl_double_backward, mcl_forward
from mclfast.kernels.families import ALL

TARGET = GPUTarget("cuda", 90, 32)
# Bytes of shared memory that one block of sm_90 may use.

_POINTER = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
_OPTIONS = ("num_warps", "num_stages")


class Launch(NamedTuple):
    """One recorded kernel launch."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def record_launches(call: Callable[[], object]) -> list[Launch]:
    """The launches that ``call`` would make; nothing is compiled or run."""
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, tuple(grid), args, kwargs))

    original = JITFunction.run
    JITFunction.run = record
    try:
        call()
    finally:
        JITFunction.run = original
    return launches


def launcher_calls(
    networks: list[int], batch: int, d: int, dtype: torch.dtype, precision: str = "tf32"
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call of every launcher, all families, on uninitialised CPU tensors."""
    n = len(networks)
    nodes = torch.empty(n, batch, d, dtype=dtype)
    labels = torch.zeros(batch, dtype=torch.int64)
    rows, pairs = torch.empty(n, batch), torch.empty(n, n, batch)
    g = (rows, pairs, pairs, pairs)
    state = (nodes, labels, networks, pairs, pairs, 0.1, 3.0, ALL, 0, batch)
    row = torch.empty(batch)
    a, b = nodes[0], nodes[1]
    exact = {"precision": precision}
    yield (
        "forward",
        lambda: mcl_forward.mcl_rows_forward(
            nodes, labels, networks, 0.1, 3.0, ALL, 0, batch, **exact
        ),
    )
    yield "backward", lambda: mcl_backward.mcl_rows_backward(*g, *state, **exact)
    yield (
        "double_backward",
        lambda: mcl_double_backward.mcl_rows_double_backward(nodes, *g, *state, **exact),
    )
    yield "info_nce_forward", lambda: info_nce.info_nce_forward(a, b, 0.1, **exact)
    yield (
        "info_nce_backward",
        lambda: info_nce.info_nce_backward(row, row, row, a, b, row, row, 0.1, **exact),
    )
    yield (
        "info_nce_double_backward",
        lambda: info_nce.info_nce_double_backward(
            a, b, row, row, row, a, b, row, row, 0.1, **exact
        ),
    )


def compile_launch(launch: Launch) -> dict[str, Any]:
    """Compile for ``TARGET``, specialised as the launch would be; what the kernel needs."""
    kernel = launch.kernel
    values = dict(zip(kernel.arg_names, launch.args, strict=False))
    values.update({key: v for key, v in launch.kwargs.items() if key not in _OPTIONS})
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, param in enumerate(kernel.params):
        value = values[param.name]
        fixed = param.do_not_specialize
        if param.is_constexpr or (type(value) is int and value == 1 and not fixed):
            signature[param.name] = "constexpr"
            constants[param.name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[param.name] = _POINTER[value.dtype]
            aligned = True  # the CUDA allocator aligns to 512 bytes
        elif isinstance(value, float):
            signature[param.name] = "fp32"
            aligned = False
        else:
            signature[param.name] = "i32" if abs(value) < 2**31 else "i64"
            aligned = value % 16 == 0 and not fixed
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {key: launch.kwargs[key] for key in _OPTIONS if key in launch.kwargs}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGET, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
    ptx = compiled.asm["ptx"]
    return {
        "kernel": kernel.__name__,
        "block": f"{values.get('BLOCK_M', '')}x{values.get('BLOCK_N', '')}",
        **options,
        "registers": int(found[1]),
        "stack": int(found[2]),
        "local": int(found[3]),
        "shared": compiled.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "second": values.get("SECOND", False),
    }


def _compile_case(case: tuple[str, int, str, str]) -> list[dict[str, Any]]:
    only, d, dtype, precision = case
    calls = launcher_calls([0, 0, 1, 1], 512, d, getattr(torch, dtype), precision)
    rows = []
    seen = set()
    for name, call in calls:
        if name != only:
            continue
        for launch in record_launches(call):
            key = (launch.kernel.__name__, str(sorted(launch.kwargs.items())))
            if key in seen:
                continue
            seen.add(key)
            case_keys = {"d": d, "dtype": dtype, "precision": precision, "launcher": name}
            rows.append({**case_keys, **compile_launch(launch)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--precision", default="tf32")
    parser.add_argument("--launcher", nargs="+", default=None)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    names = args.launcher or [
        "double_backward",
        "backward",
        "forward",
        "info_nce_double_backward",
        "info_nce_backward",
        "info_nce_forward",
    ]
    cases = [(n, d, t, args.precision) for n in names for d in args.d for t in args.dtype]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for rows in pool.imap(_compile_case, cases):
            for row in rows:
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
