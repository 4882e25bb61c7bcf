"""The arithmetic floor of a case: its matrix products and exponentials at this machine's own rates.

The unit is one product of [B, D] with [D, B], 2 B^2 D floating point operations. What a schedule
that shares everything must do, with N nodes and X unordered pairs of nodes between networks:

    forward            X            S_ab; S_ba is its transpose
                       N / 2        S_aa, symmetric
    backward           2 X          H_ab E_b and H_ab^T E_a, with one H for both orders
                       N            (D_a + D_a^T) E_a, the sum formed once
    second order       7 X          S_ab again (1), V_a E_b^T + E_a V_b^T (2), and the products
                                    of the two logit gradients with E and V from both sides (4)
                       3.5 N        S_aa again (1/2), the symmetric V E^T + E V^T (1), products (2)

Forward and backward share their similarities (one sweep), so together they cost 3 X + 1.5 N; the
second order, which is all three sweeps, 10 X + 5 N. The soft vcl term adds per anchor an N x B by
B x N product forward and an N x N by N x B one backward: N^2 / D units each, the double again for
the second order. One exponential per element of each similarity matrix, cross or intra.

SupCon is the N / 2 + N part of one node (of 2 B anchors for two views), InfoNCE the 3 X part of one
pair. Everything else (label compares, sums, logarithms, traffic) is free here, so no schedule
reaches the floor; a two-sweep path that computes similarities twice starts at about 4/3 of it.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mclfast.benchmark.cases import DTYPES, FORWARD, SECOND, Case

LAYOUTS = ("nt", "nn", "tn")


@dataclass(frozen=True)
class Work:
    """Amounts of work of a case.

    Attributes:
        units: matrix products of 2 B^2 D operations, by layout.
        exps: exponentials.
        batch: side of the similarity matrices (2 B for NT-Xent).
    """

    units: dict[str, float]
    exps: float
    batch: int


@dataclass(frozen=True)
class Rates:
    """Measured rates of a machine at one batch and width.

    Attributes:
        gemm: operations per second, by layout: "nt" [B, D] [D, B], "nn" [B, B] [B, D], "tn" the
            transposed [B, B] [B, D].
        exp: exponentials per second; infinite on a GPU, where ``torch.exp`` measures memory.
    """

    gemm: dict[str, float]
    exp: float


def work(case: Case) -> Work:
    """The least work of a case, by the counts of the module's description."""
    batch, nodes, pairs = case.b, float(case.nodes), float(case.unordered_pairs)
    if case.op == "supcon":
        pairs = 0.0
    elif case.op == "nt_xent":
        batch, nodes, pairs = 2 * case.b, 1.0, 0.0
    elif case.op == "info_nce":
        nodes = 0.0
    second = case.mode == SECOND
    backward = case.mode != FORWARD
    mix = nodes**2 / case.d if case.op == "layerwise_mcl" else 0.0
    units = {
        "nt": pairs + nodes / 2 + mix + second * (3 * pairs + 1.5 * nodes + mix),
        "nn": backward * (pairs + nodes + mix) + second * (2 * pairs + 2 * nodes + mix),
        "tn": backward * pairs + second * 2 * pairs,
    }
    sweeps = 2 if second else 1
    return Work(units, sweeps * (pairs + nodes) * batch**2, batch)


def floor_ms(case: Case, rates: Rates) -> float:
    """Milliseconds of the case's matrix products and exponentials at the measured rates."""
    amount = work(case)
    unit = 2.0 * amount.batch**2 * case.d
    gemm = sum(amount.units[layout] * unit / rates.gemm[layout] for layout in LAYOUTS)
    return (gemm + amount.exps / rates.exp) * 1e3


def _operands(layout: str, count: int, batch: int, d: int, like: Tensor) -> tuple[Tensor, Tensor]:
    def new(*shape: int) -> Tensor:
        return torch.randn(count, *shape, device=like.device).to(like.dtype)

    if layout == "nt":
        return new(batch, d), new(batch, d).mT
    square = new(batch, batch)
    return (square if layout == "nn" else square.mT), new(batch, d)


def _seconds(call: Callable[[], object], device: str, repeats: int = 7) -> float:
    """Fast-side (20th percentile) time of a call: disturbances only add. Two runs do not count."""
    found = []
    for _ in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.quantiles(found[2:], n=5)[0]


def _in_streams(a: Tensor, b: Tensor, out: Tensor, streams: int) -> Callable[[], None]:
    """Runs the products [i] of a batch on so many Python threads, each product on one core."""

    def some(first: int) -> None:
        torch.set_num_threads(1)
        for i in range(first, a.shape[0], streams):
            torch.mm(a[i], b[i], out=out[i])

    def call() -> None:
        threads = [threading.Thread(target=some, args=(i,)) for i in range(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return call


def _gemm_rate(layout: str, batch: int, d: int, like: Tensor) -> float:
    """Operations per second, the best of three ways of using the cores.

    One product after another on all threads; a batched product; one product per thread, as many at
    a time as there are threads. The best makes the floor lowest.
    """
    operations = 2.0 * batch**2 * d
    device = like.device.type
    # About 10 ms at 200 GFLOP/s: enough to hide what Python and threads cost.
    count = max(2, min(512, int(2e9 / operations)))
    if batch**2 * count * like.itemsize > 2**28:
        count = max(2, int(2**28 / (batch**2 * like.itemsize)))
    a, b = _operands(layout, count, batch, d, like)
    out = torch.matmul(a, b)

    def one_by_one() -> None:
        for i in range(count):
            torch.mm(a[i], b[i], out=out[i])

    ways: list[Callable[[], object]] = [one_by_one, lambda: torch.bmm(a, b, out=out)]
    found = [_seconds(way, device) for way in ways]
    threads = torch.get_num_threads()
    if device == "cpu" and threads > 1:
        try:
            found.append(_seconds(_in_streams(a, b, out, threads), device))
        finally:
            torch.set_num_threads(threads)
    return operations * count / min(found)


def _exp_rate(like: Tensor) -> float:
    if like.device.type != "cpu":
        return float("inf")
    # In cache, and enough for every thread to get a share.
    x = -torch.rand(2**17 * torch.get_num_threads(), dtype=like.dtype)
    out = torch.empty_like(x)
    return x.numel() / _seconds(lambda: torch.exp(x, out=out), "cpu", repeats=31)


def measure_rates(case: Case) -> Rates:
    """The rates at the shape of a case, on this machine, with the present number of threads."""
    like = torch.empty(0, dtype=DTYPES[case.dtype], device=case.device)
    batch = work(case).batch
    return Rates(
        {layout: _gemm_rate(layout, batch, case.d, like) for layout in LAYOUTS}, _exp_rate(like)
    )

