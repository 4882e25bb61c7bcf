"""Device functions shared by the kernels.

``s`` is an inner product <e_r, e_c>, not yet divided by the temperature. Exponentials are ``exp2``
with log2(e) folded into the factor of s. README.md beside this file has the notation.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below every inner product, yet finite: differences of two of them are 0, not NaN.
LOWEST = tl.constexpr(-1.0e30)
# Stands for the log-partition of a row that takes no part: exp2(. - NEVER) is 0.
NEVER = tl.constexpr(1.0e30)
# The interpreter would multiply the bit patterns of bfloat16.
WIDEN_BFLOAT16 = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr):
    """acc + x y in float32."""
    if WIDEN_BFLOAT16 and x.dtype == tl.bfloat16:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc)
    else:
        return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def classes_and_positives(LABELS, o_r, ok_r, B, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For anchors o_r: the first sample with the same label, int32, and 1 / |P(r)|, 0 without any.

    The former stands in for the label: int32 whatever the range of the labels.
    """
    y_r = tl.load(LABELS + o_r, mask=ok_r, other=0)
    count = tl.zeros([BLOCK_M], tl.float32)
    first = tl.zeros([BLOCK_M], tl.int32) + B
    for c_start in range(0, B, BLOCK_N):
        o_c = c_start + tl.arange(0, BLOCK_N)
        ok_c = o_c < B
        y_c = tl.load(LABELS + o_c, mask=ok_c, other=0)
        same = (y_r[:, None] == y_c[None, :]) & ok_c[None, :]
        count += tl.sum(tl.where(same & (o_r[:, None] != o_c[None, :]), 1.0, 0.0), 1)
        first = tl.minimum(first, tl.min(tl.where(same, o_c[None, :], B), 1))
    return first, tl.where(count > 0, 1.0 / tl.maximum(count, 1.0), 0.0)


@triton.jit
def load_tile(p_x, o_row, ok_row, d_start, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``o_row`` of the [*, D] matrix at p_x, columns from d_start on; 0 outside."""
    o_d = d_start + tl.arange(0, BLOCK_D)
    p_tile = p_x + o_row.to(tl.int64)[:, None] * D + o_d[None, :]
    if D % BLOCK_D == 0:
        return tl.load(p_tile, mask=ok_row[:, None], other=0.0)
    else:
        return tl.load(p_tile, mask=ok_row[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def inner_products(
    b_x,  # [BLOCK_M, BLOCK_D], the first BLOCK_D columns of rows o_x of p_x
    b_y,  # [BLOCK_N, BLOCK_D], the first BLOCK_D columns of rows o_y of p_y
    p_x,
    p_y,
    o_x,
    ok_x,
    o_y,
    ok_y,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x y^T over all of D, [BLOCK_M, BLOCK_N] float32."""
    s = tl.zeros([b_x.shape[0], b_y.shape[0]], tl.float32)
    s = dot(b_x, tl.trans(b_y), s, PRECISION)
    if D > BLOCK_D:
        for d_start in range(BLOCK_D, D, BLOCK_D):
            b_xd = load_tile(p_x, o_x, ok_x, d_start, D, BLOCK_D)
            b_yd = load_tile(p_y, o_y, ok_y, d_start, D, BLOCK_D)
            s = dot(b_xd, tl.trans(b_yd), s, PRECISION)
    return s


@triton.jit
def output_tile(
    b_y, p_y, o_y, ok_y, d_out, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr
):
    """Columns d_out .. d_out + BLOCK_OUT of y: b_y itself if it is the whole of y."""
    if D > BLOCK_D:
        return load_tile(p_y, o_y, ok_y, d_out, D, BLOCK_OUT)
    else:
        return b_y


@triton.jit
def accumulate(acc, h, b_y, PRECISION: tl.constexpr):
    """acc + h y, [BLOCK_M, BLOCK_OUT] float32."""
    if b_y.dtype == tl.float16:
        # h carries the scale of the cotangents, which float16 cannot hold (1/B, loss scaling).
        # float16 is exact in tf32.
        return dot(h, b_y.to(tl.float32), acc, PRECISION)
    else:
        return dot(h.to(b_y.dtype), b_y, acc, PRECISION)


@triton.jit
def online_update(
    s,  # [BLOCK_M, BLOCK_N] inner products
    others,  # [BLOCK_M, BLOCK_N] columns that count
    m,  # [BLOCK_M] running maximum of s
    sum_hard,  # [BLOCK_M] sum exp((s - m) / tau)
    sum_soft,  # [BLOCK_M] sum exp((s - m) / (tau T))
    k,  # log2(e) / tau
    inv_t,  # 1 / T
    HARD: tl.constexpr,
    SOFT: tl.constexpr,
    POWER: tl.constexpr,
):
    """One tile more for the partition functions at temperature 1 and T.

    Returns m, sum_hard, sum_soft, the decay of sums at T that were taken with the old maximum, and
    x = exp((s - m) / (tau T)), 0 outside ``others``.
    """
    m_new = tl.maximum(m, tl.max(tl.where(others, s, LOWEST), 1))
    shifted = s - m_new[:, None]
    decay = tl.exp2((m - m_new) * (k * inv_t))
    if SOFT:
        x = tl.where(others, tl.exp2(shifted * (k * inv_t)), 0.0)
        sum_soft = sum_soft * decay + tl.sum(x, 1)
    else:
        x = shifted
    if HARD:
        # exp((s - m) / tau) = x**T needs no second exponential for a small integer T; with the
        # true maximum as shift it underflows only where the exponential does.
        if SOFT and POWER == 1:
            e = x
        elif SOFT and POWER == 2:
            e = x * x
        elif SOFT and POWER == 3:
            e = x * x * x
        elif SOFT and POWER == 4:
            x2 = x * x
            e = x2 * x2
        else:
            e = tl.where(others, tl.exp2(shifted * k), 0.0)
        sum_hard = sum_hard * tl.exp2((m - m_new) * k) + tl.sum(e, 1)
    return m_new, sum_hard, sum_soft, decay, x


@triton.jit
def log_partition(m, sum_hard, inv_tau):
    """log sum_{c != r} exp(s / tau), [BLOCK_M]; 0 where there is no other column.

    Compared with 0, because NaN is not above 0 and must stay.
    """
    log_sum = tl.log2(tl.where(sum_hard == 0, 1.0, sum_hard)) * LN2
    return tl.where(sum_hard == 0, 0.0, m * inv_tau + log_sum)


@triton.jit
def log_partition_with_self(m, sum_soft, s_self, inv_tau, inv_t):
    """log sum_c exp(s / (tau T)) from the sum over c != r and the anchor's own column, [BLOCK_M].

    Returns it and the factor that turns sums of exp((s - m) / (tau T)) into means.
    """
    top = tl.maximum(m, s_self)
    k = inv_tau * inv_t * LOG2E
    decay = tl.exp2((m - top) * k)
    total = sum_soft * decay + tl.exp2((s_self - top) * k)
    return top * (inv_tau * inv_t) + tl.log2(total) * LN2, decay / total
