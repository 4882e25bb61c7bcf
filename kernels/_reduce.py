"""Sum of partial gradients in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _sum_parts_kernel(PARTS, OUT, size, s_part, num_parts, BLOCK: tl.constexpr):
    """OUT [size] = sum of num_parts vectors that start s_part apart."""
    o_i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = o_i < size
    total = tl.zeros([BLOCK], tl.float32)
    p_part = PARTS + o_i
    for _ in range(0, num_parts):
        total += tl.load(p_part, mask=ok, other=0.0)
        p_part += s_part
    tl.store(OUT + o_i, total.to(OUT.dtype.element_ty), mask=ok)


def sum_parts_kernel(parts: Tensor, out: Tensor) -> None:
    """Write the sum of ``parts`` [num_parts, *out.shape] float32, each contiguous, to ``out``."""
    size = out.numel()
    _sum_parts_kernel[(triton.cdiv(size, _BLOCK),)](
        parts, out, size, parts.stride(0), parts.shape[0], BLOCK=_BLOCK
    )
