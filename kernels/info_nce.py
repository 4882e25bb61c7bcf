"""Symmetric InfoNCE between two sets of embeddings: forward, backward and double backward.

S = a b^T / temperature. Side 0 owns rows of a, side 1 rows of b; side 1 sees S^T.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mclfast.kernels import _launch
from mclfast.kernels._reduce import sum_parts_kernel
from mclfast.kernels._tl import (
    LN2,
    LOG2E,
    LOWEST,
    NEVER,
    accumulate,
    inner_products,
    load_tile,
    output_tile,
)


@triton.jit
def _info_nce_fwd_kernel(
    X,  # [B, D], a
    Y,  # [B, D], b
    ROW_LSE,  # [B], written
    COL_LSE,  # [B], written
    DIAGONAL,  # [B], written
    B,
    inv_tau,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Log-partitions of the rows of S (side 0) or of its columns (side 1)."""
    i_m, side = tl.program_id(0), tl.program_id(1)
    if side == 0:
        p_x, p_y, p_lse = X, Y, ROW_LSE
    else:
        p_x, p_y, p_lse = Y, X, COL_LSE
    o_r = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ok_r = o_r < B
    b_x = load_tile(p_x, o_r, ok_r, 0, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    m = tl.zeros([BLOCK_M], tl.float32) + LOWEST
    total = tl.zeros([BLOCK_M], tl.float32)
    diagonal = tl.zeros([BLOCK_M], tl.float32)
    for c_start in range(0, B, BLOCK_N):
        o_c = c_start + tl.arange(0, BLOCK_N)
        ok_c = o_c < B
        b_y = load_tile(p_y, o_c, ok_c, 0, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        s = inner_products(b_x, b_y, p_x, p_y, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION)
        s = tl.where(ok_c[None, :], s, LOWEST)
        m_new = tl.maximum(m, tl.max(s, 1))
        x = tl.exp2((s - m_new[:, None]) * (inv_tau * LOG2E))
        x = tl.where(ok_c[None, :], x, 0.0)  # not 0 by itself beside logits that are all -inf
        total = total * tl.exp2((m - m_new) * (inv_tau * LOG2E)) + tl.sum(x, 1)
        m = m_new
        diagonal += tl.sum(tl.where(o_r[:, None] == o_c[None, :], s, 0.0), 1)
    tl.store(p_lse + o_r, m * inv_tau + tl.log2(total) * LN2, mask=ok_r)
    if side == 0:
        tl.store(DIAGONAL + o_r, diagonal * inv_tau, mask=ok_r)


@triton.jit
def _info_nce_rows_kernel(
    X,  # [B, D], a
    Y,  # [B, D], b
    VX,  # [B, D]
    VY,  # [B, D]
    ROW_LSE,  # [B]
    COL_LSE,  # [B]
    H_ROW,  # [B], written: <P, Sd> by rows
    H_COL,  # [B], written: <Q, Sd> by columns
    H_DIAG,  # [B], written: diagonal of Sd
    B,
    inv_tau,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Inner products of both softmaxes with Sd = (V_a b^T + a V_b^T) / tau."""
    i_m, side = tl.program_id(0), tl.program_id(1)
    if side == 0:
        p_x, p_y, v_x, v_y, p_lse, p_h = X, Y, VX, VY, ROW_LSE, H_ROW
    else:
        p_x, p_y, v_x, v_y, p_lse, p_h = Y, X, VY, VX, COL_LSE, H_COL
    o_r = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ok_r = o_r < B
    b_x = load_tile(p_x, o_r, ok_r, 0, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    b_vx = load_tile(v_x, o_r, ok_r, 0, D, BLOCK_D)
    lse_r = tl.load(p_lse + o_r, mask=ok_r, other=NEVER)
    mean = tl.zeros([BLOCK_M], tl.float32)
    diagonal = tl.zeros([BLOCK_M], tl.float32)
    for c_start in range(0, B, BLOCK_N):
        o_c = c_start + tl.arange(0, BLOCK_N)
        ok_c = o_c < B
        b_y = load_tile(p_y, o_c, ok_c, 0, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        b_vy = load_tile(v_y, o_c, ok_c, 0, D, BLOCK_D)
        s = inner_products(b_x, b_y, p_x, p_y, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION)
        sd = inner_products(b_vx, b_y, v_x, p_y, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION)
        sd += inner_products(b_x, b_vy, p_x, v_y, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION)
        p = tl.exp2((s * inv_tau - lse_r[:, None]) * LOG2E)
        mean += tl.sum(tl.where(ok_c[None, :], p * sd, 0.0), 1)
        diagonal += tl.sum(tl.where(o_r[:, None] == o_c[None, :], sd, 0.0), 1)
    tl.store(p_h + o_r, mean * inv_tau, mask=ok_r)
    if side == 0:
        tl.store(H_DIAG + o_r, diagonal * inv_tau, mask=ok_r)


# The two branches on the side need strides of one type.
@triton.jit(do_not_specialize=["s_row", "s_col"])
def _info_nce_bwd_kernel(
    X,  # [B, D], a
    Y,  # [B, D], b
    VX,  # [B, D] direction of the double backward, else not read, as the next
    VY,
    G_ROW,  # [B], stride s_row, as the next two
    G_COL,
    G_DIAG,
    ROW_LSE,  # [B]
    COL_LSE,  # [B]
    MEAN_ROW,  # [B] <P, Sd>, not read unless SECOND, as the next
    MEAN_COL,  # [B] <Q, Sd>
    OUT,  # [parts, 2, B, D], gradient of a and of b
    B,
    columns_per_part,
    s_row,
    s_col,
    s_diag,
    inv_tau,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    SECOND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_a = H b / tau and grad_b = H^T a / tau, H = g_row P + g_col Q + diag(g_diag)."""
    i_m, side = tl.program_id(0), tl.program_id(1)
    NUM_D: tl.constexpr = (D + BLOCK_OUT - 1) // BLOCK_OUT
    i_part = tl.program_id(2) // NUM_D
    d_out = (tl.program_id(2) % NUM_D) * BLOCK_OUT
    if side == 0:
        p_x, p_y, v_x, v_y = X, Y, VX, VY
        g_own, s_own, lse_own, mean_own = G_ROW, s_row, ROW_LSE, MEAN_ROW
        g_other, s_other, lse_other, mean_other = G_COL, s_col, COL_LSE, MEAN_COL
    else:
        p_x, p_y, v_x, v_y = Y, X, VY, VX
        g_own, s_own, lse_own, mean_own = G_COL, s_col, COL_LSE, MEAN_COL
        g_other, s_other, lse_other, mean_other = G_ROW, s_row, ROW_LSE, MEAN_ROW
    o_r = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ok_r = o_r < B
    b_x = load_tile(p_x, o_r, ok_r, 0, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    g_r = tl.load(g_own + o_r.to(tl.int64) * s_own, mask=ok_r, other=0.0)
    g_d = tl.load(G_DIAG + o_r.to(tl.int64) * s_diag, mask=ok_r, other=0.0)
    lse_r = tl.load(lse_own + o_r, mask=ok_r, other=NEVER)
    if SECOND:
        b_vx = load_tile(v_x, o_r, ok_r, 0, D, BLOCK_D)
        mean_r = tl.load(mean_own + o_r, mask=ok_r, other=0.0)
    c_first = i_part * columns_per_part
    c_last = tl.minimum(c_first + columns_per_part, B)

    acc = tl.zeros([BLOCK_M, BLOCK_OUT], tl.float32)
    for c_start in range(c_first, c_last, BLOCK_N):
        o_c = c_start + tl.arange(0, BLOCK_N)
        ok_c = o_c < B
        b_y = load_tile(p_y, o_c, ok_c, 0, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        s = inner_products(b_x, b_y, p_x, p_y, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION)
        g_c = tl.load(g_other + o_c.to(tl.int64) * s_other, mask=ok_c, other=0.0)
        lse_c = tl.load(lse_other + o_c, mask=ok_c, other=NEVER)
        p_r = g_r[:, None] * tl.exp2((s * inv_tau - lse_r[:, None]) * LOG2E)
        p_c = g_c[None, :] * tl.exp2((s * inv_tau - lse_c[None, :]) * LOG2E)
        is_self = o_r[:, None] == o_c[None, :]
        h = p_r + p_c + tl.where(is_self, g_d[:, None], 0.0)
        h = tl.where(ok_c[None, :], h, 0.0)
        b_out = output_tile(b_y, p_y, o_c, ok_c, d_out, D, BLOCK_D, BLOCK_OUT)
        if SECOND:
            b_vy = load_tile(v_y, o_c, ok_c, 0, D, BLOCK_D)
            sd = inner_products(b_vx, b_y, v_x, p_y, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION)
            sd += inner_products(b_x, b_vy, p_x, v_y, o_r, ok_r, o_c, ok_c, D, BLOCK_D, PRECISION)
            sd *= inv_tau
            mean_c = tl.load(mean_other + o_c, mask=ok_c, other=0.0)
            # P o (Sd - <P, Sd>) by rows, Q o (Sd - <Q, Sd>) by columns
            moved = p_r * (sd - mean_r[:, None]) + p_c * (sd - mean_c[None, :])
            acc = accumulate(acc, tl.where(ok_c[None, :], moved, 0.0), b_out, PRECISION)
            b_v = output_tile(b_vy, v_y, o_c, ok_c, d_out, D, BLOCK_D, BLOCK_OUT)
            acc = accumulate(acc, h, b_v, PRECISION)
        else:
            acc = accumulate(acc, h, b_out, PRECISION)
    o_d = d_out + tl.arange(0, BLOCK_OUT)
    o_row = (i_part * 2 + side).to(tl.int64) * B + o_r
    p_out = OUT + o_row[:, None] * D + o_d[None, :]
    tl.store(
        p_out, (acc * inv_tau).to(OUT.dtype.element_ty), mask=ok_r[:, None] & (o_d < D)[None, :]
    )


def info_nce_forward(
    a: Tensor, b: Tensor, temperature: float, *, precision: str = "tf32"
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-partitions of the rows and columns of S = a b^T / temperature, and its diagonal.

    Args:
        a, b: [B, D] float32, bfloat16 or float16.

    Returns:
        (row_lse [B], col_lse [B], diagonal [B]), float32. One launch.
    """
    _launch.check_inputs(a, precision)
    a, b = a.contiguous(), b.contiguous()
    batch, d = a.shape
    outputs = tuple(a.new_empty(batch, dtype=torch.float32) for _ in range(3))
    tile = _launch.tiles("nce_fwd", d, a.dtype, precision)
    if batch > 0:
        _info_nce_fwd_kernel[(triton.cdiv(batch, tile.block_m), 2)](
            a,
            b,
            *outputs,
            batch,
            1.0 / temperature,
            D=d,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_D=tile.block_d,
            PRECISION=precision,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return outputs


def info_nce_gradient_kernel(
    g_row: Tensor,
    g_col: Tensor,
    g_diag: Tensor,
    a: Tensor,
    b: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    temperature: float,
    precision: str,
    second: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(grad_a, grad_b), or (h_a, h_b) for ``second`` = (v_a, v_b, h_row, h_col); three launches."""
    batch, d = a.shape
    grad_a, grad_b = torch.empty_like(a), torch.empty_like(b)
    if grad_a.numel() == 0:
        return grad_a, grad_b
    v_a, v_b, mean_row, mean_col = (a, b, row_lse, col_lse) if second is None else second
    tile = _launch.tiles("nce_bwd" if second is None else "nce_double", d, a.dtype, precision)
    blocks, slices = triton.cdiv(batch, tile.block_m), triton.cdiv(d, tile.block_out)
    parts, columns = _launch.column_splits(2 * blocks * slices, batch, tile.block_n)
    out = a.new_empty((parts, 2, batch, d), dtype=torch.float32)
    _info_nce_bwd_kernel[(blocks, 2, slices * parts)](
        a,
        b,
        v_a,
        v_b,
        g_row,
        g_col,
        g_diag,
        row_lse,
        col_lse,
        mean_row,
        mean_col,
        out,
        batch,
        columns,
        g_row.stride(0),
        g_col.stride(0),
        g_diag.stride(0),
        1.0 / temperature,
        D=d,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=tile.block_d,
        BLOCK_OUT=tile.block_out,
        SECOND=second is not None,
        PRECISION=precision,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    # One sum per gradient: outputs of an operator may not share memory.
    sum_parts_kernel(out[:, 0], grad_a)
    sum_parts_kernel(out[:, 1], grad_b)
    return grad_a, grad_b


def info_nce_backward(
    g_row: Tensor,
    g_col: Tensor,
    g_diag: Tensor,
    a: Tensor,
    b: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    temperature: float,
    *,
    precision: str = "tf32",
) -> tuple[Tensor, Tensor]:
    """(grad_a, grad_b) [B, D] for cotangents [B] of the three outputs of ``info_nce_forward``."""
    _launch.check_inputs(a, precision)
    a, b = a.contiguous(), b.contiguous()
    row_lse, col_lse = row_lse.contiguous(), col_lse.contiguous()
    return info_nce_gradient_kernel(
        g_row, g_col, g_diag, a, b, row_lse, col_lse, temperature, precision
    )


def info_nce_double_backward(
    v_a: Tensor,
    v_b: Tensor,
    g_row: Tensor,
    g_col: Tensor,
    g_diag: Tensor,
    a: Tensor,
    b: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    temperature: float,
    *,
    precision: str = "tf32",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradient of <v_a, grad_a> + <v_b, grad_b>.

    Returns:
        (h_a [B, D], h_b [B, D], h_row [B], h_col [B], h_diag [B]).
    """
    _launch.check_inputs(a, precision)
    a, b = a.contiguous(), b.contiguous()
    v_a, v_b = v_a.to(a.dtype).contiguous(), v_b.to(a.dtype).contiguous()
    row_lse, col_lse = row_lse.contiguous(), col_lse.contiguous()
    batch, d = a.shape
    h_row, h_col, h_diag = (row_lse.new_empty(batch) for _ in range(3))
    tile = _launch.tiles("nce_rows", d, a.dtype, precision)
    if batch > 0:
        _info_nce_rows_kernel[(triton.cdiv(batch, tile.block_m), 2)](
            a,
            b,
            v_a,
            v_b,
            row_lse,
            col_lse,
            h_row,
            h_col,
            h_diag,
            batch,
            1.0 / temperature,
            D=d,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_D=tile.block_d,
            PRECISION=precision,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    h_a, h_b = info_nce_gradient_kernel(
        g_row,
        g_col,
        g_diag,
        a,
        b,
        row_lse,
        col_lse,
        temperature,
        precision,
        (v_a, v_b, h_row, h_col),
    )
    return h_a, h_b, h_row, h_col, h_diag
