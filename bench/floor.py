"""The arithmetic floor of a case: its matrix products and exponentials at this machine's own rates.

The unit is one product of [B, D] with [D, B], 2 B^2 D floating point operations. A schedule that
shares everything needs, with N nodes and X unordered pairs of nodes between networks:

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

import functools
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mclfast.bench.problem import DTYPES, FORWARD, SECOND, Case

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
        ways: the library and layout that reached each GEMM rate.
    """

    gemm: dict[str, float]
    exp: float
    ways: dict[str, str] = field(default_factory=dict)

    def best(self, other: Rates) -> Rates:
        """The higher of each rate: a second measurement at a quieter moment."""
        ahead = {layout: other.gemm[layout] > self.gemm[layout] for layout in LAYOUTS}
        return Rates(
            {x: other.gemm[x] if ahead[x] else self.gemm[x] for x in LAYOUTS},
            max(self.exp, other.exp),
            {x: (other if ahead[x] else self).ways.get(x, "") for x in LAYOUTS},
        )

    def as_json(self) -> dict[str, Any]:
        """Fit for JSON, which does not know the infinite: None where a rate is not measured."""
        return {
            "exp_per_s": None if math.isinf(self.exp) else self.exp,
            "gemm_flop_per_s": self.gemm,
            "gemm_way": self.ways,
        }

    def floors(self, case: Case) -> dict[str, float]:
        """The columns of a row of ``case`` that depend on the rates."""
        return {"floor": floor_ms(case, self)}


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


Product = Callable[[int], object]


def _products(layout: str, count: int, batch: int, d: int, like: Tensor) -> dict[str, Product]:
    """By library: a function that computes the product number i out of ``count``."""

    def new(*shape: int) -> Tensor:
        return torch.randn(count, *shape, device=like.device).to(like.dtype)

    if layout == "nt":
        a, b = new(batch, d), new(batch, d).mT
    else:
        square = new(batch, batch)
        a, b = (square if layout == "nn" else square.mT), new(batch, d)
    out = torch.empty(a.shape[0], a.shape[1], b.shape[2], dtype=like.dtype, device=like.device)
    products: dict[str, Product] = {
        "blas": lambda i: torch.mm(a[i], b[i], out=out[i]),
        "batched": lambda _: torch.bmm(a, b, out=out),
    }
    # torch.mm goes to MKL, which is slow on processors of other makers; oneDNN is not.
    single = like.device.type == "cpu" and like.dtype == torch.float32
    if single and torch.backends.mkldnn.is_available():
        left = [x.contiguous().to_mkldnn() for x in a]
        right = [x.mT.contiguous().to_mkldnn() for x in b]
        products["onednn"] = lambda i: torch.nn.functional.linear(left[i], right[i])
    return products


def least_seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Least time of a call: disturbances only add. The first run does not count."""
    found = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found[1:])


def in_turn(product: Product, count: int) -> None:
    for i in range(count):
        product(i)


def in_streams(product: Product, count: int, streams: int) -> None:
    """Products on so many Python threads at a time, each product on one core."""

    def some(first: int) -> None:
        torch.set_num_threads(1)
        for i in range(first, count, streams):
            product(i)

    threads = [threading.Thread(target=some, args=(i,)) for i in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def gemm_rate(layout: str, batch: int, d: int, like: Tensor) -> tuple[float, str]:
    """Operations per second and the way that reached them.

    Each library computes one product after another on all threads, and one product per thread, as
    many at a time as there are threads. The best makes the floor lowest.
    """
    operations = 2.0 * batch**2 * d
    device = like.device.type
    # About 10 ms at 200 GFLOP/s, enough to hide what Python and threads cost; at most 256 MiB.
    largest = 2**28 / (batch * max(batch, d) * like.itemsize)
    count = max(2, int(min(512, 2e9 / operations, largest)))
    threads = torch.get_num_threads()
    seconds = {}
    try:
        with torch.no_grad():
            for name, product in _products(layout, count, batch, d, like).items():
                turns = 1 if name == "batched" else count
                call = functools.partial(in_turn, product, turns)
                seconds[name] = least_seconds(call, device, repeats=5)
                if device == "cpu" and threads > 1 and name != "batched":
                    call = functools.partial(in_streams, product, count, threads)
                    seconds[f"{name}, one thread each"] = least_seconds(call, device, repeats=5)
    finally:
        torch.set_num_threads(threads)
    way = min(seconds, key=lambda name: seconds[name])
    return operations * count / seconds[way], way


def exp_rate(like: Tensor) -> float:
    if like.device.type != "cpu":
        return float("inf")
    threads = torch.get_num_threads()
    # In cache: one parallel region for all cores, and pieces that a core each works through. The
    # first is held up by any other load of the machine, the second by the start of its threads.
    whole = -torch.rand(2**17 * threads, dtype=like.dtype)
    out = torch.empty_like(whole)
    best = whole.numel() / least_seconds(lambda: torch.exp(whole, out=out), "cpu", repeats=30)
    pieces, outs, count = whole.split(2**16), out.split(2**16), 128 * threads

    def product(i: int) -> None:
        torch.exp(pieces[i % len(pieces)], out=outs[i % len(pieces)])

    try:
        call = functools.partial(in_streams, product, count, threads)
        return max(best, count * 2**16 / least_seconds(call, "cpu", repeats=5))
    finally:
        torch.set_num_threads(threads)


def rate_key(case: Case) -> str:
    """Names the shape at which the rates of a case are measured."""
    return f"B={work(case).batch} D={case.d} {case.dtype} {case.device}"


def measure_rates(case: Case) -> Rates:
    """The rates at the shape of a case, on this machine, with the present number of threads."""
    like = torch.empty(0, dtype=DTYPES[case.dtype], device=case.device)
    batch = work(case).batch
    found = {layout: gemm_rate(layout, batch, case.d, like) for layout in LAYOUTS}
    return Rates(
        {layout: rate for layout, (rate, _) in found.items()},
        exp_rate(like),
        {layout: way for layout, (_, way) in found.items()},
    )
