"""The losses on a GPU at real sizes; skipped where there is none (see scripts/gpu_check.sh)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mclfast import (
    info_nce_loss,
    layerwise_mcl_loss,
    layerwise_mcl_terms,
    mcl_loss,
    mcl_terms,
    supcon_loss,
)
from mclfast._base.tensors import unit_norm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

COEFFICIENTS = (0.1, 1.0, 0.1, 1.0)


def sample(m: int, stages: int, batch: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    e = unit_norm(torch.randn(m, stages, batch, width, generator=g))
    weights = torch.rand(m * stages, m * stages, batch, generator=g)
    return e.to("cuda", dtype), (torch.arange(batch) // 2).cuda(), weights.cuda()


def derivatives(e: Tensor, labels: Tensor, weights: Tensor, backend: str) -> list[Tensor]:
    """Loss, gradient and a second-order gradient, in float64."""
    e = e.detach().requires_grad_()
    terms = layerwise_mcl_terms(e, labels, weights, backend=backend)
    loss = terms.weighted_sum(*COEFFICIENTS)
    (first,) = torch.autograd.grad(loss, e, create_graph=True)
    (second,) = torch.autograd.grad((first.double() ** 2).sum(), e)
    return [x.detach().double() for x in (loss, first, second)]


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    return [float((g - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]


@pytest.mark.parametrize("shape", [(2, 3, 128, 128), (4, 2, 257, 128), (3, 1, 100, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_accurate_as_eager_with_the_same_rounding_of_inputs(shape, dtype):
    """Against float64; eager gets inputs rounded as the tensor cores round them."""
    e, labels, weights = sample(*shape, dtype)
    want = derivatives(e.double(), labels, weights.double(), "reference")
    got = errors(derivatives(e, labels, weights, "triton"), want)
    rounded = e.float() if dtype != torch.float32 else round_to_tf32(e)
    eager = errors(derivatives(rounded, labels, weights, "reference"), want)
    # Gradients come back in the dtype of the embeddings, the loss does not.
    result = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-3
    for mine, theirs in zip(got, eager, strict=True):
        assert mine <= 1.5 * theirs + 2 * result


def round_to_tf32(x: Tensor) -> Tensor:
    """Nearest float32 with 10 bits of mantissa."""
    bits = x.view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def test_exact_float32(monkeypatch):
    monkeypatch.setenv("MCLFAST_FP32_PRECISION", "ieee")
    e, labels, weights = sample(2, 2, 64, 32, torch.float32)
    want = derivatives(e.double(), labels, weights.double(), "reference")
    assert max(errors(derivatives(e, labels, weights, "triton"), want)) < 1e-5


def test_equal_bits_from_run_to_run():
    e, labels, weights = sample(2, 3, 128, 128, torch.float32)
    first, second = (derivatives(e, labels, weights, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_auto_takes_triton_and_special_cases_agree():
    e, labels, _ = sample(2, 1, 96, 128, torch.float32)
    a, b = e[0, 0], e[1, 0]
    for call in (
        lambda backend: supcon_loss(a, labels, backend=backend),
        lambda backend: info_nce_loss(a, b, backend=backend),
        lambda backend: mcl_terms(e[:, 0], labels, backend=backend).icl,
    ):
        assert torch.equal(call("auto"), call("triton"))
        torch.testing.assert_close(call("triton"), call("reference"), rtol=1e-3, atol=1e-3)


def test_sixteen_networks_of_four_stages_fit_in_one_gibibyte():
    e, labels, _ = sample(16, 4, 1024, 128, torch.bfloat16)
    e.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layerwise_mcl_loss(e, labels, weights=COEFFICIENTS).backward()
    assert torch.cuda.max_memory_allocated() - before < 2**30


def test_compiles_as_one_graph():
    e, labels, _ = sample(2, 1, 64, 64, torch.float32)
    e = e[:, 0].detach().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return mcl_loss(x, labels, weights=COEFFICIENTS)

    (want,) = torch.autograd.grad(loss(e), e)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(e), e)
    torch.testing.assert_close(got, want)
