"""Forward and backward of the in-batch losses in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mclfast.kernels.mcl_backward import mcl_rows_backward
from mclfast.kernels.mcl_forward import mcl_rows_forward


def mcl_rows_fused(
    g_vcl: Tensor,
    g_soft_vcl: Tensor,
    g_icl: Tensor,
    g_soft_icl: Tensor,
    nodes: Tensor,
    labels: Tensor,
    networks: Sequence[int],
    temperature: float,
    kl_temperature: float,
    families: int,
    *,
    precision: str = "tf32",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows of all anchors and their gradient for cotangents known in advance.

    The gradient of a tile needs the partition function of its whole row and column, so one sweep
    would have to keep [B, B] logits per pair. On a GPU recomputing them is cheaper than storing
    them: this is the forward followed by the backward.

    Returns:
        (vcl [N, B], soft_vcl [N, N, B], icl [N, N, B], soft_icl [N, N, B], lse [N, N, B],
        kl_lse [N, N, B], grad_nodes [N, B, D]), float32: the gradient meets its cotangent, which
        may be a loss scale, before it is rounded to half precision.
    """
    batch = nodes.shape[1]
    rows = mcl_rows_forward(
        nodes,
        labels,
        networks,
        temperature,
        kl_temperature,
        families,
        0,
        batch,
        precision=precision,
    )
    lse, kl_lse = rows[4:]
    grad_nodes = mcl_rows_backward(
        g_vcl,
        g_soft_vcl,
        g_icl,
        g_soft_icl,
        nodes,
        labels,
        networks,
        lse,
        kl_lse,
        temperature,
        kl_temperature,
        families,
        0,
        batch,
        precision=precision,
        grad_dtype=torch.float32,
    )
    return *rows, grad_nodes
