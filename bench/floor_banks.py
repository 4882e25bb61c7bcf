"""The floor of a memory-bank case: the bank rows that must be read, or the arithmetic if longer.

Bytes. An anchor needs 1 + P + K rows of each of M banks, every one at least once. Batches are far
too large for a cache, so a further use in a later pass is a further read. With shared negatives the
K rows are the same for all anchors and count once.

    layer-wise MCL    forward, or forward and backward    1 pass: an anchor's gradient needs no
                                                          other anchor, so its rows are still near
                      second order                        2: the tangent comes after the gradient
    NCE               forward                             1
                      forward and backward                2: the normalising constant is a mean over
                                                          the batch, known after the first pass, and
                                                          the gradient weights depend on it
                      second order                        3

They are read at the best measured rate of random rows of banks of this size: on a CPU the better of
``index_select`` into a small buffer and ``embedding_bag``, which adds rows up and writes next to
nothing. On a GPU at the rate of a device copy, bytes read plus bytes written.

Arithmetic. One product of an anchor's rows of a bank with the embeddings compared with it (N nodes;
for NCE the M - 1 other networks), 2 (1 + P + K) D operations for each: the logits, and with them
the gradient. The second order adds the logits again, their tangent, and the second gradient. One
exponential per logit and pass, so exp(z / T) and exp(z) of the same logit count once. Both are
counted at the rates that ``floor.py`` measures for single products of [512, D] with [D, 512].

Reading and arithmetic overlap at best: the floor is the larger of the two. Indices, sums, logs,
soft terms and everything of size [B, D] are free in it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from mclfast.bench.floor import exp_rate, gemm_rate, least_seconds
from mclfast.bench.problem import BOTH, DTYPES, FORWARD, SECOND, WEIGHTS, Case

#: Passes over the bank rows, by operation and mode.
PASSES = {
    "bank_layerwise_mcl": {FORWARD: 1, BOTH: 1, WEIGHTS: 1, SECOND: 2},
    "bank_nce": {FORWARD: 1, BOTH: 2, WEIGHTS: 2, SECOND: 3},
}
#: Products of rows with embeddings, and exponentials of each logit, by mode.
PRODUCTS = {FORWARD: 1, BOTH: 2, WEIGHTS: 2, SECOND: 5}
EXPONENTIALS = {FORWARD: 1, BOTH: 1, WEIGHTS: 1, SECOND: 2}

#: Rows read to measure a rate, bytes written by each call of ``index_select``, bytes of a copy.
_ROWS = 2**18
_BUFFER = 2**21
_COPY = 2**30


@dataclass(frozen=True)
class BankRates:
    """Measured rates of a machine for banks of one size and dtype.

    Attributes:
        gather: bytes per second of random bank rows.
        gemm: operations per second.
        exp: exponentials per second; infinite on a GPU.
        ways: the library and layout that reached the rates of gather and gemm.
    """

    gather: float
    gemm: float
    exp: float
    ways: dict[str, str] = field(default_factory=dict)

    def best(self, other: BankRates) -> BankRates:
        """The higher of each rate: a second measurement at a quieter moment."""
        ways = {
            name: max((getattr(x, name), x.ways.get(name, "")) for x in (self, other))[1]
            for name in ("gather", "gemm")
        }
        return BankRates(
            max(self.gather, other.gather),
            max(self.gemm, other.gemm),
            max(self.exp, other.exp),
            ways,
        )

    def as_json(self) -> dict[str, Any]:
        """Fit for JSON, which does not know the infinite: None where a rate is not measured."""
        return {
            "gather_bytes_per_s": self.gather,
            "gemm_flop_per_s": self.gemm,
            "exp_per_s": None if math.isinf(self.exp) else self.exp,
            "ways": self.ways,
        }

    def floors(self, case: Case) -> dict[str, float]:
        """The columns of a row of ``case`` that depend on the rates."""
        return {"floor": floor_ms(case, self), "floor_gather": gather_ms(case, self)}


def gathered_bytes(case: Case) -> int:
    """Bytes of bank rows that must be read."""
    rows = case.b * case.keys
    if case.shared_negatives:
        rows -= (case.b - 1) * case.k
    size = DTYPES[case.bank_dtype].itemsize
    return PASSES[case.op][case.mode] * case.m * rows * case.d * size


def logits(case: Case) -> int:
    """Products of a bank row with an embedding that a case is made of."""
    per_key = case.m * case.nodes if case.op == "bank_layerwise_mcl" else case.m * (case.m - 1)
    return per_key * case.b * case.keys


def gather_ms(case: Case, rates: BankRates) -> float:
    """Milliseconds of reading the bank rows at the measured rate."""
    return gathered_bytes(case) / rates.gather * 1e3


def floor_ms(case: Case, rates: BankRates) -> float:
    """Milliseconds of the reads or of the arithmetic at the measured rates, the larger."""
    products = PRODUCTS[case.mode] * 2.0 * case.d * logits(case) / rates.gemm
    exponentials = EXPONENTIALS[case.mode] * logits(case) / rates.exp
    return max(gather_ms(case, rates), (products + exponentials) * 1e3)


def rate_key(case: Case) -> str:
    """Names the shape at which the rates of a case are measured."""
    return f"banks M={case.m} n={case.n} D={case.d} {case.bank_dtype}, {case.dtype} {case.device}"


def _gather_rate(case: Case) -> tuple[float, str]:
    """Bytes per second of random rows, and how they were reached."""
    dtype = DTYPES[case.bank_dtype]
    rows = torch.ones(case.m * case.n, case.d, dtype=dtype)
    index = torch.randint(len(rows), (_ROWS,))
    pieces = index.split(max(1, _BUFFER // (case.d * dtype.itemsize)))
    buffer = torch.empty(len(pieces[0]), case.d, dtype=dtype)
    starts = torch.arange(0, _ROWS, 256)

    def select() -> None:
        for piece in pieces:
            torch.index_select(rows, 0, piece, out=buffer[: len(piece)])

    ways: dict[str, Callable[[], object]] = {
        "index_select": select,
        "embedding_bag": functools.partial(embedding_bag, index, rows, starts, mode="sum"),
    }
    with torch.no_grad():
        seconds = {name: least_seconds(call, "cpu", repeats=5) for name, call in ways.items()}
    way = min(seconds, key=lambda name: seconds[name])
    return _ROWS * case.d * dtype.itemsize / seconds[way], way


def _copy_rate(device: torch.device) -> tuple[float, str]:
    """Bytes per second that a copy on the device reads and writes."""
    source = torch.ones(_COPY, dtype=torch.uint8, device=device)
    copy: Tensor = torch.empty_like(source)
    # Several in a row: the host is ahead, and what a launch costs does not count.
    seconds = least_seconds(lambda: [copy.copy_(source) for _ in range(8)], "cuda", repeats=5)
    return 8 * 2 * _COPY / seconds, "copy"


def measure_rates(case: Case) -> BankRates:
    """The rates at the shape of a case, on this machine, with the present number of threads."""
    like = torch.empty(0, dtype=DTYPES[case.dtype], device=case.device)
    gather, way = _copy_rate(like.device) if case.device == "cuda" else _gather_rate(case)
    gemm, library = gemm_rate("nt", 512, case.d, like)
    return BankRates(gather, gemm, exp_rate(like), {"gather": way, "gemm": library})
