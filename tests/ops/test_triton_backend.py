"""The losses through ``backend="triton"``, interpreted on the CPU.

In a process of its own: triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

PROGRAM = """
import torch
from mclfast import info_nce_loss, layerwise_mcl_loss, layerwise_mcl_terms, mcl_rows
from mclfast import similarity_kl_loss, supcon_loss, unit_norm

torch.manual_seed(0)
e = unit_norm(torch.randn(3, 1, 9, 5)).requires_grad_()
labels = torch.randint(4, (9,))
weights = torch.rand(3, 3, 9)
coefficients = (0.1, 1.0, 0.3, 0.7)


def derivatives(call):
    value = call()
    (first,) = torch.autograd.grad(value, e, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), e)
    return value.detach(), first.detach(), second


def losses(backend):
    kw = {"backend": backend}
    yield lambda: layerwise_mcl_terms(e, labels, weights, **kw).weighted_sum(*coefficients)
    yield lambda: layerwise_mcl_loss(
        e, labels, weights, backend=backend, weights=coefficients
    )
    yield lambda: supcon_loss(e[0, 0], labels, backend=backend)
    yield lambda: info_nce_loss(e[0, 0], e[1, 0], backend=backend)
    yield lambda: similarity_kl_loss(e[0, 0], e[1, 0, :, :4].detach(), backend=backend)


for i, (mine, theirs) in enumerate(zip(losses("triton"), losses("reference"))):
    for order, (got, want) in enumerate(zip(derivatives(mine), derivatives(theirs))):
        error = float((got - want).norm() / want.norm())
        assert error < 1e-5, (i, order, error)

rows = mcl_rows(e, labels, row_start=2, row_count=4, backend="triton")
for got, want in zip(rows, mcl_rows(e, labels, backend="reference")):
    torch.testing.assert_close(got, want[..., 2:6])
print("all equal")
"""


def run(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
    )


def test_equal_to_the_reference_to_second_order():
    result = run(PROGRAM)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "all equal"


def test_unknown_precision_is_refused():
    program = (
        "import torch, mclfast\n"
        "mclfast.supcon_loss(torch.ones(2, 3), torch.zeros(2).long(), backend='triton')"
    )
    result = run(program, MCLFAST_FP32_PRECISION="fp8")
    assert "MCLFAST_FP32_PRECISION: expected one of tf32, tf32x3, ieee; got 'fp8'" in result.stderr
