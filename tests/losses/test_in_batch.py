"""The in-batch losses: values, derivatives, invariances, edge cases, dtypes and errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, kl_div

import mclfast
from helpers import literal
from mclfast import layerwise_mcl_terms, mcl_terms
from mclfast._base.tensors import unit_norm
from mclfast.losses.in_batch import (
    info_nce_loss,
    layerwise_mcl_loss,
    mcl_loss,
    mcl_rows,
    similarity_kl_loss,
    supcon_loss,
)

NAMES = ("vcl", "soft_vcl", "icl", "soft_icl")

pytestmark = pytest.mark.usefixtures("backend")


def make(stages, batch=9, width=5, classes=4, dtype=torch.float64, seed=0):
    """Embeddings as networks of stages, labels [B]."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = [
        [
            unit_norm(torch.randn(batch, width, generator=generator, dtype=torch.float64)).to(dtype)
            for _ in range(count)
        ]
        for count in stages
    ]
    return embeddings, torch.randint(classes, (batch,), generator=generator)


@pytest.mark.parametrize("stages", [[1], [3], [2, 1], [1, 2, 2]])
@pytest.mark.parametrize(("temperature", "kl_temperature"), [(0.1, 3.0), (0.07, 2.5), (2.0, 1.0)])
def test_rows_equal_literal_double_loops(stages, temperature, kl_temperature):
    embeddings, labels = make(stages)
    rows = mcl_rows(embeddings, labels, temperature=temperature, kl_temperature=kl_temperature)
    networks = [m for m, count in enumerate(stages) for _ in range(count)]
    nodes = torch.stack([node for network in embeddings for node in network])
    want = literal.mcl_rows(nodes, networks, labels, temperature, kl_temperature)
    for name in NAMES:
        torch.testing.assert_close(getattr(rows, name), want[name], rtol=1e-12, atol=1e-12)
    same = labels[:, None] == labels[None, :]
    assert rows.valid.tolist() == (same.sum(1) > 1).tolist()


def test_tensor_and_sequence_inputs_agree():
    embeddings, labels = make([2, 2])
    stacked = torch.stack([torch.stack(network) for network in embeddings])
    for a, b in zip(mcl_rows(embeddings, labels), mcl_rows(stacked, labels), strict=True):
        assert torch.equal(a, b)
    last = [network[-1] for network in embeddings]
    for a, b in zip(mcl_terms(last, labels), mcl_terms(torch.stack(last), labels), strict=True):
        assert torch.equal(a, b)


def test_row_slices_put_together_are_the_whole():
    embeddings, labels = make([2, 1], batch=11)
    whole = mcl_rows(embeddings, labels)
    parts = [
        mcl_rows(embeddings, labels, row_start=start, row_count=count)
        for start, count in ((0, 4), (4, 1), (5, None))
    ]
    for i, rows in enumerate(whole):
        torch.testing.assert_close(torch.cat([p[i] for p in parts], -1), rows)


def test_losses_are_sums_of_rows():
    embeddings, labels = make([1, 1, 1])
    rows = mcl_rows(embeddings, labels)
    for term, row in zip(mcl_terms([e[0] for e in embeddings], labels), rows[:4], strict=True):
        torch.testing.assert_close(term, row.mean(-1).sum())

    embeddings, labels = make([2, 1])
    rows = mcl_rows(embeddings, labels)
    networks = [0, 0, 1]
    weights = torch.rand(3, 3, 9, dtype=torch.float64)
    terms = layerwise_mcl_terms(embeddings, labels, weights)
    want = {name: 0.0 for name in NAMES}
    for a in range(3):
        for b in range(3):
            if networks[a] != networks[b]:
                u = weights[a, b] + weights[b, a]
                want["vcl"] += (u * rows.vcl[a]).sum() / 9
                for name in NAMES[1:]:
                    want[name] += (u * getattr(rows, name)[a, b]).sum() / 9
    for name in NAMES:
        torch.testing.assert_close(getattr(terms, name), want[name])
    ones = layerwise_mcl_terms(embeddings, labels, torch.ones(3, 3, 9, dtype=torch.float64))
    for a, b in zip(layerwise_mcl_terms(embeddings, labels), ones, strict=True):
        torch.testing.assert_close(a, b)


def test_unused_weights_inside_a_network_may_be_anything():
    embeddings, labels = make([2, 1])
    weights = torch.rand(3, 3, 9, dtype=torch.float64)
    spoiled = weights.clone()
    spoiled[:2, :2] = float("nan")
    for a, b in zip(
        layerwise_mcl_terms(embeddings, labels, weights),
        layerwise_mcl_terms(embeddings, labels, spoiled),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_supcon_info_nce_and_similarity_kl_equal_their_eager_expressions():
    (a, b), labels = (e[0] for e in make([1, 1])[0]), make([1])[1]
    s = a @ a.T / 0.2
    off = s.masked_fill(torch.eye(9, dtype=torch.bool), float("-inf"))
    rows = []
    for r in range(9):
        positives = [c for c in range(9) if c != r and labels[c] == labels[r]]
        if positives:
            rows.append(off[r].logsumexp(0) - s[r, positives].mean())
        else:
            rows.append(s.new_zeros(()))
    torch.testing.assert_close(supcon_loss(a, labels, temperature=0.2), torch.stack(rows).mean())

    cross, target = a @ b.T / 0.3, torch.arange(9)
    want = (cross_entropy(cross, target) + cross_entropy(cross.T, target)) / 2
    torch.testing.assert_close(info_nce_loss(a, b, temperature=0.3), want)

    wide = torch.cat([b, b.flip(1)], dim=1)
    student, teacher = a @ a.T / 0.1 / 4, wide @ wide.T / 0.1 / 4
    want = 16 * kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    torch.testing.assert_close(similarity_kl_loss(a, wide, kl_temperature=4.0), want)


def raw_leaves(stages, batch=6, width=3):
    """Unnormalised float64 leaves; the losses take their normalised values."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, width, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(sum(stages))
    ]


def regroup(nodes, stages):
    it = iter(nodes)
    return [[unit_norm(next(it)) for _ in range(count)] for count in stages]


@pytest.mark.parametrize("second", [False, True])
def test_gradcheck(second):
    """Where no teacher is detached, autograd must agree with finite differences."""
    labels = torch.tensor([0, 1, 0, 2, 1, 1])
    stages = [1, 2]
    weights = torch.rand(3, 3, 6, dtype=torch.float64).requires_grad_()

    def contrastive(w, *nodes):
        terms = layerwise_mcl_terms(regroup(nodes, stages), labels, w, temperature=0.5)
        return terms.vcl + terms.icl

    check = torch.autograd.gradgradcheck if second else torch.autograd.gradcheck
    assert check(contrastive, (weights, *raw_leaves(stages)))
    a, b = raw_leaves([1, 1])
    assert check(lambda x: supcon_loss(unit_norm(x), labels), (a,))
    assert check(lambda x, z: info_nce_loss(unit_norm(x), unit_norm(z)), (a, b))
    teacher = unit_norm(b.detach())
    assert check(lambda x: similarity_kl_loss(unit_norm(x), teacher), (a,))


@pytest.mark.parametrize("second", [False, True])
def test_gradcheck_of_soft_terms_with_frozen_teachers(second):
    """Each soft row with its teacher held constant, as the definition detaches it."""
    labels = torch.tensor([0, 1, 0, 2, 1, 1])
    fixed = [unit_norm(x.detach()) for x in raw_leaves([1, 1], width=4)]

    def soft_vcl(x):
        return mcl_rows([[unit_norm(x)], [fixed[1]]], labels, temperature=0.5).soft_vcl[0, 1]

    def gradient_of_soft_vcl(x):
        """Node 0 as a teacher must not receive anything."""
        rows = mcl_rows([[unit_norm(x)], [fixed[1]]], labels, temperature=0.5)
        return rows.soft_vcl[1, 0]

    x = raw_leaves([1], width=4)[0]
    check = torch.autograd.gradgradcheck if second else torch.autograd.gradcheck
    assert check(soft_vcl, (x,))
    (grad,) = torch.autograd.grad(gradient_of_soft_vcl(x).sum(), x, allow_unused=True)
    assert grad is None or not grad.any()


def test_soft_icl_gradient_goes_through_the_student_logits_only():
    a, b = raw_leaves([1, 1])
    labels = torch.tensor([0, 1, 0, 2, 1, 1])
    rows = mcl_rows([[unit_norm(a)], [unit_norm(b)]], labels, temperature=0.5).soft_icl[0, 1]
    got = torch.autograd.grad(rows.sum(), (a, b))
    student = unit_norm(a) @ unit_norm(b).T / 0.5 / 3
    teacher = (unit_norm(b) @ unit_norm(a).T / 0.5 / 3).softmax(1).detach()
    want = torch.autograd.grad(
        9 * (teacher * (teacher.log() - student.log_softmax(1))).sum(), (a, b)
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@settings(max_examples=25, deadline=None)
@given(
    stages=st.lists(st.integers(1, 2), min_size=1, max_size=3),
    batch=st.integers(1, 8),
    width=st.integers(1, 6),
    seed=st.integers(0, 99),
    temperature=st.sampled_from([0.02, 0.1, 0.5, 3.0]),
)
def test_permuting_the_batch_permutes_the_rows(stages, batch, width, seed, temperature):
    embeddings, labels = make(stages, batch, width, seed=seed)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    rows = mcl_rows(embeddings, labels, temperature=temperature)
    moved = mcl_rows(
        [[node[order] for node in network] for network in embeddings],
        labels[order],
        temperature=temperature,
    )
    for a, b in zip(rows, moved, strict=True):
        assert torch.isfinite(a.double()).all()
        torch.testing.assert_close(a[..., order], b, rtol=1e-9, atol=1e-9)


def test_peer_order_permutes_the_nodes():
    embeddings, labels = make([2, 1, 2])
    rows = mcl_rows(embeddings, labels)
    moved = mcl_rows([embeddings[2], embeddings[0], embeddings[1]], labels)
    order = [3, 4, 0, 1, 2]
    torch.testing.assert_close(moved.vcl, rows.vcl[order])
    for name in NAMES[1:]:
        torch.testing.assert_close(getattr(moved, name), getattr(rows, name)[order][:, order])


def test_temperature_scales_the_similarities():
    embeddings, labels = make([1, 1])
    scaled = [[2 * node for node in network] for network in embeddings]
    for a, b in zip(
        mcl_rows(embeddings, labels, temperature=0.1),
        mcl_rows(scaled, labels, temperature=0.4),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_lone_network_has_no_pair_rows():
    embeddings, labels = make([3])
    rows = mcl_rows(embeddings, labels)
    assert rows.vcl.any()
    for name in NAMES[1:]:
        assert not getattr(rows, name).any()
    terms = layerwise_mcl_terms(embeddings, labels)
    assert [float(t) for t in terms] == [0.0] * 4


def test_identical_networks_have_no_soft_loss():
    (network,), labels = make([1])
    rows = mcl_rows([network, network], labels)
    torch.testing.assert_close(rows.soft_vcl, torch.zeros_like(rows.soft_vcl))
    torch.testing.assert_close(rows.soft_icl, torch.zeros_like(rows.soft_icl))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-3, 0.01, 0.07, 10.0])
def test_never_nan(dtype, temperature):
    """Peaked distributions, classes of one sample and a batch of one, in every dtype."""
    for batch, classes in ((12, 4), (5, 5), (1, 1)):
        embeddings, labels = make([2, 1], batch=batch, dtype=dtype)
        labels = labels if classes == 4 else torch.arange(batch)
        leaves = [[node.clone().requires_grad_() for node in network] for network in embeddings]
        rows = mcl_rows(leaves, labels, temperature=temperature)
        assert rows.vcl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        flat = [node for network in leaves for node in network]
        first = torch.autograd.grad(
            sum((row**2).sum() for row in rows[:4]), flat, create_graph=True
        )
        second = torch.autograd.grad(sum(g.double().sum() for g in first), flat)
        # Gradients of order 1 / temperature**2 do not fit float16, however they are computed.
        fits = dtype != torch.float16 or temperature > 0.05
        for value in (*rows[:4], *((*first, *second) if fits else ())):
            assert torch.isfinite(value).all()
        if classes != 4:
            assert not rows.valid.any() and not rows.vcl.any() and not rows.icl.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_give_the_float32_result_of_the_rounded_values(dtype):
    embeddings, labels = make([1, 1], dtype=dtype)
    rounded = [[node.float() for node in network] for network in embeddings]
    for a, b in zip(mcl_rows(embeddings, labels), mcl_rows(rounded, labels), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_does_not_lower_the_precision():
    embeddings, labels = make([1, 1], dtype=torch.float32)
    want = mcl_rows(embeddings, labels)
    with torch.autocast("cpu", torch.bfloat16):
        got = mcl_rows(embeddings, labels)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_an_arbitrary_grad_output_reaches_the_rows():
    embeddings, labels = make([1, 1])
    leaves = [[node.clone().requires_grad_() for node in network] for network in embeddings]
    flat = [network[0] for network in leaves]
    rows = mcl_rows(leaves, labels)
    weights = torch.rand_like(rows.icl)
    got = torch.autograd.grad(rows.icl, flat, weights)
    want = torch.autograd.grad((mcl_rows(leaves, labels).icl * weights).sum(), flat)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_modules_are_twins_of_the_functions():
    embeddings, labels = make([1, 1])
    a, b = embeddings[0][0], embeddings[1][0]
    kw = {"temperature": 0.2, "kl_temperature": 2.0}
    pairs = [
        (mclfast.MCLLoss(**kw)([a, b], labels), mcl_loss([a, b], labels, **kw)),
        (mclfast.MCLLoss()([a, b], labels), mcl_loss([a, b], labels)),
        (
            mclfast.LayerwiseMCLLoss(**kw)(embeddings, labels),
            layerwise_mcl_loss(embeddings, labels, **kw),
        ),
        (mclfast.LayerwiseMCLLoss()(embeddings, labels), layerwise_mcl_loss(embeddings, labels)),
        (mclfast.SupConLoss(0.2)(a, labels), supcon_loss(a, labels, temperature=0.2)),
        (mclfast.SupConLoss()(a, labels), supcon_loss(a, labels)),
        (mclfast.InfoNCELoss(0.2)(a, b), info_nce_loss(a, b, temperature=0.2)),
        (mclfast.InfoNCELoss()(a, b), info_nce_loss(a, b)),
        (mclfast.SimilarityKLLoss(**kw)(a, b), similarity_kl_loss(a, b, **kw)),
        (mclfast.SimilarityKLLoss()(a, b), similarity_kl_loss(a, b)),
    ]
    for got, want in pairs:
        assert torch.equal(got, want)
    assert "kl_temperature=2.0" in repr(mclfast.MCLLoss(**kw))


E2, Y2 = torch.ones(2, 3, 4, 5), torch.zeros(4, dtype=torch.long)

ERRORS = [
    (lambda: mcl_rows(E2[0], Y2), ValueError, r"embeddings: expected shape \[M, L, B, D\], got"),
    (lambda: mcl_terms(E2, Y2), ValueError, r"embeddings: expected shape \[M, B, D\], got"),
    (lambda: mcl_rows(E2.long(), Y2), TypeError, r"embeddings: expected a float16, .* got int64"),
    (lambda: mcl_rows("x", Y2), TypeError, "embeddings: expected a tensor or a sequence .* 'x'"),
    (lambda: mcl_rows([], Y2), TypeError, "embeddings: .* got list of length 0"),
    (lambda: mcl_rows([E2[0, 0]], Y2), TypeError, r"embeddings\[0\]: expected a non-empty seq"),
    (
        lambda: mcl_rows([[E2[0, 0]], [E2[0, 0, :3]]], Y2),
        ValueError,
        r"embeddings\[1\]\[0\]: expected shape \[4, 5\], got \[3, 5\]",
    ),
    (
        lambda: mcl_terms([E2[0, 0], E2[0, 0].double()], Y2),
        ValueError,
        r"embeddings\[1\]: expected dtype torch.float32 as the first node has, got torch.float64",
    ),
    (
        lambda: mcl_terms([E2[0, 0], E2[0, 0].to("meta")], Y2),
        ValueError,
        r"embeddings\[1\]: expected device cpu as the first node has, got meta",
    ),
    (lambda: mcl_rows(E2, Y2[:3]), ValueError, r"labels: expected shape \[4\], got \[3\]"),
    (lambda: mcl_rows(E2, Y2.float()), TypeError, "labels: expected an integer tensor .* float32"),
    (lambda: mcl_rows(E2, [0, 0, 0, 0]), TypeError, "labels: expected an integer tensor .* list"),
    (lambda: mcl_rows(E2, Y2.to("meta")), ValueError, "labels: expected device cpu .* got meta"),
    (
        lambda: mcl_rows(E2, Y2, temperature=0.0),
        ValueError,
        r"^temperature: expected a number in \[1e-6, 1e6\], got 0.0",
    ),
    (lambda: mcl_rows(E2, Y2, temperature="a"), TypeError, "temperature: .* got 'a'"),
    (
        lambda: mcl_rows(E2, Y2, kl_temperature=float("nan")),
        ValueError,
        r"kl_temperature: expected a number in \[1e-6, 1e6\], got nan",
    ),
    (lambda: mcl_rows(E2, Y2, row_start=4), ValueError, r"row_start: .* \[0, 4\), got 4"),
    (
        lambda: mcl_rows(E2, Y2, row_start=2, row_count=3),
        ValueError,
        r"row_count: expected an integer in \[1, 2\], got 3",
    ),
    (lambda: mcl_rows(E2, Y2, backend="gpu"), ValueError, "backend.*'gpu'"),
    (
        lambda: layerwise_mcl_terms(E2, Y2, torch.ones(6, 6)),
        ValueError,
        r"pair_weights: expected shape \[6, 6, 4\], got \[6, 6\]",
    ),
    (
        lambda: layerwise_mcl_terms(E2, Y2, torch.ones(6, 6, 4, device="meta")),
        ValueError,
        "pair_weights: expected device cpu as embeddings has, got meta",
    ),
    (lambda: supcon_loss(E2[0], Y2), ValueError, r"embeddings: expected shape \[B, D\], got"),
    (lambda: supcon_loss(E2[0, 0, :0], Y2[:0]), ValueError, r"expected shape \[B, D\], got \[0,"),
    (lambda: info_nce_loss(E2[0, 0], E2[0, 0, :2]), ValueError, r"b: expected shape \[4, 5\], got"),
    (
        lambda: similarity_kl_loss(E2[0, 0], E2[0, 0, :2]),
        ValueError,
        r"teacher: expected shape \[4, D\], got \[2, 5\]",
    ),
    (lambda: mclfast.SupConLoss(temperature=-1), ValueError, "temperature: .* got -1"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS)
def test_errors_name_the_argument_in_one_line(call, kind, message):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_compiles_without_graph_breaks():
    embeddings, labels = make([2, 1], dtype=torch.float32)
    compiled = torch.compile(layerwise_mcl_terms, fullgraph=True, backend="eager")
    for a, b in zip(
        compiled(embeddings, labels), layerwise_mcl_terms(embeddings, labels), strict=True
    ):
        torch.testing.assert_close(a, b)
