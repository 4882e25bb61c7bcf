"""NaN and infinities reach the loss and its derivatives as they do in the plain form."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mclfast
from helpers.not_finite import differences
from mclfast import unit_norm


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_cpu_is_finite_where_the_plain_form_is(value):
    lost = [text for seed in range(30) for text in differences("cpu", seed, value)]
    assert not lost, "\n".join(lost)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_is_finite_where_the_plain_form_is():
    tests = Path(__file__).resolve().parents[1]
    env = dict(os.environ, TRITON_INTERPRET="1", PYTHONPATH=str(tests), OMP_NUM_THREADS="1")
    script = tests / "helpers" / "not_finite.py"
    run = subprocess.run(
        [sys.executable, str(script), "triton", "8"], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]


def test_a_sample_that_is_nan_and_alone_in_its_class():
    labels = torch.tensor([0, 0, 1, 1, 2])
    e = unit_norm(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
    e[4, 3] = math.nan
    e.requires_grad_()
    loss = mclfast.supcon_loss(e, labels, backend="cpu")
    (grad,) = torch.autograd.grad(loss, e)
    assert loss.isnan() and grad.isnan().all()


def test_logits_beyond_the_range_of_the_kernels_equal_the_plain_form():
    labels = torch.arange(6) % 2
    e = 1e12 * torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    got = mclfast.mcl_terms(e, labels, backend="cpu")
    for x, y in zip(got, mclfast.mcl_terms(e, labels, backend="reference"), strict=True):
        torch.testing.assert_close(x, y)


def test_a_term_without_a_part_in_the_loss_adds_no_nan():
    e = unit_norm(torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)))
    e[0, 0, 0] = math.nan
    e.requires_grad_()
    terms = mclfast.mcl_terms(e, torch.arange(6) % 2, backend="cpu")
    (grad,) = torch.autograd.grad(terms.vcl, e)
    assert grad[0].isnan().all() and grad[1].isfinite().all()


def test_inference_mode_takes_the_plain_way_too():
    with torch.inference_mode():
        e = torch.full((2, 4, 3), math.nan)
        assert mclfast.mcl_loss(e, torch.arange(4) % 2, backend="cpu").isnan()


def test_an_updated_bank_entry_with_nan_is_nan():
    bank = mclfast.MemoryBank(1, 3, 8, momentum=0.5)
    embeddings = torch.ones(1, 1, 8)
    embeddings[0, 0, 2] = math.nan
    others = bank.banks[0, 0].clone()
    bank.update(torch.tensor([1]), embeddings, backend="cpu")
    assert bank.banks[0, 1].isnan().all()
    assert torch.equal(bank.banks[0, 0], others)
