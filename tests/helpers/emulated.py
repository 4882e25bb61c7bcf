"""The CUDA kernels compiled as C++ and run on the CPU, see the folder beside this file."""

from __future__ import annotations

import ctypes as c
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from mclfast.kernels.families import ALL

ROOT = Path(__file__).resolve().parents[2]
EMULATION = Path(__file__).resolve().parent / "cuda_emulation"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Bank(c.Structure):
    _fields_ = [
        *((name, c.c_void_p) for name in ("nodes", "banks", "pos_idx", "neg_idx")),
        *((name, c.c_int64) for name in ("pos_stride", "neg_stride", "samples")),
        *((name, c.c_int) for name in ("node_count", "network_count", "batch", "width")),
        *((name, c.c_int) for name in ("positives", "negatives", "node_type", "bank_type")),
        ("temperature", c.c_float),
        ("kl_temperature", c.c_float),
        ("families", c.c_uint),
        ("networks", c.c_ubyte * 128),
    ]


class Four(c.Structure):
    """Rows and Cotangents."""

    _fields_ = [(name, c.c_void_p) for name in ("vcl", "soft_vcl", "icl", "soft_icl")]


class Update(c.Structure):
    _fields_ = [
        *((name, c.c_void_p) for name in ("banks", "index", "embeddings")),
        ("samples", c.c_int64),
        *((name, c.c_int) for name in ("network_count", "batch", "width")),
        *((name, c.c_int) for name in ("bank_type", "embedding_type")),
        ("momentum", c.c_float),
    ]


class Sample(c.Structure):
    _fields_ = [
        *((name, c.c_void_p) for name in ("index", "order", "position", "labels", "starts")),
        ("samples", c.c_int64),
        *((name, c.c_int) for name in ("batch", "positives", "negatives")),
        ("seed", c.c_uint64),
        ("step", c.c_uint32),
        ("pos_idx", c.c_void_p),
        ("neg_idx", c.c_void_p),
    ]


def build(folder: Path, *flags: str) -> c.CDLL:
    library = folder / "emulated.so"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w"]
    command += flags
    # A longjmp to another stack is what the checked form of it refuses.
    command += ["-U_FORTIFY_SOURCE", f"-I{EMULATION}", f"-I{ROOT / 'csrc/cuda'}"]
    command += [*map(str, sorted(EMULATION.glob("*.cpp"))), "-x", "c++"]
    command += [*map(str, sorted((ROOT / "csrc" / "cuda").glob("*.cu"))), "-o", str(library)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return c.CDLL(str(library))


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class Kernels:
    """Operators with the arguments of ``torch.ops.mclfast_cuda``; outputs start as NaN."""

    def __init__(self, library: c.CDLL) -> None:
        self.library = library
        library.emulated_sizeof.restype = library.emulated_workspace.restype = c.c_size_t
        for i, struct in enumerate((Bank, Update, Sample)):
            assert library.emulated_sizeof(i) == c.sizeof(struct)
        self.device()

    def device(
        self, order: int = 0, processors: int = 2, cache: int = 1 << 20, shared: int = 227 * 1024
    ) -> None:
        """order: of the threads between barriers, see emulation.cpp; 0, 1 or 2."""
        self.library.emulation_set(order, processors, cache, shared)

    def call(self, name: str, *args: object) -> None:
        converted = [
            c.byref(x)
            if isinstance(x, c.Structure)
            else c.c_float(x)
            if isinstance(x, float)
            else c.c_void_p(pointer(x))
            for x in args
        ]
        error = getattr(self.library, f"emulated_{name}")(*converted)
        if error:
            raise RuntimeError(f"{name}: CUDA error {error}")

    def bank(
        self,
        nodes: Tensor,
        banks: Tensor,
        pos_idx: Tensor,
        neg_idx: Tensor,
        networks: list[int],
        tau: float,
        t: float = 1.0,
        families: int = ALL,
    ) -> Bank:
        for x in (nodes, banks):
            assert x.is_contiguous()
        return Bank(
            nodes=pointer(nodes),
            banks=pointer(banks),
            pos_idx=pointer(pos_idx),
            neg_idx=pointer(neg_idx),
            pos_stride=pos_idx.stride(0),
            neg_stride=neg_idx.stride(0),
            samples=banks.shape[1],
            node_count=nodes.shape[0],
            network_count=banks.shape[0],
            batch=nodes.shape[1],
            width=nodes.shape[2],
            positives=pos_idx.shape[1] - 1,
            negatives=neg_idx.shape[1],
            node_type=TYPES[nodes.dtype],
            bank_type=TYPES[banks.dtype],
            temperature=tau,
            kl_temperature=t,
            families=families,
            networks=(c.c_ubyte * 128)(*networks),
        )

    def outputs(self, b: Bank) -> tuple[list[Tensor], list[Tensor], Four]:
        n, m = b.node_count, b.network_count
        rows = [unset(*s, b.batch) for s in ((n,), (n, n), (m, n), (n, n))]
        statistics = [unset(m, n, b.batch) for _ in range(2)]
        return rows, statistics, four(rows)

    def forward(self, *args) -> list[Tensor]:
        b = self.bank(*args)
        rows, statistics, out = self.outputs(b)
        self.call("forward", b, out, *statistics)
        return rows + statistics

    def backward(self, cotangents: list[Tensor], statistics: list[Tensor], *args) -> Tensor:
        grad = torch.full_like(args[0], float("nan"))
        self.call("backward", self.bank(*args), four(cotangents), *statistics, grad)
        return grad

    def fused(self, cotangents: list[Tensor], *args) -> list[Tensor]:
        b = self.bank(*args)
        rows, statistics, out = self.outputs(b)
        grad = torch.full_like(args[0], float("nan"))
        self.call("fused", b, four(cotangents), out, *statistics, grad)
        return [*rows, *statistics, grad]

    def double_backward(
        self, tangent: Tensor, cotangents: list[Tensor], statistics: list[Tensor], *args
    ) -> list[Tensor]:
        b = self.bank(*args)
        rows, _, out = self.outputs(b)
        h = torch.full_like(args[0], float("nan"))
        self.call("double", b, tangent, four(cotangents), *statistics, h, out)
        return [h, *rows]

    def nce_lse(self, nodes: Tensor, *args) -> Tensor:
        lse = unset(len(nodes), len(nodes), nodes.shape[1])
        self.call("nce_lse", self.nce_bank(nodes, *args), lse)
        return lse

    def nce_fused(self, nodes, banks, pos_idx, neg_idx, normalizer, tau, eps):
        b = self.nce_bank(nodes, banks, pos_idx, neg_idx, tau)
        rows = unset(len(nodes), len(nodes), nodes.shape[1])
        grad = torch.full_like(nodes, float("nan"))
        self.call("nce_fused", b, normalizer, eps, rows, grad)
        return rows, grad

    def nce_double(self, tangent, nodes, banks, pos_idx, neg_idx, normalizer, tau, eps):
        b = self.nce_bank(nodes, banks, pos_idx, neg_idx, tau)
        h = torch.full_like(nodes, float("nan"))
        self.call("nce_double", b, tangent, normalizer, eps, h)
        return h

    def nce_bank(self, nodes, banks, pos_idx, neg_idx, tau):
        networks = list(range(len(nodes)))
        return self.bank(nodes, banks, pos_idx, neg_idx, networks, tau)

    def update_(self, banks: Tensor, index: Tensor, embeddings: Tensor, momentum: float) -> None:
        self.call(
            "update",
            Update(
                banks=pointer(banks),
                index=pointer(index),
                embeddings=pointer(embeddings),
                samples=banks.shape[1],
                network_count=banks.shape[0],
                batch=len(index),
                width=banks.shape[2],
                bank_type=TYPES[banks.dtype],
                embedding_type=TYPES[embeddings.dtype],
                momentum=momentum,
            ),
        )

    def sample(self, index, tables, positives, negatives, seed, step):
        pos = torch.full((len(index), 1 + positives), -1)
        neg = torch.full((len(index), negatives), -1)
        names = ("order", "position", "labels", "starts")
        self.call(
            "sample",
            Sample(
                index=pointer(index),
                **dict(zip(names, map(pointer, tables), strict=True)),
                samples=len(tables[0]),
                batch=len(index),
                positives=positives,
                negatives=negatives,
                seed=seed,
                step=step,
                pos_idx=pointer(pos),
                neg_idx=pointer(neg),
            ),
        )
        return pos, neg


def unset(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"))


def four(tensors: list[Tensor]) -> Four:
    return Four(*map(pointer, tensors))
