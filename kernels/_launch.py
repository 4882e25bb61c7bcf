"""Helpers of the launchers: tile sizes, launch shapes, cached index tables, argument checks."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

LOG2E = math.log2(math.e)

_PRECISIONS = ("tf32", "tf32x3", "ieee")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Programs that fill the widest GPU seen (H200: 132 multiprocessors) about twice. A constant, so
# that the order of summation, hence every bit of the result, does not depend on the device.
_TARGET_PROGRAMS = 264
_MAX_SPLITS = 8


class Tiles(NamedTuple):
    """Launch configuration of one kernel."""

    block_m: int
    block_n: int
    block_d: int  # inner products read this many columns of the embeddings at a time
    block_out: int  # columns of the gradient that one program owns
    num_warps: int
    num_stages: int


class Pairs(NamedTuple):
    """Node pairs of different networks, as index tables on the device (int32)."""

    unordered: Tensor  # [P, 2], a < b
    ordered: Tensor  # [2P, 2], sorted by the first node
    first: Tensor  # [N + 1], where the partners of a node start in ``partner``
    partner: Tensor  # [2P]


@functools.lru_cache(maxsize=64)
def _pairs(networks: tuple[int, ...], device: torch.device) -> Pairs:
    n = len(networks)
    partners = [[b for b in range(n) if networks[b] != networks[a]] for a in range(n)]
    ordered = [(a, b) for a in range(n) for b in partners[a]]
    first = [0]
    for row in partners:
        first.append(first[-1] + len(row))

    def table(rows: Sequence[object], *shape: int) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32).reshape(shape).to(device)

    return Pairs(
        unordered=table([pair for pair in ordered if pair[0] < pair[1]], -1, 2),
        ordered=table(ordered, -1, 2),
        first=table(first, -1),
        partner=table([b for _, b in ordered], -1),
    )


def pair_tables(networks: Sequence[int], device: torch.device) -> Pairs:
    """Index tables of the node pairs; a repeated call copies nothing to the device."""
    return _pairs(tuple(int(net) for net in networks), device)


def tiles(kernel: str, d: int, dtype: torch.dtype, precision: str) -> Tiles:
    """Tile sizes and warps of ``kernel``, found by compiling for sm_90 (README.md, tests)."""
    half = dtype != torch.float32
    if not half and precision != "tf32":
        small = Tiles(32, 32, 32, 32, 4, 1)
        tile = _TF32X3.get(kernel, small) if precision == "tf32x3" else small
    elif d <= 128:
        tile = _TILES[kernel, half]
    else:
        tile = _WIDE[kernel, half]
    width = max(16, triton.next_power_of_2(d))
    return tile._replace(block_d=min(tile.block_d, width), block_out=min(tile.block_out, width))


# (kernel, 16-bit inputs): no spills at D = 64 and 128. float32 tiles are narrower because the
# product with E needs a transposed copy of E: tf32 reads its operands along the summed dimension.
_TILES: dict[tuple[str, bool], Tiles] = {
    ("intra_fwd", False): Tiles(64, 64, 128, 128, 4, 2),
    ("intra_fwd", True): Tiles(64, 64, 128, 128, 4, 2),
    ("pair_fwd", False): Tiles(128, 32, 128, 128, 8, 2),
    ("pair_fwd", True): Tiles(64, 32, 128, 128, 4, 2),
    ("cross_bwd", False): Tiles(128, 16, 128, 128, 8, 2),
    ("cross_bwd", True): Tiles(128, 32, 128, 128, 8, 2),
    ("intra_bwd", False): Tiles(128, 32, 128, 128, 8, 2),
    ("intra_bwd", True): Tiles(64, 32, 128, 128, 4, 2),
    ("intra_rows", False): Tiles(64, 32, 128, 128, 4, 2),
    ("intra_rows", True): Tiles(64, 32, 128, 128, 4, 2),
    ("pair_rows", False): Tiles(64, 16, 32, 32, 4, 1),
    ("pair_rows", True): Tiles(64, 32, 128, 128, 4, 1),
    ("cross_double", False): Tiles(128, 16, 32, 64, 8, 2),
    ("cross_double", True): Tiles(64, 16, 32, 128, 4, 1),
    ("intra_double", False): Tiles(64, 16, 32, 64, 4, 1),
    ("intra_double", True): Tiles(64, 16, 128, 128, 4, 1),
    ("nce_fwd", False): Tiles(64, 64, 128, 128, 4, 2),
    ("nce_fwd", True): Tiles(64, 64, 128, 128, 4, 2),
    ("nce_bwd", False): Tiles(64, 16, 128, 128, 4, 2),
    ("nce_bwd", True): Tiles(64, 32, 128, 128, 4, 2),
    ("nce_rows", False): Tiles(64, 32, 128, 128, 4, 1),
    ("nce_rows", True): Tiles(64, 32, 128, 128, 4, 1),
    ("nce_double", False): Tiles(64, 16, 32, 128, 4, 1),
    ("nce_double", True): Tiles(64, 32, 128, 128, 4, 1),
}

# D > 128. block_d at most half of D: a loop over slices of a single turn would be unrolled and
# keep all of D in shared memory.
_WIDE: dict[tuple[str, bool], Tiles] = {
    ("intra_fwd", False): Tiles(64, 32, 64, 64, 4, 1),
    ("intra_fwd", True): Tiles(64, 32, 64, 64, 4, 1),
    ("pair_fwd", False): Tiles(64, 32, 32, 32, 4, 2),
    ("pair_fwd", True): Tiles(64, 32, 64, 64, 4, 1),
    ("cross_bwd", False): Tiles(64, 16, 32, 128, 4, 2),
    ("cross_bwd", True): Tiles(64, 32, 64, 128, 4, 1),
    ("intra_bwd", False): Tiles(64, 16, 32, 128, 4, 2),
    ("intra_bwd", True): Tiles(64, 32, 64, 128, 4, 1),
    ("intra_rows", False): Tiles(64, 32, 64, 64, 4, 1),
    ("intra_rows", True): Tiles(64, 32, 64, 64, 4, 1),
    ("pair_rows", False): Tiles(64, 16, 32, 32, 4, 2),
    ("pair_rows", True): Tiles(64, 16, 32, 32, 4, 2),
    ("cross_double", False): Tiles(64, 16, 32, 64, 4, 2),
    ("cross_double", True): Tiles(64, 16, 32, 128, 4, 2),
    ("intra_double", False): Tiles(64, 16, 32, 64, 4, 2),
    ("intra_double", True): Tiles(64, 16, 32, 128, 4, 2),
    ("nce_fwd", False): Tiles(64, 32, 64, 64, 4, 1),
    ("nce_fwd", True): Tiles(64, 32, 64, 64, 4, 1),
    ("nce_bwd", False): Tiles(64, 32, 64, 128, 4, 1),
    ("nce_bwd", True): Tiles(64, 32, 64, 128, 4, 1),
    ("nce_rows", False): Tiles(64, 32, 64, 64, 4, 1),
    ("nce_rows", True): Tiles(64, 32, 64, 64, 4, 1),
    ("nce_double", False): Tiles(64, 16, 32, 128, 4, 2),
    ("nce_double", True): Tiles(64, 16, 32, 128, 4, 2),
}

# tf32x3 splits every operand; what is missing here, and ieee on the FMA units, gets 32 x 32.
_TF32X3: dict[str, Tiles] = {
    "pair_fwd": Tiles(64, 16, 32, 32, 4, 1),
    "cross_bwd": Tiles(64, 32, 32, 128, 8, 1),
    "intra_bwd": Tiles(64, 32, 32, 128, 8, 1),
    "nce_bwd": Tiles(64, 32, 32, 128, 8, 1),
}


def column_splits(programs: int, columns: int, block_n: int) -> tuple[int, int]:
    """Into how many parts a column loop is cut when rows alone leave the GPU idle.

    Returns:
        (parts, columns per part), the latter a multiple of block_n.
    """
    column_tiles = triton.cdiv(columns, block_n)
    parts = max(1, min(_TARGET_PROGRAMS // max(1, programs), _MAX_SPLITS, column_tiles))
    per_part = triton.cdiv(column_tiles, parts)
    return triton.cdiv(column_tiles, per_part), per_part * block_n


def integer_power(kl_temperature: float) -> int:
    """T if x**T replaces an exponential (1, 2, 3, 4), else 0."""
    return int(kl_temperature) if kl_temperature in (1.0, 2.0, 3.0, 4.0) else 0


def check_inputs(x: Tensor, precision: str) -> None:
    """Refuse what the kernels cannot read."""
    if x.dtype not in _DTYPES:
        raise ValueError(
            f"the Triton kernels take float32, bfloat16 or float16, got {x.dtype}; "
            "use the reference backend"
        )
    if precision not in _PRECISIONS:
        raise ValueError(f"precision must be one of {_PRECISIONS}, got {precision!r}")
