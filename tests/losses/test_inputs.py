"""Embeddings that are not of unit norm: divided by their norm, or found by a check."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import mclfast
from helpers.every_loss import LABELS, LossCase, every_loss
from mclfast import unit_norm

CASES = {case.name: case for case in every_loss()}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> LossCase:
    return CASES[request.param]


def scaled(e: Tensor) -> Tensor:
    """Embeddings in the same directions, each of another norm."""
    g = torch.Generator().manual_seed(3)
    return e * (0.2 + 30 * torch.rand(*e.shape[:-1], 1, generator=g, dtype=e.dtype))


def gradient(call: Any, e: Tensor) -> list[Tensor]:
    x = e.clone().requires_grad_()
    value = call(x)
    return [value.detach(), *torch.autograd.grad(value, x)]


def test_normalize_is_unit_norm_before_the_loss(case):
    e = scaled(case.embeddings)
    got = gradient(lambda x: case.call(x, normalize=True), e)
    want = gradient(lambda x: case.call(unit_norm(x), backend="reference"), e)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_normalize_takes_embeddings_of_any_size():
    e, labels = CASES["mcl_rows"].embeddings[0, 0].float(), LABELS
    want = mclfast.supcon_loss(e, labels)
    for size in (1e30, 1e10, 1e-3):
        torch.testing.assert_close(mclfast.supcon_loss(e * size, labels, normalize=True), want)


@pytest.mark.parametrize(
    "module",
    [
        mclfast.MCLLoss,
        mclfast.LayerwiseMCLLoss,
        mclfast.SupConLoss,
        mclfast.InfoNCELoss,
        mclfast.SimilarityKLLoss,
    ],
)
def test_normalize_in_modules(module):
    e = scaled(CASES["mcl_rows"].embeddings)
    if module is not mclfast.LayerwiseMCLLoss:
        e = e[:, 0]
    views = (e[0], e[1]) if module in (mclfast.InfoNCELoss, mclfast.SimilarityKLLoss) else None
    if module is mclfast.SupConLoss:
        e = e[0]
    given = views or (e, LABELS)
    want = module()(*(unit_norm(x) if x.is_floating_point() else x for x in given))
    torch.testing.assert_close(module(normalize=True)(*given), want)
    assert "normalize=True" in repr(module(normalize=True))


def test_the_check_names_argument_row_and_norm(case):
    wrong = case.embeddings.clone()
    wrong[(0,) * (wrong.dim() - 2) + (3,)] *= 2
    assert torch.isfinite(case.call(wrong))
    with mclfast.check_inputs():
        case.call(case.embeddings)
        case.call(wrong, normalize=True)
        with pytest.raises(ValueError, match=r"^(embeddings|a|student): .*norm 2 in row .*3"):
            case.call(wrong)
        with mclfast.check_inputs(False):
            case.call(wrong)
        wrong[..., 0, :] = float("nan")
        with pytest.raises(ValueError, match="got norm nan"):
            case.call(wrong)
    case.call(wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounded_embeddings_pass_the_check(dtype):
    e = unit_norm(torch.randn(2, 64, 512, generator=torch.Generator().manual_seed(0))).to(dtype)
    with mclfast.check_inputs():
        mclfast.mcl_loss(e, torch.arange(64) // 2)


def test_the_check_by_environment():
    code = "import mclfast, torch; mclfast.supcon_loss(torch.ones(4, 3), torch.zeros(4).long())"
    environment = {"MCLFAST_CHECK_INPUTS": "1", "PATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "embeddings: expected rows of norm 1, got norm 1.73205 in row 0" in run.stderr


def test_normalize_is_true_or_false():
    with pytest.raises(TypeError, match="^normalize: expected True or False, got 1"):
        mclfast.supcon_loss(torch.randn(4, 3), torch.zeros(4).long(), normalize=1)


def test_modules_take_their_backend_by_position_as_before():
    assert mclfast.SupConLoss(0.1, "reference").backend == "reference"
    assert mclfast.SimilarityKLLoss(0.1, 3.0, "reference").backend == "reference"
    assert mclfast.MCLLoss((0.1, 1, 0.1, 1), 0.1, 3.0, "reference").backend == "reference"
    loss = mclfast.BankNCELoss(0.1, "reference", True)
    assert (loss.backend, loss.freeze_normalizer) == ("reference", True)
