"""The memory-bank losses: recorded values, literal loops, derivatives, shapes, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from helpers import golden
from mclfast import (
    BankMCLLoss,
    BankNCELoss,
    LayerwiseBankMCLLoss,
    bank_mcl_loss,
    bank_mcl_objective,
    bank_mcl_rows,
    bank_mcl_terms,
    bank_nce_log_normalizer,
    bank_nce_loss,
    layerwise_bank_mcl_loss,
    layerwise_bank_mcl_objective,
    layerwise_bank_mcl_terms,
)
from mclfast._base.tensors import unit_norm

TOLERANCE = 1e-9
SETTINGS = {"temperature": 0.2, "kl_temperature": 2.0}

pytestmark = pytest.mark.usefixtures("backend")


def sample(
    m: int, stages: int, b: int, d: int, *, n: int = 60, p: int = 2, k: int = 5, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings [M, L, B, D], banks [M, n, D], positive and negative numbers, float64."""
    g = torch.Generator().manual_seed(seed)
    e = unit_norm(torch.randn(m, stages, b, d, generator=g, dtype=torch.float64))
    banks = unit_norm(torch.randn(m, n, d, generator=g, dtype=torch.float64))
    pos = torch.randint(n, (b, 1 + p), generator=g)
    neg = torch.randint(n, (b, k), generator=g)
    return e.requires_grad_(), banks, pos, neg


def literal_rows(e: Tensor, banks: Tensor, pos: Tensor, neg: Tensor, tau: float, t: float) -> dict:
    """The rows in Python floats, key by key, node by node; equal numbers of stages."""
    (m, stages, b, _), p = e.shape, pos.shape[1] - 1
    nodes = e.detach().reshape(m * stages, b, -1).tolist()
    bank = banks.tolist()
    count, owner = m * stages, [a // stages for a in range(m * stages)]
    out = {
        "vcl": torch.zeros(count, b, dtype=torch.float64),
        "soft_vcl": torch.zeros(count, count, b, dtype=torch.float64),
        "icl": torch.zeros(m, count, b, dtype=torch.float64),
        "soft_icl": torch.zeros(count, count, b, dtype=torch.float64),
    }

    def log_sum(values: list[float]) -> float:
        top = max(values)
        return top + math.log(sum(math.exp(v - top) for v in values))

    def contrast(values: list[float], positives: int) -> float:
        if not positives:
            return 0.0
        return log_sum(values) - sum(values[:positives]) / positives

    def kl(teacher: list[float], student: list[float]) -> float:
        x, y = ([v / t for v in values] for values in (teacher, student))
        lx, ly = log_sum(x), log_sum(y)
        return t * t * sum(math.exp(u - lx) * (u - lx - v + ly) for u, v in zip(x, y, strict=True))

    for r in range(b):
        keys = [*pos[r].tolist(), *neg[r].tolist()]

        def logit(stored: list[float], anchor: list[float]) -> float:
            return sum(u * v for u, v in zip(stored, anchor, strict=True)) / tau

        z = [[[logit(bank[i][key], x[r]) for key in keys] for x in nodes] for i in range(m)]  # noqa: B023
        for a in range(count):
            out["vcl"][a, r] = contrast(z[owner[a]][a][1:], p)
            for i in range(m):
                if i != owner[a]:
                    out["icl"][i, a, r] = contrast(z[i][a], p + 1)
            for c in range(count):
                if owner[a] != owner[c]:
                    out["soft_vcl"][a, c, r] = kl(z[owner[c]][c][1:], z[owner[a]][a][1:])
                    out["soft_icl"][a, c, r] = kl(z[owner[c]][a], z[owner[a]][c])
    return out


# ---------------------------------------------------------------- recorded values


def test_layerwise_values_of_the_published_code_with_own_banks(golden_dir):
    g = golden.load(golden_dir / "lmcl_bank_m2_l3.npz")
    e, w = g["embeddings"].requires_grad_(), g["weights"].requires_grad_()
    arguments = (g["bank"], g["pos_idx"], g["neg_idx"])
    settings = {"temperature": float(g["tau"]), "kl_temperature": float(g["kd_T"])}
    terms = layerwise_bank_mcl_terms(e, *arguments, golden.pair_weights(w), **settings)
    for name in golden.TERMS:
        assert golden.relative(getattr(terms, name), g[f"own_{name}"]) < TOLERANCE, name
    coefficients = g["coef"].tolist()
    grads = torch.autograd.grad(terms.weighted_sum(*coefficients), [e, w])
    assert golden.relative(grads[0], g["own_grad_embeddings"]) < TOLERANCE
    assert golden.relative(grads[1], g["own_grad_weights"]) < TOLERANCE
    fused = layerwise_bank_mcl_objective(
        e, *arguments, golden.pair_weights(w).detach(), weights=coefficients, **settings
    )
    assert golden.relative(fused.loss, terms.weighted_sum(*coefficients).detach()) < TOLERANCE
    (grad,) = torch.autograd.grad(fused.loss, e)
    assert golden.relative(grad, g["own_grad_embeddings"]) < TOLERANCE


def test_mcl_values_of_the_published_code(golden_dir):
    g = golden.load(golden_dir / "mcl_bank_m3.npz")
    e = g["embeddings"].requires_grad_()
    arguments = (g["bank"], g["pos_idx"], g["neg_idx"])
    settings = {"temperature": float(g["tau"]), "kl_temperature": float(g["kd_T"])}
    terms = bank_mcl_terms(e, *arguments, **settings)
    for name in golden.TERMS:
        assert golden.relative(getattr(terms, name), g[name]) < TOLERANCE, name
    (grad,) = torch.autograd.grad(terms.weighted_sum(*g["coef"].tolist()), e)
    assert golden.relative(grad, g["grad_embeddings"]) < TOLERANCE
    fused = bank_mcl_objective(e, *arguments, weights=g["coef"].tolist(), **settings)
    (grad,) = torch.autograd.grad(fused.loss, e)
    assert golden.relative(grad, g["grad_embeddings"]) < TOLERANCE


def test_nce_values_of_the_published_code(golden_dir):
    g = golden.load(golden_dir / "mcl_okd_m4.npz")
    e = g["embeddings"].requires_grad_()
    loss = bank_nce_loss(e, g["bank"], g["contrast_idx"], temperature=float(g["tau"]))
    assert golden.relative(loss, g["loss"]) < TOLERANCE
    (grad,) = torch.autograd.grad(loss, e)
    assert golden.relative(grad, g["grad_embeddings"]) < TOLERANCE


# ---------------------------------------------------------------- literal loops and derivatives

SHAPES = {
    "usual": (2, 2, 5, 7, {}),
    "three networks": (3, 1, 4, 16, {}),
    "one negative": (2, 2, 3, 7, {"k": 1}),
    "batch of one": (2, 1, 1, 5, {}),
    "no positive": (2, 1, 3, 4, {"p": 0}),
    "one network": (1, 2, 3, 4, {}),
    "duplicates": (2, 2, 4, 6, {"n": 3, "k": 9}),
    "many keys": (2, 1, 3, 33, {"n": 500, "k": 300}),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows_equal_the_formulas(shape):
    m, stages, b, d, more = shape
    e, banks, pos, neg = sample(m, stages, b, d, **more)
    got = bank_mcl_rows(e, banks, pos, neg, **SETTINGS)
    want = literal_rows(e, banks, pos, neg, 0.2, 2.0)
    for name, value in want.items():
        torch.testing.assert_close(getattr(got, name), value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_first_and_second_derivatives(shape):
    m, stages, b, d, more = shape
    if d > 20:
        pytest.skip("numerical derivatives of so many values are slow")
    e, banks, pos, neg = sample(m, stages, b, d, **more)
    count = m * stages
    w = torch.rand(count, count, b, dtype=torch.float64, requires_grad=True)

    def hard(x: Tensor, weights: Tensor) -> Tensor:
        # The soft terms hold teachers constant, which numerical derivatives do not know.
        terms = layerwise_bank_mcl_terms(x, banks, pos, neg, weights, **SETTINGS)
        return torch.stack([terms.vcl, terms.icl])

    assert torch.autograd.gradcheck(hard, (e, w))
    assert torch.autograd.gradgradcheck(hard, (e, w))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_all_terms_to_second_order_equal_the_plain_form(shape):
    m, stages, b, d, more = shape
    e, banks, pos, neg = sample(m, stages, b, d, **more)
    count = m * stages
    generator = torch.Generator().manual_seed(1)
    w = torch.rand(count, count, b, dtype=torch.float64, generator=generator).requires_grad_()
    direction = torch.randn(e.shape, dtype=torch.float64, generator=generator)

    def derivatives(backend: str) -> list[Tensor]:
        terms = layerwise_bank_mcl_terms(e, banks, pos, neg, w, backend=backend, **SETTINGS)
        loss = terms.weighted_sum(0.3, 1.0, 0.5, 0.7)
        first = torch.autograd.grad(loss, [e, w], create_graph=True)
        product = (first[0] * direction).sum() + first[1].square().sum()
        return [loss, *first, *torch.autograd.grad(product, [e, w])]

    for got, want in zip(derivatives("auto"), derivatives("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_objective_equals_terms_to_second_order():
    e, banks, pos, neg = sample(2, 2, 4, 6)
    w = torch.rand(4, 4, 4, dtype=torch.float64)
    coefficients = (0.3, 1.0, 0.5, 0.7)
    terms = layerwise_bank_mcl_terms(e, banks, pos, neg, w, **SETTINGS)
    fused = layerwise_bank_mcl_objective(e, banks, pos, neg, w, weights=coefficients, **SETTINGS)
    for a, b in zip(terms, fused.terms, strict=True):
        torch.testing.assert_close(a, b)
        assert not b.requires_grad
    found = []
    for loss in (terms.weighted_sum(*coefficients), fused.loss):
        (first,) = torch.autograd.grad(loss, e, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), e)
        found.append((loss, first, second))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_nce_derivatives():
    e, banks, pos, neg = sample(3, 1, 4, 5, p=0)
    contrast = torch.cat([pos, neg], 1)
    log_z = bank_nce_log_normalizer(e[:, 0].detach(), banks, contrast)
    assert torch.equal(log_z.diagonal(), torch.zeros(3, dtype=torch.float64))

    def loss(x: Tensor) -> Tensor:
        return bank_nce_loss(x, banks, contrast, log_normalizer=log_z)

    x = e[:, 0].detach().requires_grad_()
    assert torch.autograd.gradcheck(loss, (x,))
    assert torch.autograd.gradgradcheck(loss, (x,))
    # Estimated from the batch, the constants are the same, and still constants.
    torch.testing.assert_close(bank_nce_loss(x, banks, contrast), loss(x))
    (a,) = torch.autograd.grad(bank_nce_loss(x, banks, contrast), x)
    (b,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(a, b)


def test_nce_is_finite_where_probabilities_underflow():
    e, banks, pos, neg = sample(2, 1, 4, 8, p=0)
    contrast = torch.cat([pos, neg], 1)
    x = e[:, 0].detach().float().requires_grad_()
    loss = bank_nce_loss(x, banks.float(), contrast, temperature=0.005)
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.isfinite() and grad.isfinite().all()


# ---------------------------------------------------------------- forms of the arguments


def test_networks_may_differ_in_their_stages():
    e, banks, pos, neg = sample(2, 3, 4, 6)
    nodes = [list(e[0].unbind(0)), [e[1, 2]]]
    got = bank_mcl_rows(nodes, banks, pos, neg)
    want = bank_mcl_rows(e, banks, pos, neg)
    keep = [0, 1, 2, 5]
    torch.testing.assert_close(got.vcl, want.vcl[keep])
    torch.testing.assert_close(got.icl, want.icl[:, keep])
    for name in ("soft_vcl", "soft_icl"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name)[keep][:, keep])


def test_shared_negatives_equal_repeated_ones():
    e, banks, pos, neg = sample(2, 2, 9, 6, k=70)
    shared = neg[0]
    loss = [
        layerwise_bank_mcl_loss(e, banks, pos, indices, weights=(0.1, 1, 0.1, 1))
        for indices in (shared, shared.repeat(9, 1))
    ]
    torch.testing.assert_close(*loss)
    torch.testing.assert_close(*(torch.autograd.grad(x, e)[0] for x in loss))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_of_banks_and_embeddings(stored, given):
    e, banks, pos, neg = sample(2, 2, 6, 32, k=40)
    banks, x = banks.to(stored), e.detach().to(given).requires_grad_()
    exact = e.detach().to(given).double().requires_grad_()
    got = layerwise_bank_mcl_loss(x, banks, pos, neg, weights=(0.1, 1, 0.1, 1))
    want = layerwise_bank_mcl_loss(
        exact, banks.double(), pos, neg, weights=(0.1, 1, 0.1, 1), backend="reference"
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    (a,), (b,) = torch.autograd.grad(got, x), torch.autograd.grad(want, exact)
    assert a.dtype == given
    # The gradient comes in the dtype of the embeddings.
    assert golden.relative(a.double(), b) < 1e-5 + torch.finfo(given).eps


def test_sharp_temperatures_do_not_overflow():
    e, banks, pos, neg = sample(2, 2, 4, 8)
    x = e.detach().float().requires_grad_()
    terms = layerwise_bank_mcl_terms(x, banks.float(), pos, neg, temperature=0.005)
    (grad,) = torch.autograd.grad(terms.weighted_sum(0.1, 1, 0.1, 1), x)
    assert all(t.isfinite() for t in terms) and grad.isfinite().all()


def test_no_gathered_rows_are_kept(backend):
    """What autograd saves: inputs and statistics, not [B, K, D]."""
    if backend == "reference":
        pytest.skip("the plain form keeps gathered rows")
    e, banks, pos, neg = sample(2, 2, 8, 16, n=400, k=300)
    x, sizes = e.detach().float().requires_grad_(), []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.untyped_storage().nbytes() if t.data_ptr() != banks.data_ptr() else 0)
        return t

    banks = banks.float()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layerwise_bank_mcl_terms(x, banks, pos, neg).weighted_sum(0.1, 1, 0.1, 1)
    inputs = x.nbytes + pos.nbytes + neg.nbytes
    rows = 4 * (4 * 8 + 3 * 4 * 4 * 8 + 4 * 2 * 4 * 8)
    assert sum(sizes) <= 4 * (inputs + rows) < 2 * 8 * 300 * 16 * 4


def test_compiles_as_one_graph(backend):
    if backend == "reference":
        pytest.skip("plain PyTorch")
    e, banks, pos, neg = sample(2, 1, 4, 8)

    def loss(x: Tensor) -> Tensor:
        return bank_mcl_loss(x[:, 0], banks, pos, neg, weights=(0.1, 1, 0.1, 1))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (want,) = torch.autograd.grad(loss(e), e)
    (got,) = torch.autograd.grad(compiled(e), e)
    torch.testing.assert_close(got, want)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"banks": None}, TypeError, "^banks: expected a tensor"),
        ({"banks": torch.zeros(3, 9, 6)}, ValueError, r"^banks: expected shape \[2, n, 6\]"),
        ({"banks": torch.zeros(2, 9, 5)}, ValueError, r"^banks: expected shape \[2, n, 6\]"),
        ({"banks": torch.zeros(2, 6, 9).mT}, ValueError, "^banks: expected a contiguous"),
        (
            {"banks": torch.zeros(2, 9, 6).requires_grad_()},
            ValueError,
            "^banks: expected a tensor without req",
        ),
        ({"pos_idx": torch.zeros(4, 2)}, TypeError, "^pos_idx: expected an int64 tensor"),
        ({"pos_idx": torch.zeros(5, 2).long()}, ValueError, r"^pos_idx: expected shape \[4, 1"),
        ({"neg_idx": torch.zeros(4, 0).long()}, ValueError, r"^neg_idx: expected shape \[4, K\]"),
        ({"neg_idx": torch.zeros(0).long()}, ValueError, r"^neg_idx: expected shape \[K\]"),
        ({"temperature": 0.0}, ValueError, "^temperature: expected a number in"),
        ({"weights": (1, 2)}, ValueError, "^weights: expected 4"),
        ({"backend": "triton"}, ValueError, "^backend: expected one with memory-bank losses"),
    ],
)
def test_wrong_arguments(change, error, message):
    e, banks, pos, neg = sample(2, 2, 4, 6)
    arguments = {"banks": banks, "pos_idx": pos, "neg_idx": neg} | change
    with pytest.raises(error, match=message) as caught:
        layerwise_bank_mcl_loss(e, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [-1, 60])
@pytest.mark.parametrize("name", ["pos_idx", "neg_idx"])
def test_numbers_out_of_range(backend, name, wrong):
    e, banks, pos, neg = sample(2, 1, 4, 6)
    indices = {"pos_idx": pos, "neg_idx": neg}
    indices[name][2, 0] = wrong
    with pytest.raises(RuntimeError, match=f"^{name} must be in 0 .. 59, got {wrong}"):
        bank_mcl_terms(e[:, 0], banks, **indices)
    with pytest.raises(RuntimeError, match=f"_idx must be in 0 .. 59, got {wrong}"):
        bank_nce_loss(e[:, 0], banks, torch.cat([pos[:, :1], neg], 1))


def test_indices_of_any_strides():
    e, banks, pos, neg = sample(2, 1, 4, 6)
    x, c = e[:, 0], torch.cat([pos[:, :1], neg], 1)
    by_column, every_other = (lambda i: i.t().contiguous().t()), neg.repeat_interleave(2, 1)[:, ::2]
    want = bank_mcl_terms(x, banks, pos, neg)
    assert bank_mcl_terms(x, banks, by_column(pos), every_other) == want
    assert bank_nce_loss(x, banks, by_column(c)) == bank_nce_loss(x, banks, c)
    shared = bank_mcl_terms(x, banks, pos, neg[0])
    assert bank_mcl_terms(x, banks, pos, every_other[0]) == shared


def test_nce_wrong_arguments():
    e, banks, pos, neg = sample(2, 1, 4, 6)
    with pytest.raises(ValueError, match="^contrast_idx: expected at least one negative"):
        bank_nce_loss(e[:, 0], banks, pos[:, :1])
    with pytest.raises(ValueError, match="^log_normalizer: expected shape"):
        bank_nce_loss(e[:, 0], banks, neg, log_normalizer=torch.zeros(3, 3))
    with pytest.raises(ValueError, match="^eps: expected a number"):
        bank_nce_loss(e[:, 0], banks, neg, eps=-1.0)


# ---------------------------------------------------------------- modules


def test_modules_equal_functions():
    e, banks, pos, neg = sample(2, 2, 4, 6)
    settings = {"temperature": 0.3, "kl_temperature": 2.0}
    keys = (banks, pos, neg)
    assert BankMCLLoss(**settings)(e[:, 0], *keys) == bank_mcl_loss(e[:, 0], *keys, **settings)
    coefficients = (0.3, 1, 0.2, 1)
    w = torch.rand(4, 4, 4, dtype=torch.float64)
    got = LayerwiseBankMCLLoss(weights=coefficients, **settings)(e, *keys, w)
    want = layerwise_bank_mcl_loss(e, *keys, w, weights=coefficients, **settings)
    assert got == want
    contrast = torch.cat([pos[:, :1], neg], 1)
    assert BankNCELoss(0.3)(e[:, 0], banks, contrast) == bank_nce_loss(
        e[:, 0], banks, contrast, temperature=0.3
    )


def test_frozen_normalizers_are_those_of_the_first_batch():
    e, banks, pos, neg = sample(2, 1, 4, 6)
    x, y = e[:, 0].detach(), unit_norm(torch.randn(2, 4, 6, dtype=torch.float64))
    contrast = torch.cat([pos[:, :1], neg], 1)
    log_z = bank_nce_log_normalizer(x, banks, contrast, temperature=0.3)
    loss = BankNCELoss(0.3, freeze_normalizer=True)
    assert "log_normalizer" not in loss.state_dict()
    loss(x, banks, contrast)
    want = bank_nce_loss(y, banks, contrast, temperature=0.3, log_normalizer=log_z)
    torch.testing.assert_close(loss(y, banks, contrast), want)
    other = BankNCELoss(0.3, freeze_normalizer=True)
    other.load_state_dict(loss.state_dict())
    torch.testing.assert_close(other(y, banks, contrast), want)


def test_normalizers_of_an_evaluated_batch_serve_training():
    e, banks, pos, neg = sample(2, 1, 4, 6)
    contrast = torch.cat([pos[:, :1], neg], 1)
    loss = BankNCELoss(0.3, freeze_normalizer=True)
    with torch.inference_mode():
        loss(e[:, 0], banks, contrast)
    loss(e[:, 0], banks, contrast).backward()
    assert e.grad.isfinite().all()
