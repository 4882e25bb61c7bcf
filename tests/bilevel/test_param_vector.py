"""Vectors of the size of all parameters."""

from __future__ import annotations

import torch

from mclfast.bilevel.param_vector import ParamVector


def test_arithmetic_over_dtypes_and_layouts():
    torch.manual_seed(0)
    last = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    like = [last, torch.randn(5, dtype=torch.float64), torch.randn(()), torch.randn(0, 3)]
    values = [torch.randn_like(p) for p in like]
    kept = [v.clone() for v in values]
    a = ParamVector(like, values)
    b = ParamVector(like).add_(a, 2.0)
    sum_ = a.plus(b, 0.5).mul_(3.0)
    for p, value, start, x, y, z in zip(
        like, values, kept, a.tensors, b.tensors, sum_.tensors, strict=True
    ):
        assert torch.equal(value, start) and torch.equal(x, value)
        assert x.dtype == p.dtype and x.stride() == p.stride()
        torch.testing.assert_close(y, 2 * value)
        torch.testing.assert_close(z, 6 * value)
    assert len({t.untyped_storage().data_ptr() for t in a.tensors}) == 2


def test_tensors_are_aligned_as_far_as_their_sizes_allow():
    like = [torch.ones(n) for n in (10, 64, 3, 48, 1)]
    for t in ParamVector(like, like).moved(torch.clone).tensors:
        power = t.numel() & -t.numel()
        assert t.storage_offset() % power == 0 and t.sum() == t.numel()
