"""Double backward of the in-batch losses: row inner products, then the gradient kernels again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mclfast.kernels import _launch
from mclfast.kernels._tl import LOG2E, NEVER, inner_products, load_tile
from mclfast.kernels.families import ICL, SOFT_ICL, SOFT_VCL, VCL
from mclfast.kernels.mcl_backward import mcl_gradient_kernels, mcl_prepare_bwd_kernel


@triton.jit
def _mcl_intra_rows_kernel(
    NODES,  # [N, B, D]
    V,  # [N, B, D]
    CLASSES,  # [B] int32
    INV_COUNT,  # [B]
    LSE,  # [N, N, B], the diagonal is read
    KL,  # [N, N, B], the diagonal is read
    MEAN_P,  # [N, N, B], diagonal written: <p_a, Ad_a>
    MEAN_Q,  # [N, N, B], diagonal written: <q_a, Ad_a>
    H_VCL,  # [N, R], written: <p_a - Y, Ad_a>
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
    HARD: tl.constexpr,
    SOFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Row inner products of one node with Ad_a = (V_a E_a^T + E_a V_a^T) / tau."""
    i_m, i_a = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_r = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ok_r = o_r < B
    p_a = NODES + i_a * B * D
    v_a = V + i_a * B * D
    at_aa = i_a * (N + 1) * B
    b_ar = load_tile(p_a, o_r, ok_r, 0, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    b_vr = load_tile(v_a, o_r, ok_r, 0, D, BLOCK_D)
    y_r = tl.load(CLASSES + o_r, mask=ok_r, other=0)
    lse_r = tl.load(LSE + at_aa + o_r, mask=ok_r, other=NEVER)
    kl_r = tl.load(KL + at_aa + o_r, mask=ok_r, other=NEVER)

    mean_p = tl.zeros([BLOCK_M], tl.float32)
    mean_q = tl.zeros([BLOCK_M], tl.float32)
    positives = tl.zeros([BLOCK_M], tl.float32)
    for c_start in range(0, B, BLOCK_N):
        o_c = c_start + tl.arange(0, BLOCK_N)
        ok_c = o_c < B
        b_ac = load_tile(p_a, o_c, ok_c, 0, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_vc = load_tile(v_a, o_c, ok_c, 0, D, BLOCK_D)
        s = inner_products(b_ar, b_ac, p_a, p_a, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION)
        sd = inner_products(b_vr, b_ac, v_a, p_a, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION)
        sd += inner_products(b_ar, b_vc, p_a, v_a, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION)
        if HARD:
            others = ok_c[None, :] & (o_r[:, None] != o_c[None, :])
            p = tl.where(others, tl.exp2((s * inv_tau - lse_r[:, None]) * LOG2E), 0.0)
            mean_p += tl.sum(p * sd, 1)
            y_c = tl.load(CLASSES + o_c, mask=ok_c, other=0)
            positive = others & (y_r[:, None] == y_c[None, :])
            positives += tl.sum(tl.where(positive, sd, 0.0), 1)
        if SOFT:
            q = tl.exp2((s * (inv_tau * inv_t) - kl_r[:, None]) * LOG2E)
            mean_q += tl.sum(tl.where(ok_c[None, :], q * sd, 0.0), 1)

    if HARD:
        inv_r = tl.load(INV_COUNT + o_r, mask=ok_r, other=0.0)
        o_m = o_r - row_start
        anchor = (o_m >= 0) & (o_m < R)
        tl.store(MEAN_P + at_aa + o_r, mean_p * inv_tau, mask=ok_r)
        row = (mean_p - positives * inv_r) * inv_tau
        tl.store(H_VCL + i_a * R + o_m, row, mask=anchor)
    if SOFT:
        tl.store(MEAN_Q + at_aa + o_r, mean_q * inv_tau, mask=ok_r)


@triton.jit
def _mcl_pair_rows_kernel(
    NODES,  # [N, B, D]
    V,  # [N, B, D]
    CLASSES,  # [B] int32
    PAIRS,  # [2P, 2] int32, ordered pairs
    INV_COUNT,  # [B]
    LSE,  # [N, N, B]
    KL,  # [N, N, B]
    MEAN_P,  # [N, N, B], written: <p_ab, Sd_ab>
    MEAN_Q,  # [N, N, B], written: <q_ab, Sd_ab>
    H_SOFT_VCL,  # [N, N, R], written: T <q_a - q_b, Ad_a>
    H_ICL,  # [N, N, R], written: <p_ab - Y, Sd_ab>
    H_SOFT_ICL,  # [N, N, R], written: T <q_ab - q_ba, Sd_ab>
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
    HARD: tl.constexpr,
    SOFT: tl.constexpr,
    SOFT_INTRA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Row products of one ordered pair with Ad_a and Sd_ab = (V_a E_b^T + E_a V_b^T) / tau."""
    i_m, i_p = tl.program_id(0), tl.program_id(1)
    i_a = tl.load(PAIRS + 2 * i_p).to(tl.int64)
    i_b = tl.load(PAIRS + 2 * i_p + 1).to(tl.int64)
    o_r = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ok_r = o_r < B
    p_a = NODES + i_a * B * D
    p_b = NODES + i_b * B * D
    v_a = V + i_a * B * D
    v_b = V + i_b * B * D
    at_ab = (i_a * N + i_b) * B
    at_ba = (i_b * N + i_a) * B
    b_ar = load_tile(p_a, o_r, ok_r, 0, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    b_br = load_tile(p_b, o_r, ok_r, 0, D, BLOCK_D)
    b_vr = load_tile(v_a, o_r, ok_r, 0, D, BLOCK_D)
    y_r = tl.load(CLASSES + o_r, mask=ok_r, other=0)
    inv_tau_t = inv_tau * inv_t

    zero = tl.zeros([BLOCK_M], tl.float32)
    if HARD:
        lse_r = tl.load(LSE + at_ab + o_r, mask=ok_r, other=NEVER)
        mean_p = zero
        positives = zero
    if SOFT:
        kl_ab_r = tl.load(KL + at_ab + o_r, mask=ok_r, other=NEVER)
        kl_ba_r = tl.load(KL + at_ba + o_r, mask=ok_r, other=NEVER)
        mean_q = zero
        cross = zero
    if SOFT_INTRA:
        kl_a_r = tl.load(KL + i_a * (N + 1) * B + o_r, mask=ok_r, other=NEVER)
        kl_b_r = tl.load(KL + i_b * (N + 1) * B + o_r, mask=ok_r, other=NEVER)
        intra = zero
    for c_start in range(0, B, BLOCK_N):
        o_c = c_start + tl.arange(0, BLOCK_N)
        ok_c = o_c < B
        b_ac = load_tile(p_a, o_c, ok_c, 0, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_bc = load_tile(p_b, o_c, ok_c, 0, D, BLOCK_D)
        if HARD or SOFT:
            b_vc = load_tile(v_b, o_c, ok_c, 0, D, BLOCK_D)
            s = inner_products(b_ar, b_bc, p_a, p_b, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION)
            sd = inner_products(b_vr, b_bc, v_a, p_b, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION)
            sd += inner_products(b_ar, b_vc, p_a, v_b, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION)
            if HARD:
                others = ok_c[None, :] & (o_r[:, None] != o_c[None, :])
                p = tl.where(others, tl.exp2((s * inv_tau - lse_r[:, None]) * LOG2E), 0.0)
                mean_p += tl.sum(p * sd, 1)
                y_c = tl.load(CLASSES + o_c, mask=ok_c, other=0)
                positive = others & (y_r[:, None] == y_c[None, :])
                positives += tl.sum(tl.where(positive, sd, 0.0), 1)
            if SOFT:
                s_t = inner_products(
                    b_br, b_ac, p_b, p_a, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION
                )
                q_ab = tl.exp2((s * inv_tau_t - kl_ab_r[:, None]) * LOG2E)
                q_ba = tl.exp2((s_t * inv_tau_t - kl_ba_r[:, None]) * LOG2E)
                mean_q += tl.sum(tl.where(ok_c[None, :], q_ab * sd, 0.0), 1)
                cross += tl.sum(tl.where(ok_c[None, :], (q_ab - q_ba) * sd, 0.0), 1)
        if SOFT_INTRA:
            b_wc = load_tile(v_a, o_c, ok_c, 0, D, BLOCK_D)
            s_a = inner_products(b_ar, b_ac, p_a, p_a, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION)
            s_b = inner_products(b_br, b_bc, p_b, p_b, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION)
            ad = inner_products(b_vr, b_ac, v_a, p_a, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION)
            ad += inner_products(b_ar, b_wc, p_a, v_a, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION)
            q_a = tl.exp2((s_a * inv_tau_t - kl_a_r[:, None]) * LOG2E)
            q_b = tl.exp2((s_b * inv_tau_t - kl_b_r[:, None]) * LOG2E)
            intra += tl.sum(tl.where(ok_c[None, :], (q_a - q_b) * ad, 0.0), 1)

    o_m = o_r - row_start
    anchor = (o_m >= 0) & (o_m < R)
    o_ab = (i_a * N + i_b) * R + o_m
    if HARD:
        inv_r = tl.load(INV_COUNT + o_r, mask=ok_r, other=0.0)
        tl.store(MEAN_P + at_ab + o_r, mean_p * inv_tau, mask=ok_r)
        tl.store(H_ICL + o_ab, (mean_p - positives * inv_r) * inv_tau, mask=anchor)
    if SOFT:
        tl.store(MEAN_Q + at_ab + o_r, mean_q * inv_tau, mask=ok_r)
        tl.store(H_SOFT_ICL + o_ab, cross * (t * inv_tau), mask=anchor)
    if SOFT_INTRA:
        tl.store(H_SOFT_VCL + o_ab, intra * (t * inv_tau), mask=anchor)


def mcl_rows_double_backward(
    v_nodes: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradient of <v_nodes, mcl_rows_backward(...)>, teachers held constant, at most six launches.

    Args:
        v_nodes: [N, B, D], cotangent of the gradient of the nodes.
        g_vcl to precision: arguments of ``mcl_rows_backward``.

    Returns:
        (h_nodes [N, B, D] in the dtype of ``nodes``, h_vcl [N, R], h_soft_vcl [N, N, R],
        h_icl [N, N, R], h_soft_icl [N, N, R]).
    """
    _launch.check_inputs(nodes, precision)
    dtype = nodes.dtype
    if v_nodes.dtype != dtype:
        # A float32 cotangent may be scaled beyond half precision.
        v_nodes, nodes = v_nodes.float(), nodes.float()
    nodes, labels = nodes.contiguous(), labels.contiguous()
    v_nodes = v_nodes.contiguous()
    n, batch, d = nodes.shape
    h_vcl = lse.new_zeros((n, row_count))
    h_soft_vcl, h_icl, h_soft_icl = (lse.new_zeros((n, n, row_count)) for _ in range(3))
    if nodes.numel() == 0 or row_count == 0:
        return torch.zeros_like(nodes, dtype=dtype), h_vcl, h_soft_vcl, h_icl, h_soft_icl
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
    mean_p, mean_q = lse.new_empty((2, n, n, batch)).unbind(0)
    pairs = _launch.pair_tables(networks, nodes.device)
    num_pairs = pairs.ordered.shape[0]
    sizes = (n, batch, row_start, row_count, 1.0 / temperature, 1.0 / kl_temperature)
    soft_intra = bool(families & SOFT_VCL) and num_pairs > 0
    if families & VCL or soft_intra:
        tile = _launch.tiles("intra_rows", d, nodes.dtype, precision)
        _mcl_intra_rows_kernel[(triton.cdiv(batch, tile.block_m), n)](
            nodes,
            v_nodes,
            coefficients.classes,
            coefficients.inv_count,
            coefficients.lse,
            coefficients.kl,
            mean_p,
            mean_q,
            h_vcl,
            *sizes,
            D=d,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_D=tile.block_d,
            HARD=bool(families & VCL),
            SOFT=soft_intra,
            PRECISION=precision,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    if families & (SOFT_VCL | ICL | SOFT_ICL) and num_pairs > 0:
        tile = _launch.tiles("pair_rows", d, nodes.dtype, precision)
        _mcl_pair_rows_kernel[(triton.cdiv(batch, tile.block_m), num_pairs)](
            nodes,
            v_nodes,
            coefficients.classes,
            pairs.ordered,
            coefficients.inv_count,
            coefficients.lse,
            coefficients.kl,
            mean_p,
            mean_q,
            h_soft_vcl,
            h_icl,
            h_soft_icl,
            *sizes,
            kl_temperature,
            D=d,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_D=tile.block_d,
            HARD=bool(families & ICL),
            SOFT=bool(families & SOFT_ICL),
            SOFT_INTRA=soft_intra,
            PRECISION=precision,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    h_nodes = mcl_gradient_kernels(
        coefficients,
        nodes,
        networks,
        temperature,
        kl_temperature,
        families,
        precision,
        v_nodes,
        mean_p,
        mean_q,
    )
    return h_nodes.to(dtype), h_vcl, h_soft_vcl, h_icl, h_soft_icl
