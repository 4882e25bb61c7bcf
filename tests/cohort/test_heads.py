"""Projection heads, layer matcher, aggregator, distillation and the cohort."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity, kl_div

from mclfast import Cohort, LayerMatcher, LogitAggregator, ProjectionHead, models
from mclfast._base.tensors import unit_norm
from mclfast.losses.distillation import kd_loss
from mclfast.models.auxiliary import PeerNetwork


def test_unit_norm_is_safe_at_zero_to_second_order():
    x = torch.randn(4, 3, dtype=torch.float64)
    x[1] = 0
    x.requires_grad_()
    y = unit_norm(x)
    torch.testing.assert_close(y[[0, 2, 3]].norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert not y[1].any()
    (first,) = torch.autograd.grad((y**2 + y).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), x)
    assert torch.isfinite(first).all() and torch.isfinite(second).all()
    rest = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(unit_norm, (rest,))


def test_projection_head():
    head = ProjectionHead(6, 4)
    out = head(torch.randn(5, 6))
    assert out.shape == (5, 4)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(5))
    with torch.autocast("cpu", torch.bfloat16):
        half = head(torch.randn(5, 6))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.norm(dim=1), torch.ones(5))


def test_layer_matcher_is_the_sigmoid_of_cosines():
    dims = [[3, 5], [4]]
    matcher = LayerMatcher(dims, proj_dim=6).double()
    features = [[torch.randn(7, d, dtype=torch.float64) for d in stages] for stages in dims]
    weights = matcher(features)
    assert weights.shape == (3, 3, 7)
    torch.testing.assert_close(weights, weights.transpose(0, 1))
    projected = [
        matcher.proj[m][k](f) for m, stages in enumerate(features) for k, f in enumerate(stages)
    ]
    for a in range(3):
        for b in range(3):
            want = torch.sigmoid(cosine_similarity(projected[a], projected[b], dim=1))
            torch.testing.assert_close(weights[a, b], want)
    assert weights.min() >= 0.2689 and weights.max() <= 0.7311
    with pytest.raises(ValueError, match=r"features: expected \[2, 1\] stages .*, got \[1, 2\]"):
        matcher([features[0][:1], features[0]])
    with pytest.raises(ValueError, match=r"features\[0\]\[1\]: expected shape \[7, 5\], got"):
        matcher([[features[0][0], features[0][0]], features[1]])
    with pytest.raises(ValueError, match=r"^features\[1\]\[0\]: expected shape \[7, 4\], got \[6"):
        matcher([features[0], [features[1][0][:6]]])
    with pytest.raises(TypeError, match="^features: expected networks of stages .*, got None"):
        matcher(None)
    for wrong, message in (
        ([[3, 0]], r"feature_dims\[0\]\[1\]: expected an integer >= 1, got 0"),
        ([[3, 2.0]], r"feature_dims\[0\]\[1\]: expected an integer >= 1, got 2.0"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            LayerMatcher(wrong)
    with pytest.raises(TypeError, match=r"^feature_dims\[0\]: expected the widths .*, got 3"):
        LayerMatcher([3, 4])
    with pytest.raises(ValueError, match="^proj_dim: expected an integer >= 1, got 0"):
        LayerMatcher(dims, 0)


def test_aggregator_is_a_convex_combination_that_trains_the_features():
    aggregator = LogitAggregator([4, 3], [3, 2])
    features = [
        [torch.randn(5, 4, requires_grad=True) for _ in range(3)],
        [torch.randn(5, 3) for _ in range(2)],
    ]
    same = torch.randn(5, 6)
    out = aggregator(features, [[same] * 3, [same] * 2])
    torch.testing.assert_close(out, [same, same])
    logits = [[torch.randn(5, 6) for _ in stages] for stages in features]
    aggregator(features, logits)[0].square().sum().backward()
    assert all(f.grad is not None and f.grad.any() for f in features[0])
    with pytest.raises(ValueError, match=r"logits: expected \[3, 2\] stages .* got \[2, 2\]"):
        aggregator(features, [logits[0][:2], logits[1]])
    with pytest.raises(ValueError, match="num_stages: expected one number or 2, got 3"):
        LogitAggregator([4, 3], [1, 2, 3])
    with pytest.raises(ValueError, match=r"^feature_dims\[0\]: expected an integer >= 1, got list"):
        LogitAggregator([[4, 4, 4], [3, 3]], [3, 2])
    with pytest.raises(ValueError, match="^num_stages: expected an integer >= 1, got 0"):
        LogitAggregator([4], 0)


def test_aggregator_refuses_tensors_that_do_not_fit():
    aggregator = LogitAggregator([4], 2)
    features, logits = torch.randn(2, 5, 4), torch.randn(2, 5, 6)
    assert aggregator([features], [logits])[0].shape == (5, 6)
    for f, z, message in (
        (features[..., :3], logits, r"features\[0\]\[0\]: expected shape \[B, 4\], got \[5, 3\]"),
        ([features[0], features[1, :4]], logits, r"features\[0\]\[1\]: expected shape \[5, 4\]"),
        (features, logits[:, :4], r"logits\[0\]\[0\]: expected shape \[5, 6\], got \[4, 6\]"),
        (features, [logits[0], logits[1, :, :5]], r"logits\[0\]\[1\]: expected shape \[5, 6\]"),
        (features, [logits[0], logits[1, 0]], r"logits\[0\]\[1\]: expected shape \[5, C\]"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            aggregator([f], [z])
    with pytest.raises(TypeError, match=r"^logits\[0\]\[0\]: expected a tensor .*, got 1"):
        aggregator([features], [[1, 2]])


def test_kd_loss():
    student = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    want = 16 * kl_div(
        (student / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="batchmean"
    )
    got = kd_loss(student, teacher, 4.0)
    torch.testing.assert_close(got, want)
    got.backward()
    assert teacher.grad is None and student.grad is not None


def test_cohort_of_different_networks():
    cohort = Cohort(
        [models.resnet8(num_classes=7), models.wrn_16_2(num_classes=7)], projection_dim=16
    )
    out = cohort(torch.randn(3, 3, 16, 16))
    assert [len(stages) for stages in out.features] == [3, 3]
    assert cohort.feature_dims == [[64] * 3, [128] * 3]
    for stages in out.embeddings:
        for e in stages:
            assert e.shape == (3, 16)
            torch.testing.assert_close(e.norm(dim=1), torch.ones(3))
    assert all(z.shape == (3, 7) for stages in out.logits for z in stages)
    assert [z is stages[-1] for z, stages in zip(out.final_logits, out.logits, strict=True)]


def test_a_cohort_without_heads_is_the_bare_networks():
    network = models.resnet8(num_classes=4)
    cohort = Cohort([network], auxiliary_heads=False, projection_dim=None)
    x = torch.randn(2, 3, 16, 16)
    cohort.eval()
    out = cohort(x)
    assert out.embeddings == () and len(out.logits[0]) == 1
    assert torch.equal(out.final_logits[0], network(x))
    count = models.parameter_count
    assert count(cohort) == count(network)


def test_cohort_errors():
    with pytest.raises(ValueError, match="networks: expected at least one network, got none"):
        Cohort([])
    with pytest.raises(ValueError, match=r"networks: expected one number of classes .* \[3, 4\]"):
        Cohort([models.resnet8(num_classes=3), models.resnet8(num_classes=4)])
    network = models.resnet8(num_classes=3)
    with pytest.raises(ValueError, match="^networks: expected different networks, got one of them"):
        Cohort([network, network])
    peer = PeerNetwork(network, auxiliary_heads=False)
    with pytest.raises(ValueError, match="^networks: expected different networks, got one of them"):
        Cohort([peer, network])
    for wrong in (network, peer, 3):
        with pytest.raises(TypeError, match="^networks: expected a list of networks, got "):
            Cohort(wrong)
    for dim in (0, -4, 2.0):
        with pytest.raises(ValueError, match="^projection_dim: expected an integer >= 1, got "):
            Cohort([network], projection_dim=dim)
