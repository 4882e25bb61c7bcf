"""Gradients of half precision under a loss scale: finite, and as accurate as the plain form's."""

from __future__ import annotations

import pytest
import torch

from helpers.not_finite import bank_losses, in_batch_losses
from mclfast import unit_norm

BATCH, WIDTH, SAMPLES = 64, 32, 50


def losses():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (BATCH,), generator=g)
    banks = unit_norm(torch.randn(2, SAMPLES, WIDTH, generator=g))
    pos_idx = torch.randint(SAMPLES, (BATCH, 3), generator=g)
    neg_idx = torch.randint(SAMPLES, (BATCH, 33), generator=g)
    return [*in_batch_losses(labels), *bank_losses(banks, pos_idx, neg_idx)]


def gradient(loss, embeddings, backend, scale):
    e = embeddings.clone().requires_grad_()
    (scale * loss(e, backend)).backward()
    return e.grad.double()


@pytest.mark.parametrize("scale", [1.0, 32768.0, 65536.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scaled_gradients_are_as_accurate_as_the_plain_form(dtype, scale):
    g = torch.Generator().manual_seed(1)
    e = unit_norm(torch.randn(2, BATCH, WIDTH, generator=g)).to(dtype)
    compared = 0
    for name, loss in losses():
        exact = gradient(loss, e.double(), "reference", scale)
        plain = gradient(loss, e, "reference", scale)
        ours = gradient(loss, e, "cpu", scale)
        assert torch.equal(ours.isfinite(), plain.isfinite()), name
        finite = plain.isfinite()
        compared += int(finite.sum())
        error, allowed = ((x - exact)[finite].norm() for x in (ours, plain))
        # The rounding of the result; a millionth for its last bits in float32.
        assert error <= 1.001 * allowed + 1e-6 * exact[finite].norm(), name
    assert compared > 0.9 * len(losses()) * e.numel()


def test_second_derivative_of_half_precision():
    g = torch.Generator().manual_seed(2)
    e = unit_norm(torch.randn(2, BATCH, WIDTH, generator=g)).half()
    for name, loss in losses():
        found = []
        for backend, dtype in (("reference", torch.float64), ("cpu", torch.float16)):
            x = e.to(dtype, copy=True).requires_grad_()
            (first,) = torch.autograd.grad(loss(x, backend), x, create_graph=True)
            (second,) = torch.autograd.grad((first.double() ** 2).sum(), x)
            found.append(second.double())
        exact, ours = found
        assert (ours - exact).norm() <= 4e-3 * exact.norm(), name
