"""Backward of the in-batch losses: every program owns rows of one node's gradient.

The same kernels serve the double backward (``SECOND``), where the logit gradient H meets the
direction V instead of E and its derivative K meets E.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mclfast.kernels import _launch
from mclfast.kernels._reduce import sum_parts_kernel
from mclfast.kernels._tl import (
    LOG2E,
    NEVER,
    accumulate,
    classes_and_positives,
    inner_products,
    load_tile,
    output_tile,
)
from mclfast.kernels.families import ICL, SOFT_ICL, SOFT_VCL, VCL


@triton.jit
def _mcl_prepare_bwd_kernel(
    LABELS,  # [B] int64
    G_VCL,  # [N, R], any strides, as the next three
    G_SOFT_VCL,  # [N, N, R]
    G_ICL,  # [N, N, R]
    G_SOFT_ICL,  # [N, N, R]
    LSE,  # [N, N, R]
    KL_LSE,  # [N, N, R]
    CLASSES,  # [B] int32, written: first sample of the same class
    INV_COUNT,  # [B], written: 1 / number of positives, 0 without any
    HARD,  # [N, N, B], written: g_icl, diagonal g_vcl; 0 if no anchor, 0 or NaN without a positive
    TARGET,  # [N, N, B], written: HARD / number of positives
    SOFT_INTRA,  # [N, N, B], written: T g_soft_vcl
    SOFT,  # [N, N, B], written: T g_soft_icl
    LSE_ALL,  # [N, N, B], written: lse; NEVER where HARD is 0 for want of a positive
    KL_ALL,  # [N, N, B], written: kl_lse; NEVER if no anchor
    s_va,
    s_vr,
    s_sa,
    s_sb,
    s_sr,
    s_ia,
    s_ib,
    s_ir,
    s_ja,
    s_jb,
    s_jr,
    N,
    B,
    row_start,
    R,
    t,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Coefficients of every row, spread over all B rows so that the kernels need no anchor test."""
    i_m, i_a = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_r = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ok_r = o_r < B
    first, inv_count = classes_and_positives(LABELS, o_r, ok_r, B, BLOCK_M, BLOCK_N)
    if i_a == 0:
        tl.store(CLASSES + o_r, first, mask=ok_r)
        tl.store(INV_COUNT + o_r, inv_count, mask=ok_r)

    o_m = (o_r - row_start).to(tl.int64)
    anchor = (o_m >= 0) & (o_m < R)
    usable = anchor & (inv_count > 0)
    for i_b in range(0, N):
        o_in = (i_a * N + i_b) * R + o_m
        o_out = (i_a * N + i_b) * B + o_r
        if i_b == i_a:
            hard = tl.load(G_VCL + i_a * s_va + o_m * s_vr, mask=usable, other=0.0)
        else:
            hard = tl.load(G_ICL + i_a * s_ia + i_b * s_ib + o_m * s_ir, mask=usable, other=0.0)
        soft_intra = tl.load(
            G_SOFT_VCL + i_a * s_sa + i_b * s_sb + o_m * s_sr, mask=anchor, other=0.0
        )
        soft = tl.load(G_SOFT_ICL + i_a * s_ja + i_b * s_jb + o_m * s_jr, mask=anchor, other=0.0)
        lse = tl.load(LSE + o_in, mask=anchor, other=0.0)
        # An anchor without a positive has the cotangent 0, which NaN in its row survives.
        hard += tl.where(usable, 0.0, lse * 0.0)
        kl_lse = tl.load(KL_LSE + o_in, mask=anchor, other=0.0)
        tl.store(HARD + o_out, hard, mask=ok_r)
        tl.store(TARGET + o_out, hard * inv_count, mask=ok_r)
        tl.store(SOFT_INTRA + o_out, soft_intra * t, mask=ok_r)
        tl.store(SOFT + o_out, soft * t, mask=ok_r)
        tl.store(LSE_ALL + o_out, tl.where(usable, lse, NEVER), mask=ok_r)
        tl.store(KL_ALL + o_out, tl.where(anchor, kl_lse, NEVER), mask=ok_r)


@triton.jit
def _mcl_cross_bwd_kernel(
    NODES,  # [N, B, D]
    V,  # [N, B, D] direction of the double backward, else not read
    CLASSES,  # [B] int32
    FIRST,  # [N + 1] int32
    PARTNER,  # int32, partners of node a at FIRST[a] .. FIRST[a + 1]
    HARD,  # [N, N, B], as the next four
    TARGET,
    SOFT,
    LSE,
    KL,
    MEAN_P,  # [N, N, B] <p_ab, Sd_ab>, not read unless SECOND, as the next
    MEAN_Q,  # [N, N, B] <q_ab, Sd_ab>
    OUT,  # [slots, N, B, D], this kernel's first slot
    N,
    B,
    columns_per_part,
    inv_tau,
    inv_t,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    ICL: tl.constexpr,
    SOFT_ICL: tl.constexpr,
    SECOND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """1/tau sum_b H_ab E_b for one block of rows of node a, H_ab = D_ab + D_ba^T.

    The transposed term needs column r of S_ba, which is row r of S_ab: no scatter, no atomics.
    """
    i_m, i_a = tl.program_id(0), tl.program_id(1).to(tl.int64)
    NUM_D: tl.constexpr = (D + BLOCK_OUT - 1) // BLOCK_OUT
    i_part = tl.program_id(2) // NUM_D
    d_out = (tl.program_id(2) % NUM_D) * BLOCK_OUT
    o_r = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ok_r = o_r < B
    p_a = NODES + i_a * B * D
    v_a = V + i_a * B * D
    b_ar = load_tile(p_a, o_r, ok_r, 0, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    if SECOND:
        b_vr = load_tile(v_a, o_r, ok_r, 0, D, BLOCK_D)
    y_r = tl.load(CLASSES + o_r, mask=ok_r, other=0)
    inv_tau_t = inv_tau * inv_t
    c_first = i_part * columns_per_part
    c_last = tl.minimum(c_first + columns_per_part, B)

    acc = tl.zeros([BLOCK_M, BLOCK_OUT], tl.float32)
    for i_t in range(tl.load(FIRST + i_a), tl.load(FIRST + i_a + 1)):
        i_b = tl.load(PARTNER + i_t).to(tl.int64)
        p_b = NODES + i_b * B * D
        v_b = V + i_b * B * D
        at_ab = (i_a * N + i_b) * B
        at_ba = (i_b * N + i_a) * B
        if ICL:
            hard_r = tl.load(HARD + at_ab + o_r, mask=ok_r, other=0.0)
            target_r = tl.load(TARGET + at_ab + o_r, mask=ok_r, other=0.0)
            lse_r = tl.load(LSE + at_ab + o_r, mask=ok_r, other=NEVER)
            if SECOND:
                mean_p_r = tl.load(MEAN_P + at_ab + o_r, mask=ok_r, other=0.0)
        if SOFT_ICL:
            b_br = load_tile(p_b, o_r, ok_r, 0, D, BLOCK_D)
            soft_r = tl.load(SOFT + at_ab + o_r, mask=ok_r, other=0.0)
            kl_ab_r = tl.load(KL + at_ab + o_r, mask=ok_r, other=NEVER)
            kl_ba_r = tl.load(KL + at_ba + o_r, mask=ok_r, other=NEVER)
            if SECOND:
                mean_q_r = tl.load(MEAN_Q + at_ab + o_r, mask=ok_r, other=0.0)
        for c_start in range(c_first, c_last, BLOCK_N):
            o_c = c_start + tl.arange(0, BLOCK_N)
            ok_c = o_c < B
            b_bc = load_tile(p_b, o_c, ok_c, 0, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            s = inner_products(b_ar, b_bc, p_a, p_b, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION)
            h = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if SECOND:
                # Sd_ab = (V_a E_b^T + E_a V_b^T) / tau
                b_vc = load_tile(v_b, o_c, ok_c, 0, D, BLOCK_D)
                sd = inner_products(
                    b_vr, b_bc, v_a, p_b, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION
                )
                sd += inner_products(
                    b_ar, b_vc, p_a, v_b, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION
                )
                sd *= inv_tau
                h_second = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if ICL:
                # D_ab[r, c] = g[a, b, r] (p_ab - Y)[r, c], and D_ba[c, r] likewise
                hard_c = tl.load(HARD + at_ba + o_c, mask=ok_c, other=0.0)
                lse_c = tl.load(LSE + at_ba + o_c, mask=ok_c, other=NEVER)
                target_c = tl.load(TARGET + at_ba + o_c, mask=ok_c, other=0.0)
                y_c = tl.load(CLASSES + o_c, mask=ok_c, other=0)
                others = o_r[:, None] != o_c[None, :]
                same = y_r[:, None] == y_c[None, :]
                p_r = hard_r[:, None] * tl.exp2((s * inv_tau - lse_r[:, None]) * LOG2E)
                p_c = hard_c[None, :] * tl.exp2((s * inv_tau - lse_c[None, :]) * LOG2E)
                target = target_r[:, None] + target_c[None, :]
                # The anchor's own column: 0, or NaN for a cotangent that is NaN.
                own = (hard_r - hard_r)[:, None] + (hard_c - hard_c)[None, :]
                h += tl.where(others, p_r + p_c - tl.where(same, target, 0.0), own)
                if SECOND:
                    mean_p_c = tl.load(MEAN_P + at_ba + o_c, mask=ok_c, other=0.0)
                    moved = p_r * (sd - mean_p_r[:, None]) + p_c * (sd - mean_p_c[None, :])
                    h_second += tl.where(others, moved, 0.0)
            if SOFT_ICL:
                # D_ab[r, c] = T g[a, b, r] (q_ab - q_ba)[r, c], and D_ba[c, r] likewise
                b_ac = load_tile(p_a, o_c, ok_c, 0, D, BLOCK_D)
                s_t = inner_products(
                    b_br, b_ac, p_b, p_a, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION
                )
                soft_c = tl.load(SOFT + at_ba + o_c, mask=ok_c, other=0.0)
                kl_ab_c = tl.load(KL + at_ab + o_c, mask=ok_c, other=NEVER)
                kl_ba_c = tl.load(KL + at_ba + o_c, mask=ok_c, other=NEVER)
                q_r = tl.exp2((s * inv_tau_t - kl_ab_r[:, None]) * LOG2E)
                q_c = tl.exp2((s * inv_tau_t - kl_ba_c[None, :]) * LOG2E)
                h += soft_r[:, None] * (q_r - tl.exp2((s_t * inv_tau_t - kl_ba_r[:, None]) * LOG2E))
                h += soft_c[None, :] * (q_c - tl.exp2((s_t * inv_tau_t - kl_ab_c[None, :]) * LOG2E))
                if SECOND:
                    # q_ab o (Sd_ab - <q_ab, Sd_ab>); the teacher does not move
                    mean_q_c = tl.load(MEAN_Q + at_ba + o_c, mask=ok_c, other=0.0)
                    h_second += (inv_t * soft_r)[:, None] * q_r * (sd - mean_q_r[:, None])
                    h_second += (inv_t * soft_c)[None, :] * q_c * (sd - mean_q_c[None, :])
            h = tl.where(ok_c[None, :], h, 0.0)
            b_out = output_tile(b_bc, p_b, o_c, ok_c, d_out, D, BLOCK_D, BLOCK_OUT)
            if SECOND:
                h_second = tl.where(ok_c[None, :], h_second, 0.0)
                acc = accumulate(acc, h_second, b_out, PRECISION)
                b_v = output_tile(b_vc, v_b, o_c, ok_c, d_out, D, BLOCK_D, BLOCK_OUT)
                acc = accumulate(acc, h, b_v, PRECISION)
            else:
                acc = accumulate(acc, h, b_out, PRECISION)

    o_d = d_out + tl.arange(0, BLOCK_OUT)
    o_row = (i_part * N + i_a) * B + o_r
    p_out = OUT + o_row[:, None] * D + o_d[None, :]
    tl.store(
        p_out, (acc * inv_tau).to(OUT.dtype.element_ty), mask=ok_r[:, None] & (o_d < D)[None, :]
    )


@triton.jit
def _mcl_intra_bwd_kernel(
    NODES,  # [N, B, D]
    V,  # [N, B, D] direction of the double backward, else not read
    CLASSES,  # [B] int32
    FIRST,  # [N + 1] int32
    PARTNER,  # int32, partners of node a at FIRST[a] .. FIRST[a + 1]
    HARD,  # [N, N, B], the diagonal is read
    TARGET,  # [N, N, B], the diagonal is read
    SOFT_INTRA,  # [N, N, B]
    LSE,  # [N, N, B], the diagonal is read, as for the next three
    KL,
    MEAN_P,  # <p_a, Ad_a>, not read unless SECOND, as the next
    MEAN_Q,  # <q_a, Ad_a>
    OUT,  # [slots, N, B, D], this kernel's first slot
    N,
    B,
    columns_per_part,
    inv_tau,
    inv_t,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    VCL: tl.constexpr,
    SOFT_VCL: tl.constexpr,
    SECOND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """1/tau (D_a + D_a^T) E_a for one block of rows of node a.

    A_a is symmetric, so D_a[c, r] comes from the tile at (r, c) and the statistics of c.
    """
    i_m, i_a = tl.program_id(0), tl.program_id(1).to(tl.int64)
    NUM_D: tl.constexpr = (D + BLOCK_OUT - 1) // BLOCK_OUT
    i_part = tl.program_id(2) // NUM_D
    d_out = (tl.program_id(2) % NUM_D) * BLOCK_OUT
    o_r = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ok_r = o_r < B
    p_a = NODES + i_a * B * D
    v_a = V + i_a * B * D
    at_aa = i_a * (N + 1) * B
    b_ar = load_tile(p_a, o_r, ok_r, 0, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    if SECOND:
        b_vr = load_tile(v_a, o_r, ok_r, 0, D, BLOCK_D)
    inv_tau_t = inv_tau * inv_t
    c_first = i_part * columns_per_part
    c_last = tl.minimum(c_first + columns_per_part, B)

    acc = tl.zeros([BLOCK_M, BLOCK_OUT], tl.float32)
    if VCL:
        y_r = tl.load(CLASSES + o_r, mask=ok_r, other=0)
        target_r = tl.load(TARGET + at_aa + o_r, mask=ok_r, other=0.0)
        hard_r = tl.load(HARD + at_aa + o_r, mask=ok_r, other=0.0)
        lse_r = tl.load(LSE + at_aa + o_r, mask=ok_r, other=NEVER)
        if SECOND:
            mean_p_r = tl.load(MEAN_P + at_aa + o_r, mask=ok_r, other=0.0)
        for c_start in range(c_first, c_last, BLOCK_N):
            o_c = c_start + tl.arange(0, BLOCK_N)
            ok_c = o_c < B
            b_ac = load_tile(p_a, o_c, ok_c, 0, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            s = inner_products(b_ar, b_ac, p_a, p_a, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION)
            y_c = tl.load(CLASSES + o_c, mask=ok_c, other=0)
            target_c = tl.load(TARGET + at_aa + o_c, mask=ok_c, other=0.0)
            hard_c = tl.load(HARD + at_aa + o_c, mask=ok_c, other=0.0)
            lse_c = tl.load(LSE + at_aa + o_c, mask=ok_c, other=NEVER)
            # D_a[r, c] = g[a, r] (p_a - Y)[r, c]
            others = ok_c[None, :] & (o_r[:, None] != o_c[None, :])
            same = y_r[:, None] == y_c[None, :]
            p_r = hard_r[:, None] * tl.exp2((s * inv_tau - lse_r[:, None]) * LOG2E)
            p_c = hard_c[None, :] * tl.exp2((s * inv_tau - lse_c[None, :]) * LOG2E)
            target = target_r[:, None] + target_c[None, :]
            # The anchor's own column: 0, or NaN for a cotangent that is NaN.
            own = (hard_r - hard_r)[:, None] + (hard_c - hard_c)[None, :]
            h = tl.where(others, p_r + p_c - tl.where(same, target, 0.0), own)
            b_out = output_tile(b_ac, p_a, o_c, ok_c, d_out, D, BLOCK_D, BLOCK_OUT)
            if SECOND:
                # Ad_a = (V_a E_a^T + E_a V_a^T) / tau
                b_vc = load_tile(v_a, o_c, ok_c, 0, D, BLOCK_D)
                sd = inner_products(
                    b_vr, b_ac, v_a, p_a, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION
                )
                sd += inner_products(
                    b_ar, b_vc, p_a, v_a, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION
                )
                sd *= inv_tau
                mean_p_c = tl.load(MEAN_P + at_aa + o_c, mask=ok_c, other=0.0)
                moved = p_r * (sd - mean_p_r[:, None]) + p_c * (sd - mean_p_c[None, :])
                acc = accumulate(acc, tl.where(others, moved, 0.0), b_out, PRECISION)
                b_v = output_tile(b_vc, v_a, o_c, ok_c, d_out, D, BLOCK_D, BLOCK_OUT)
                acc = accumulate(acc, h, b_v, PRECISION)
            else:
                acc = accumulate(acc, h, b_out, PRECISION)
    if SOFT_VCL:
        kl_a_r = tl.load(KL + at_aa + o_r, mask=ok_r, other=NEVER)
        if SECOND:
            mean_q_r = tl.load(MEAN_Q + at_aa + o_r, mask=ok_r, other=0.0)
        for i_t in range(tl.load(FIRST + i_a), tl.load(FIRST + i_a + 1)):
            i_b = tl.load(PARTNER + i_t).to(tl.int64)
            p_b = NODES + i_b * B * D
            at_ab = (i_a * N + i_b) * B
            at_bb = i_b * (N + 1) * B
            b_br = load_tile(p_b, o_r, ok_r, 0, D, BLOCK_D)
            soft_r = tl.load(SOFT_INTRA + at_ab + o_r, mask=ok_r, other=0.0)
            kl_b_r = tl.load(KL + at_bb + o_r, mask=ok_r, other=NEVER)
            for c_start in range(c_first, c_last, BLOCK_N):
                o_c = c_start + tl.arange(0, BLOCK_N)
                ok_c = o_c < B
                b_ac = load_tile(p_a, o_c, ok_c, 0, D, BLOCK_D)
                b_bc = load_tile(p_b, o_c, ok_c, 0, D, BLOCK_D)
                s_a = inner_products(
                    b_ar, b_ac, p_a, p_a, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION
                )
                s_b = inner_products(
                    b_br, b_bc, p_b, p_b, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION
                )
                soft_c = tl.load(SOFT_INTRA + at_ab + o_c, mask=ok_c, other=0.0)
                kl_a_c = tl.load(KL + at_aa + o_c, mask=ok_c, other=NEVER)
                kl_b_c = tl.load(KL + at_bb + o_c, mask=ok_c, other=NEVER)
                # D_a[r, c] = T g[a, b, r] (q_a - q_b)[r, c]. A_a is computed anew for each b so
                # that the difference is taken in float32, before rounding for the product with E.
                q_r = tl.exp2((s_a * inv_tau_t - kl_a_r[:, None]) * LOG2E)
                q_c = tl.exp2((s_a * inv_tau_t - kl_a_c[None, :]) * LOG2E)
                h = soft_r[:, None] * (q_r - tl.exp2((s_b * inv_tau_t - kl_b_r[:, None]) * LOG2E))
                h += soft_c[None, :] * (q_c - tl.exp2((s_b * inv_tau_t - kl_b_c[None, :]) * LOG2E))
                h = tl.where(ok_c[None, :], h, 0.0)
                b_out = output_tile(b_ac, p_a, o_c, ok_c, d_out, D, BLOCK_D, BLOCK_OUT)
                if SECOND:
                    b_vc = load_tile(v_a, o_c, ok_c, 0, D, BLOCK_D)
                    sd = inner_products(
                        b_vr, b_ac, v_a, p_a, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION
                    )
                    sd += inner_products(
                        b_ar, b_vc, p_a, v_a, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION
                    )
                    sd *= inv_tau
                    mean_q_c = tl.load(MEAN_Q + at_aa + o_c, mask=ok_c, other=0.0)
                    moved = (inv_t * soft_r)[:, None] * q_r * (sd - mean_q_r[:, None])
                    moved += (inv_t * soft_c)[None, :] * q_c * (sd - mean_q_c[None, :])
                    moved = tl.where(ok_c[None, :], moved, 0.0)
                    acc = accumulate(acc, moved, b_out, PRECISION)
                    b_v = output_tile(b_vc, v_a, o_c, ok_c, d_out, D, BLOCK_D, BLOCK_OUT)
                    acc = accumulate(acc, h, b_v, PRECISION)
                else:
                    acc = accumulate(acc, h, b_out, PRECISION)

    o_d = d_out + tl.arange(0, BLOCK_OUT)
    o_row = (i_part * N + i_a) * B + o_r
    p_out = OUT + o_row[:, None] * D + o_d[None, :]
    tl.store(
        p_out, (acc * inv_tau).to(OUT.dtype.element_ty), mask=ok_r[:, None] & (o_d < D)[None, :]
    )


class Coefficients(NamedTuple):
    """The tensors that ``_mcl_prepare_bwd_kernel`` writes."""

    classes: Tensor  # [B] int32
    inv_count: Tensor  # [B]
    hard: Tensor  # [N, N, B]
    target: Tensor  # [N, N, B]
    soft_intra: Tensor  # [N, N, B]
    soft: Tensor  # [N, N, B]
    lse: Tensor  # [N, N, B]
    kl: Tensor  # [N, N, B]


def mcl_prepare_bwd_kernel(
    g_vcl: Tensor,
    g_soft_vcl: Tensor,
    g_icl: Tensor,
    g_soft_icl: Tensor,
    labels: Tensor,
    lse: Tensor,
    kl_lse: Tensor,
    kl_temperature: float,
    row_start: int,
    row_count: int,
) -> Coefficients:
    """Row coefficients of the backward kernels, one launch. Cotangents [N, R] or [N, N, R]."""
    n, batch = lse.shape[0], labels.shape[0]
    classes = labels.new_empty(batch, dtype=torch.int32)
    inv_count = lse.new_empty(batch)
    packed = lse.new_empty((6, n, n, batch)).unbind(0)
    _mcl_prepare_bwd_kernel[(triton.cdiv(batch, 64), n)](
        labels,
        g_vcl,
        g_soft_vcl,
        g_icl,
        g_soft_icl,
        lse,
        kl_lse,
        classes,
        inv_count,
        *packed,
        *g_vcl.stride(),
        *g_soft_vcl.stride(),
        *g_icl.stride(),
        *g_soft_icl.stride(),
        n,
        batch,
        row_start,
        row_count,
        kl_temperature,
        BLOCK_M=64,
        BLOCK_N=64,
    )
    return Coefficients(classes, inv_count, *packed)


def mcl_gradient_kernels(
    coefficients: Coefficients,
    nodes: Tensor,
    networks: Sequence[int],
    temperature: float,
    kl_temperature: float,
    families: int,
    precision: str,
    v_nodes: Tensor | None = None,
    mean_p: Tensor | None = None,
    mean_q: Tensor | None = None,
    grad_dtype: torch.dtype | None = None,
) -> Tensor:
    """grad_nodes [N, B, D], or h_nodes if v_nodes and the means [N, N, B] are given.

    Its dtype is ``grad_dtype``, that of the nodes by default.
    """
    n, batch, d = nodes.shape
    second = v_nodes is not None
    suffix = "double" if second else "bwd"
    pairs = _launch.pair_tables(networks, nodes.device)
    has_pairs = pairs.partner.shape[0] > 0
    flags = {
        "VCL": bool(families & VCL),
        "SOFT_VCL": bool(families & SOFT_VCL) and has_pairs,
        "ICL": bool(families & ICL) and has_pairs,
        "SOFT_ICL": bool(families & SOFT_ICL) and has_pairs,
    }
    plan = []
    for kernel, soft, name, used in (
        (_mcl_intra_bwd_kernel, coefficients.soft_intra, "intra", ("VCL", "SOFT_VCL")),
        (_mcl_cross_bwd_kernel, coefficients.soft, "cross", ("ICL", "SOFT_ICL")),
    ):
        if any(flags[flag] for flag in used):
            tile = _launch.tiles(f"{name}_{suffix}", d, nodes.dtype, precision)
            grid = (triton.cdiv(batch, tile.block_m), n, triton.cdiv(d, tile.block_out))
            parts, columns = _launch.column_splits(grid[0] * grid[1] * grid[2], batch, tile.block_n)
            plan.append((kernel, soft, used, tile, grid, parts, columns))

    slots = sum(step[5] for step in plan)
    if slots == 0:
        return torch.zeros_like(nodes, dtype=grad_dtype)
    grad = torch.empty_like(nodes, dtype=grad_dtype)
    out = grad[None] if slots == 1 else nodes.new_empty((slots, n, batch, d), dtype=torch.float32)
    slot = 0
    for kernel, soft, used, tile, grid, parts, columns in plan:
        kernel[(grid[0], grid[1], grid[2] * parts)](
            nodes,
            nodes if v_nodes is None else v_nodes,
            coefficients.classes,
            pairs.first,
            pairs.partner,
            coefficients.hard,
            coefficients.target,
            soft,
            coefficients.lse,
            coefficients.kl,
            coefficients.hard if mean_p is None else mean_p,
            coefficients.hard if mean_q is None else mean_q,
            out[slot],
            n,
            batch,
            columns,
            1.0 / temperature,
            1.0 / kl_temperature,
            D=d,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_D=tile.block_d,
            BLOCK_OUT=tile.block_out,
            **{flag: flags[flag] for flag in used},
            SECOND=second,
            PRECISION=precision,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        slot += parts
    if slots > 1:
        sum_parts_kernel(out, grad)
    return grad


def mcl_rows_backward(
    g_vcl: Tensor,
    g_soft_vcl: Tensor,
    g_icl: Tensor,
    g_soft_icl: Tensor,
    nodes: Tensor,
    labels: Tensor,
    networks: Sequence[int],
    lse: Tensor,
    kl_lse: Tensor,
    temperature: float,
    kl_temperature: float,
    families: int,
    row_start: int,
    row_count: int,
    *,
    precision: str = "tf32",
    grad_dtype: torch.dtype | None = None,
) -> Tensor:
    """Gradient of ``mcl_rows_forward`` with respect to the nodes, at most four launches.

    Args:
        g_vcl: [N, R] cotangent; g_soft_vcl, g_icl, g_soft_icl: [N, N, R]; any strides.
            Cotangents of families not asked for are ignored.
        lse, kl_lse: log-partitions [N, N, R] that the forward returned.
        grad_dtype: dtype of the gradient; that of ``nodes`` by default.

    Returns:
        [N, B, D] in ``grad_dtype``.
    """
    _launch.check_inputs(nodes, precision)
    nodes, labels = nodes.contiguous(), labels.contiguous()
    if nodes.numel() == 0 or row_count == 0:
        return torch.zeros_like(nodes, dtype=grad_dtype)
    coefficients = mcl_prepare_bwd_kernel(
        g_vcl,
        g_soft_vcl,
        g_icl,
        g_soft_icl,
        labels,
        lse.contiguous(),
        kl_lse.contiguous(),
        kl_temperature,
        row_start,
        row_count,
    )
    return mcl_gradient_kernels(
        coefficients,
        nodes,
        networks,
        temperature,
        kl_temperature,
        families,
        precision,
        grad_dtype=grad_dtype,
    )
