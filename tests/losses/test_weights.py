"""Weights of the terms and of pairs: numbers, tensors, trained ones; which path serves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mclfast
from mclfast import unit_norm
from mclfast.ops import backends
from mclfast.ops import banks as bank_ops
from mclfast.ops import in_batch as ops

WEIGHTS = (0.3, 1.0, 0.5, 0.7)


@dataclass
class Form:
    """One of the four losses with arguments for it, in float64."""

    name: str
    embeddings: Tensor
    arguments: tuple[Tensor, ...]

    def call(self, kind: str, *more: Any, embeddings: Tensor | None = None, **settings: Any) -> Any:
        e = self.embeddings if embeddings is None else embeddings
        return getattr(mclfast, f"{self.name}_{kind}")(e, *self.arguments, *more, **settings)


def form(name: str) -> Form:
    g = torch.Generator().manual_seed(0)
    shape = (2, 2, 6, 5) if name.startswith("layerwise") else (3, 6, 5)
    e = unit_norm(torch.randn(shape, generator=g, dtype=torch.float64)).requires_grad_()
    if "bank" not in name:
        return Form(name, e, (torch.tensor([0, 1, 0, 2, 1, 1]),))
    banks = unit_norm(torch.randn(shape[0], 30, 5, generator=g, dtype=torch.float64))
    pos, neg = (torch.randint(30, (6, k), generator=g) for k in (2, 7))
    return Form(name, e, (banks, pos, neg))


NAMES = ["mcl", "layerwise_mcl", "bank_mcl", "layerwise_bank_mcl"]
LAYERWISE = [name for name in NAMES if name.startswith("layerwise")]


def pair_weights(requires_grad: bool = True) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.rand(4, 4, 6, generator=g, dtype=torch.float64).requires_grad_(requires_grad)


def fused_calls(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> int:
    """How often a call takes the one-sweep operators."""
    count = 0

    def counted(operator: Any) -> Any:
        def run(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            return operator(*arguments)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(ops, "mcl_objective", counted(ops.mcl_objective))
        patch.setattr(bank_ops, "bank_mcl_objective", counted(bank_ops.bank_mcl_objective))
        call()
    return count


@pytest.mark.parametrize("name", NAMES)
def test_what_each_form_returns(backend: str, name: str):
    f = form(name)
    terms, loss = f.call("terms"), f.call("loss", weights=WEIGHTS)
    objective = f.call("objective", weights=WEIGHTS)
    assert isinstance(terms, mclfast.MCLTerms) and isinstance(objective, mclfast.MCLObjective)
    assert isinstance(loss, Tensor) and loss.shape == ()
    assert torch.equal(loss, objective.loss)
    torch.testing.assert_close(loss, terms.weighted_sum(*WEIGHTS))
    for a, b in zip(objective.terms, terms, strict=True):
        torch.testing.assert_close(a, b.detach())
        assert not a.requires_grad and b.requires_grad
    default = f.call("loss")
    torch.testing.assert_close(default, terms.weighted_sum(0.1, 1, 0.1, 1))


@pytest.mark.parametrize("name", NAMES)
def test_trained_weights_get_their_gradient_to_second_order(backend: str, name: str):
    f = form(name)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64, requires_grad=True)
    want = torch.stack(f.call("terms"))
    (got,) = torch.autograd.grad(f.call("loss", weights=weights), weights, create_graph=True)
    torch.testing.assert_close(got, want)
    direction = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (a,) = torch.autograd.grad((got * direction).sum(), f.embeddings)
    (b,) = torch.autograd.grad((want * direction).sum(), f.embeddings)
    torch.testing.assert_close(a, b)
    # And the gradient of the embeddings depends on the weights.
    (first,) = torch.autograd.grad(f.call("loss", weights=weights), f.embeddings, create_graph=True)
    (mixed,) = torch.autograd.grad(first.square().sum(), weights)
    plain = torch.autograd.grad(f.call("terms").vcl, f.embeddings)[0]
    assert mixed[0].item() == pytest.approx(2 * (first.detach() * plain).sum().item(), rel=1e-8)


@pytest.mark.parametrize("name", LAYERWISE)
def test_weights_of_pairs_and_of_terms_trained_at_once(backend: str, name: str):
    f, w = form(name), pair_weights()
    weights = torch.tensor(WEIGHTS, dtype=torch.float64, requires_grad=True)
    x = f.embeddings.detach().requires_grad_()

    def loss(e: Tensor, pairs: Tensor, terms: Tensor) -> Tensor:
        # Soft terms hold teachers constant, which numerical derivatives do not know.
        only = torch.stack([terms[0], terms[1] * 0, terms[2], terms[3] * 0])
        return f.call("loss", pairs, embeddings=e, weights=only)

    assert torch.autograd.gradcheck(loss, (x, w, weights))
    assert torch.autograd.gradgradcheck(loss, (x, w, weights))


@pytest.mark.parametrize("name", LAYERWISE)
def test_live_pair_weights_get_the_gradient_of_the_terms(backend: str, name: str):
    f, w = form(name), pair_weights()
    objective = f.call("objective", w, weights=WEIGHTS)
    want = f.call("terms", w).weighted_sum(*WEIGHTS)
    for a, b in zip(
        torch.autograd.grad(objective.loss, [f.embeddings, w]),
        torch.autograd.grad(want, [f.embeddings, w]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_one_sweep_exactly_where_no_weight_is_trained(monkeypatch, name: str):
    with mclfast.use_backend("cpu"):
        f = form(name)
        live = torch.tensor(1.0, requires_grad=True)
        fixed = (0.1, np.float32(0.5), torch.tensor(0.2), 1)
        assert fused_calls(monkeypatch, lambda: f.call("loss", weights=fixed)) == 1
        assert fused_calls(monkeypatch, lambda: f.call("loss", weights=torch.ones(4))) == 1
        assert fused_calls(monkeypatch, lambda: f.call("loss", weights=(0, 1, live, 1))) == 0
        with torch.no_grad():
            assert fused_calls(monkeypatch, lambda: f.call("loss", weights=(0, 1, live, 1))) == 1
        if name in LAYERWISE:
            assert fused_calls(monkeypatch, lambda: f.call("loss", pair_weights())) == 0
            assert fused_calls(monkeypatch, lambda: f.call("loss", pair_weights(False))) == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_same_weights_in_every_spelling(backend: str, name: str):
    f = form(name)
    want = f.call("loss", weights=(0.5, 1.0, 0.25, 2.0))
    for weights in (
        [np.float32(0.5), 1, np.float64(0.25), torch.tensor(2.0)],
        torch.tensor([0.5, 1.0, 0.25, 2.0]),
        torch.tensor([0.5, 1.0, 0.25, 2.0], requires_grad=True),
        nn.Parameter(torch.tensor([0.5, 1.0, 0.25, 2.0], dtype=torch.float16)),
        tuple(nn.Parameter(torch.tensor(w)) for w in (0.5, 1.0, 0.25, 2.0)),
    ):
        found = f.call("loss", weights=weights)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, want)


MODULES = {
    "mcl": mclfast.MCLLoss,
    "layerwise_mcl": mclfast.LayerwiseMCLLoss,
    "bank_mcl": mclfast.BankMCLLoss,
    "layerwise_bank_mcl": mclfast.LayerwiseBankMCLLoss,
}


@pytest.mark.parametrize("name", NAMES)
def test_modules_train_their_weights(backend: str, name: str):
    f = form(name)
    whole = MODULES[name](weights=nn.Parameter(torch.tensor(WEIGHTS, dtype=torch.float64)))
    assert [n for n, _ in whole.named_parameters()] == ["weights"]
    vcl = nn.Parameter(torch.tensor(WEIGHTS[0], dtype=torch.float64))
    apart = MODULES[name](weights=(vcl, *WEIGHTS[1:3], torch.tensor(WEIGHTS[3])))
    assert [n for n, _ in apart.named_parameters()] == ["vcl_weight"]
    assert list(apart.state_dict()) == ["vcl_weight", "soft_icl_weight"]
    assert apart.to(torch.float32).soft_icl_weight.dtype == torch.float32
    for module in (whole, apart.double()):
        loss = module(f.embeddings, *f.arguments)
        torch.testing.assert_close(loss, f.call("loss", weights=WEIGHTS))
        loss.backward()
    assert whole.weights.grad.shape == (4,)
    torch.testing.assert_close(apart.vcl_weight.grad, f.call("terms").vcl.detach())
    assert "weights" in repr(whole) and "vcl_weight" not in repr(apart).partition("(")[0]


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ((1.0, 2.0), ValueError, r"^weights: expected 4 \(vcl, soft_vcl, icl, soft_icl\), got 2"),
        (torch.ones(3), ValueError, r"^weights: expected shape \[4\], got \[3\]"),
        (1.0, TypeError, "^weights: expected 4 .* got 1.0"),
        (None, TypeError, "^weights: expected 4 .* got None"),
        ("1111", TypeError, "^weights: expected 4 .* got '1111'"),
        ((1, 1, 1, "x"), TypeError, r"^weights\[3\]: expected a number or a 0-dim .* got 'x'"),
        ((1, True, 1, 1), TypeError, r"^weights\[1\]: expected a number .* got True"),
        ((1, torch.ones(2), 1, 1), ValueError, r"^weights\[1\]: expected a 0-dim floating-point"),
        ((torch.tensor(1), 1, 1, 1), ValueError, r"^weights\[0\]: expected a 0-dim floating-point"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["mcl", "layerwise_bank_mcl"])
def test_wrong_weights(name: str, weights: Any, error: type[Exception], message: str):
    for call in (
        lambda: form(name).call("loss", weights=weights),
        lambda: form(name).call("objective", weights=weights),
        lambda: MODULES[name](weights=weights),
    ):
        with pytest.raises(error, match=message):
            call()


def test_use_backend(monkeypatch):
    f = form("mcl")
    seen: list[str] = []
    resolve = backends.resolve_for
    monkeypatch.setattr(
        backends, "resolve_for", lambda *a, **k: seen.append(resolve(*a, **k)) or seen[-1]
    )
    with mclfast.use_backend("reference"):
        f.call("loss")
        with mclfast.use_backend("auto"):
            f.call("loss", backend="reference")
        form("bank_mcl").call("loss")
        assert set(seen) == {"reference"}
    with pytest.raises(RuntimeError, match="inside"), mclfast.use_backend("reference"):
        raise RuntimeError("inside")
    with pytest.raises(ValueError, match="^backend: expected one of .*got 'gpu'"):
        with mclfast.use_backend("gpu"):
            pass
    f.call("loss")
    assert seen[-1] == ("cpu" if backends.available("cpu") else "reference")
