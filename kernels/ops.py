"""The functions that ``mclfast.ops.in_batch`` calls for the backend "triton"."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

from mclfast.kernels import info_nce, mcl_backward, mcl_double_backward, mcl_forward, mcl_fused

PRECISIONS = ("tf32", "tf32x3", "ieee")


def fp32_precision() -> str:
    """How float32 inputs are multiplied: environment variable MCLFAST_FP32_PRECISION.

    "tf32" (default) is fastest and rounds inputs to 10 bits of mantissa, "ieee" is exact float32,
    "tf32x3" lies between. Half precision and all sums are not affected.
    """
    precision = os.environ.get("MCLFAST_FP32_PRECISION", "tf32")
    if precision not in PRECISIONS:
        raise ValueError(
            f"MCLFAST_FP32_PRECISION: expected one of {', '.join(PRECISIONS)}; got {precision!r}"
        )
    return precision


def _with_precision(launcher: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(launcher)
    def call(*arguments: Any) -> Any:
        return launcher(*arguments, precision=fp32_precision())

    return call


mcl_rows_forward = _with_precision(mcl_forward.mcl_rows_forward)
mcl_rows_backward = _with_precision(mcl_backward.mcl_rows_backward)
mcl_rows_fused = _with_precision(mcl_fused.mcl_rows_fused)
mcl_rows_double_backward = _with_precision(mcl_double_backward.mcl_rows_double_backward)
info_nce_forward = _with_precision(info_nce.info_nce_forward)
info_nce_backward = _with_precision(info_nce.info_nce_backward)
info_nce_double_backward = _with_precision(info_nce.info_nce_double_backward)
