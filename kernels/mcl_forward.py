"""Forward of the in-batch losses: rows and log-partitions of every node and node pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mclfast.kernels import _launch
from mclfast.kernels._tl import (
    LOG2E,
    LOWEST,
    classes_and_positives,
    inner_products,
    load_tile,
    log_partition,
    log_partition_with_self,
    online_update,
)
from mclfast.kernels.families import ICL, SOFT_ICL, SOFT_VCL, VCL


@triton.jit
def _mcl_prepare_fwd_kernel(
    LABELS,  # [B] int64
    CLASSES,  # [B] int32, written: first sample of the same class
    INV_COUNT,  # [B], written: 1 / number of positives, 0 without any
    VCL,  # [N, R], zeroed
    SOFT_VCL,  # [N, N, R], zeroed, as the next four
    ICL,
    SOFT_ICL,
    LSE,
    KL_LSE,
    N,
    B,
    R,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Classes and positives, and zeros in the outputs, so that no separate fill is launched."""
    i_m, i_a = tl.program_id(0), tl.program_id(1)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if i_a == 0:
        ok_b = o_m < B
        first, inv_count = classes_and_positives(LABELS, o_m, ok_b, B, BLOCK_M, BLOCK_N)
        tl.store(CLASSES + o_m, first, mask=ok_b)
        tl.store(INV_COUNT + o_m, inv_count, mask=ok_b)
    ok_m = o_m < R
    zero = tl.zeros([BLOCK_M], tl.float32)
    tl.store(VCL + i_a.to(tl.int64) * R + o_m, zero, mask=ok_m)
    for i_b in range(0, N):
        o_ab = (i_a * N + i_b).to(tl.int64) * R + o_m
        tl.store(SOFT_VCL + o_ab, zero, mask=ok_m)
        tl.store(ICL + o_ab, zero, mask=ok_m)
        tl.store(SOFT_ICL + o_ab, zero, mask=ok_m)
        tl.store(LSE + o_ab, zero, mask=ok_m)
        tl.store(KL_LSE + o_ab, zero, mask=ok_m)


@triton.jit
def _mcl_intra_fwd_kernel(
    NODES,  # [N, B, D]
    CLASSES,  # [B] int32
    INV_COUNT,  # [B]
    VCL,  # [N, R], written
    LSE,  # [N, N, R], diagonal written
    KL_LSE,  # [N, N, R], diagonal written
    N,
    B,
    row_start,
    R,
    inv_tau,
    inv_t,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    POWER: tl.constexpr,
    HARD: tl.constexpr,  # vcl and lse wanted
    SOFT: tl.constexpr,  # kl_lse wanted
    PRECISION: tl.constexpr,
):
    """Similarities of one node with itself, one block of anchors."""
    i_m, i_a = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ok_m = o_m < R
    o_r = row_start + o_m
    p_a = NODES + i_a * B * D
    y_r = tl.load(CLASSES + o_r, mask=ok_m, other=0)
    b_r = load_tile(p_a, o_r, ok_m, 0, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]

    zero = tl.zeros([BLOCK_M], tl.float32)
    m = zero + LOWEST
    sum_hard = zero
    sum_soft = zero
    s_self = zero
    positives = zero
    poison = zero  # 0, or NaN where a similarity of the row is not finite
    for c_start in range(0, B, BLOCK_N):
        o_c = c_start + tl.arange(0, BLOCK_N)
        ok_c = o_c < B
        b_c = load_tile(p_a, o_c, ok_c, 0, D, BLOCK_D)
        s = inner_products(b_r, b_c, p_a, p_a, o_r, ok_m, o_c, ok_c, D, BLOCK_D, PRECISION)
        is_self = o_r[:, None] == o_c[None, :]
        others = ok_c[None, :] & (o_r[:, None] != o_c[None, :])
        m, sum_hard, sum_soft, _, _ = online_update(
            s, others, m, sum_hard, sum_soft, inv_tau * LOG2E, inv_t, HARD, SOFT, POWER
        )
        if SOFT:
            s_self += tl.sum(tl.where(is_self, s, 0.0), 1)
        if HARD:
            y_c = tl.load(CLASSES + o_c, mask=ok_c, other=0)
            positive = others & (y_r[:, None] == y_c[None, :])
            positives += tl.sum(tl.where(positive, s, 0.0), 1)
            poison += tl.sum(s * 0.0, 1)

    o_aa = i_a * (N + 1) * R + o_m
    if HARD:
        # vcl[r] = lse[r] - 1/|P(r)| sum_{c in P(r)} A[r, c]
        inv_count = tl.load(INV_COUNT + o_r, mask=ok_m, other=0.0)
        lse = log_partition(m, sum_hard, inv_tau)
        row = tl.where(inv_count > 0, lse - positives * inv_count * inv_tau + poison, 0.0)
        # In a row without a positive the anchor's own column counts in the derivatives, as 0 times
        # its similarity.
        tl.store(LSE + o_aa, lse + tl.where(inv_count > 0, 0.0, poison), mask=ok_m)
        tl.store(VCL + i_a * R + o_m, row, mask=ok_m)
    if SOFT:
        kl_lse, _ = log_partition_with_self(m, sum_soft, s_self, inv_tau, inv_t)
        tl.store(KL_LSE + o_aa, kl_lse, mask=ok_m)


@triton.jit
def _mcl_pair_fwd_kernel(
    NODES,  # [N, B, D]
    CLASSES,  # [B] int32
    PAIRS,  # [P, 2] int32, a < b
    INV_COUNT,  # [B]
    SOFT_VCL,  # [N, N, R], [a, b] and [b, a] written, as the next four
    ICL,
    SOFT_ICL,
    LSE,
    KL_LSE,  # the diagonal is read
    N,
    B,
    row_start,
    R,
    inv_tau,
    inv_t,
    t,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    POWER: tl.constexpr,
    HARD: tl.constexpr,  # icl wanted
    SOFT: tl.constexpr,  # soft_icl wanted
    SOFT_INTRA: tl.constexpr,  # soft_vcl wanted
    PRECISION: tl.constexpr,
):
    """Both directions of one node pair, one block of anchors.

    The four operand tiles (rows and columns of a and of b) serve up to four products: S_ab, S_ba
    for icl and soft_icl, A_a, A_b for soft_vcl.
    """
    i_m, i_p = tl.program_id(0), tl.program_id(1)
    i_a = tl.load(PAIRS + 2 * i_p).to(tl.int64)
    i_b = tl.load(PAIRS + 2 * i_p + 1).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ok_m = o_m < R
    o_r = row_start + o_m
    p_a = NODES + i_a * B * D
    p_b = NODES + i_b * B * D
    y_r = tl.load(CLASSES + o_r, mask=ok_m, other=0)
    b_ar = load_tile(p_a, o_r, ok_m, 0, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    b_br = load_tile(p_b, o_r, ok_m, 0, D, BLOCK_D)
    o_ab = (i_a * N + i_b) * R + o_m
    o_ba = (i_b * N + i_a) * R + o_m
    k = inv_tau * LOG2E

    zero = tl.zeros([BLOCK_M], tl.float32)
    if SOFT_INTRA:
        kl_a = tl.load(KL_LSE + i_a * (N + 1) * R + o_m, mask=ok_m, other=0.0)
        kl_b = tl.load(KL_LSE + i_b * (N + 1) * R + o_m, mask=ok_m, other=0.0)
        kl_ab = zero  # sum_c q_b (log q_b - log q_a)
        kl_ba = zero
    m_ab = zero + LOWEST
    m_ba = zero + LOWEST
    hard_ab = zero
    hard_ba = zero
    soft_ab = zero
    soft_ba = zero
    cross_ab = zero  # sum_c x_ba (S_ba - S_ab), x_ba the unnormalised q_ba
    cross_ba = zero
    s_self = zero
    positives_ab = zero
    positives_ba = zero
    poison_ab = zero  # 0, or NaN where a similarity of the row is not finite
    poison_ba = zero
    for c_start in range(0, B, BLOCK_N):
        o_c = c_start + tl.arange(0, BLOCK_N)
        ok_c = o_c < B
        b_ac = load_tile(p_a, o_c, ok_c, 0, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_bc = load_tile(p_b, o_c, ok_c, 0, D, BLOCK_D)
        if HARD or SOFT:
            s_ab = inner_products(b_ar, b_bc, p_a, p_b, o_r, ok_m, o_c, ok_c, D, BLOCK_D, PRECISION)
            s_ba = inner_products(b_br, b_ac, p_b, p_a, o_r, ok_m, o_c, ok_c, D, BLOCK_D, PRECISION)
            others = ok_c[None, :] & (o_r[:, None] != o_c[None, :])
            m_ab, hard_ab, soft_ab, decay_ab, x_ab = online_update(
                s_ab, others, m_ab, hard_ab, soft_ab, k, inv_t, HARD, SOFT, POWER
            )
            m_ba, hard_ba, soft_ba, decay_ba, x_ba = online_update(
                s_ba, others, m_ba, hard_ba, soft_ba, k, inv_t, HARD, SOFT, POWER
            )
            if SOFT:
                # The anchor's own column is missing from x, and adds 0: S_ab[r, r] = S_ba[r, r].
                gap = s_ab - s_ba
                cross_ab = cross_ab * decay_ba - tl.sum(x_ba * gap, 1)
                cross_ba = cross_ba * decay_ab + tl.sum(x_ab * gap, 1)
                is_self = o_r[:, None] == o_c[None, :]
                s_self += tl.sum(tl.where(is_self, s_ab, 0.0), 1)
            if HARD:
                y_c = tl.load(CLASSES + o_c, mask=ok_c, other=0)
                positive = others & (y_r[:, None] == y_c[None, :])
                positives_ab += tl.sum(tl.where(positive, s_ab, 0.0), 1)
                positives_ba += tl.sum(tl.where(positive, s_ba, 0.0), 1)
                poison_ab += tl.sum(s_ab * 0.0, 1)
                poison_ba += tl.sum(s_ba * 0.0, 1)
        if SOFT_INTRA:
            s_aa = inner_products(b_ar, b_ac, p_a, p_a, o_r, ok_m, o_c, ok_c, D, BLOCK_D, PRECISION)
            s_bb = inner_products(b_br, b_bc, p_b, p_b, o_r, ok_m, o_c, ok_c, D, BLOCK_D, PRECISION)
            # Adding q_a - q_b, which sums to 0, makes every summand non-negative and cancels the
            # rounding of kl_a and kl_b to first order. (kl >= 0: masked columns stay finite.)
            log_q_a = s_aa * (inv_tau * inv_t) - kl_a[:, None]
            log_q_b = s_bb * (inv_tau * inv_t) - kl_b[:, None]
            gap_q = log_q_b - log_q_a
            q_a = tl.exp2(log_q_a * LOG2E)
            q_b = tl.exp2(log_q_b * LOG2E)
            kl_ab += tl.sum(tl.where(ok_c[None, :], q_b * gap_q + (q_a - q_b), 0.0), 1)
            kl_ba -= tl.sum(tl.where(ok_c[None, :], q_a * gap_q + (q_a - q_b), 0.0), 1)

    if HARD:
        # icl[a, b, r] = lse_ab[r] - 1/|P(r)| sum_{c in P(r)} S_ab[r, c]
        inv_count = tl.load(INV_COUNT + o_r, mask=ok_m, other=0.0)
        lse_ab = log_partition(m_ab, hard_ab, inv_tau)
        lse_ba = log_partition(m_ba, hard_ba, inv_tau)
        mean = inv_count * inv_tau
        row_ab = tl.where(inv_count > 0, lse_ab - positives_ab * mean + poison_ab, 0.0)
        row_ba = tl.where(inv_count > 0, lse_ba - positives_ba * mean + poison_ba, 0.0)
        tl.store(LSE + o_ab, lse_ab + tl.where(inv_count > 0, 0.0, poison_ab), mask=ok_m)
        tl.store(LSE + o_ba, lse_ba + tl.where(inv_count > 0, 0.0, poison_ba), mask=ok_m)
        tl.store(ICL + o_ab, row_ab, mask=ok_m)
        tl.store(ICL + o_ba, row_ba, mask=ok_m)
    if SOFT:
        # soft_icl[a, b, r] = T sum_c q_ba (S_ba - S_ab) + T^2 (kl_lse_ab - kl_lse_ba)
        part_ab, norm_ab = log_partition_with_self(m_ab, soft_ab, s_self, inv_tau, inv_t)
        part_ba, norm_ba = log_partition_with_self(m_ba, soft_ba, s_self, inv_tau, inv_t)
        shift = t * t * (part_ab - part_ba)
        tl.store(KL_LSE + o_ab, part_ab, mask=ok_m)
        tl.store(KL_LSE + o_ba, part_ba, mask=ok_m)
        tl.store(SOFT_ICL + o_ab, t * inv_tau * cross_ab * norm_ba + shift, mask=ok_m)
        tl.store(SOFT_ICL + o_ba, t * inv_tau * cross_ba * norm_ab - shift, mask=ok_m)
    if SOFT_INTRA:
        # soft_vcl[a, b, r] = T^2 sum_c q_b (log q_b - log q_a)
        tl.store(SOFT_VCL + o_ab, t * t * kl_ab, mask=ok_m)
        tl.store(SOFT_VCL + o_ba, t * t * kl_ba, mask=ok_m)


def mcl_rows_forward(
    nodes: Tensor,
    labels: Tensor,
    networks: Sequence[int],
    temperature: float,
    kl_temperature: float,
    families: int,
    row_start: int,
    row_count: int,
    *,
    precision: str = "tf32",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows of the four families and their log-partitions, at most three launches.

    Args:
        nodes: [N, B, D] float32, bfloat16 or float16.
        labels: [B], integer class of each sample.
        networks: the network of each node.
        families: bits of the rows asked for, see ``families.py``; the others come back as 0.
        row_start, row_count: the anchors computed (R = row_count).
        precision: form of the float32 products: "tf32", "tf32x3" or "ieee".

    Returns:
        (vcl [N, R], soft_vcl [N, N, R], icl [N, N, R], soft_icl [N, N, R], lse [N, N, R],
        kl_lse [N, N, R]), float32.
    """
    _launch.check_inputs(nodes, precision)
    nodes, labels = nodes.contiguous(), labels.contiguous()
    n, batch, d = nodes.shape
    vcl = nodes.new_empty((n, row_count), dtype=torch.float32)
    soft_vcl, icl, soft_icl, lse, kl_lse = (
        nodes.new_empty((n, n, row_count), dtype=torch.float32) for _ in range(5)
    )
    outputs = (vcl, soft_vcl, icl, soft_icl, lse, kl_lse)
    if row_count == 0 or n == 0:
        return outputs
    pairs = _launch.pair_tables(networks, nodes.device)
    num_pairs = pairs.unordered.shape[0]
    classes = labels.new_empty(batch, dtype=torch.int32)
    inv_count = nodes.new_empty(batch, dtype=torch.float32)
    sizes = (n, batch, row_start, row_count)
    inv_tau, inv_t = 1.0 / temperature, 1.0 / kl_temperature
    power = _launch.integer_power(kl_temperature)

    _mcl_prepare_fwd_kernel[(triton.cdiv(batch, 64), n)](
        labels, classes, inv_count, *outputs, n, batch, row_count, BLOCK_M=64, BLOCK_N=64
    )
    soft_intra = bool(families & SOFT_VCL) and num_pairs > 0
    if families & VCL or soft_intra:
        tile = _launch.tiles("intra_fwd", d, nodes.dtype, precision)
        _mcl_intra_fwd_kernel[(triton.cdiv(row_count, tile.block_m), n)](
            nodes,
            classes,
            inv_count,
            vcl,
            lse,
            kl_lse,
            *sizes,
            inv_tau,
            inv_t,
            D=d,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_D=tile.block_d,
            POWER=power,
            HARD=bool(families & VCL),
            SOFT=soft_intra,
            PRECISION=precision,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    if families & (SOFT_VCL | ICL | SOFT_ICL) and num_pairs > 0:
        tile = _launch.tiles("pair_fwd", d, nodes.dtype, precision)
        _mcl_pair_fwd_kernel[(triton.cdiv(row_count, tile.block_m), num_pairs)](
            nodes,
            classes,
            pairs.unordered,
            inv_count,
            soft_vcl,
            icl,
            soft_icl,
            lse,
            kl_lse,
            *sizes,
            inv_tau,
            inv_t,
            kl_temperature,
            D=d,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_D=tile.block_d,
            POWER=power,
            HARD=bool(families & ICL),
            SOFT=bool(families & SOFT_ICL),
            SOFT_INTRA=soft_intra,
            PRECISION=precision,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return outputs
