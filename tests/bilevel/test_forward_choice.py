"""When forward mode runs through the networks, and when plain double backward does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from helpers.unrolled import unrolled
from mclfast import bilevel_gradient
from mclfast.bilevel import forward_choice
from mclfast.bilevel.split_step import SplitStep

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


class Net(nn.Module):
    """A convolution, what comes in the middle, and a classifier."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x)).mean((2, 3)))


class Problem:
    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        torch.manual_seed(0)
        self.net = Net(middle).double()
        self.x = torch.randn(6, 2, 6, 6, dtype=torch.float64)
        self.labels = torch.arange(6) % 3
        self.hyper = [torch.randn(6, dtype=torch.float64, requires_grad=True)]
        self.params = dict(self.net.named_parameters())
        self.dual_runs = 0

    def network(self, theta: dict[str, Tensor]) -> Tensor:
        buffers = {name: b.clone() for name, b in self.net.named_buffers()}
        return functional_call(self.net, {**theta, **buffers}, (self.x,))

    def inner(self, logits: Tensor) -> Tensor:
        each = F.cross_entropy(logits, self.labels, reduction="none")
        return (self.hyper[0].sigmoid() * each).mean()

    def outer(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, self.labels)

    def check(self, monkeypatch: pytest.MonkeyPatch, *, parts: bool = False) -> int:
        """Compares with the unrolled steps; returns the number of runs in forward mode."""
        runs = 0
        original = SplitStep.dual_run

        def counted(self: SplitStep, *args: Any) -> Any:
            nonlocal runs
            runs += 1
            return original(self, *args)

        monkeypatch.setattr(SplitStep, "dual_run", counted)
        inner, outer, network = self.inner, self.outer, self.network
        got = bilevel_gradient(
            (lambda o: inner(o[0])) if parts else inner,
            (lambda o: outer(o[0])) if parts else outer,
            self.params,
            self.hyper,
            network=[network] if parts else network,
            **STEPS,
        )
        want = unrolled(
            {name: p.detach() for name, p in self.params.items()},
            self.hyper,
            lambda p: inner(network(p)),
            lambda p: outer(network(p)),
            2,
            1,
            *STEPS.values(),
        )[1]
        for g, w in zip(got.grads, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12 * float(w.abs().max()))
        return runs


def _attention(x: Tensor) -> Tensor:
    t = x.flatten(2).transpose(1, 2)
    found = F.scaled_dot_product_attention(t, t, t)
    return found.transpose(1, 2).unflatten(2, x.shape[2:])


def _scripted() -> Callable[[Tensor], Tensor]:
    @torch.jit.script
    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, [4, 4, 4])

    return norm


@pytest.mark.parametrize(
    "middle",
    [
        nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)),
        nn.Sequential(nn.GroupNorm(2, 4), nn.GELU()),
        nn.LayerNorm((4, 4, 4)),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    ],
    ids=["batch", "group", "layer", "instance"],
)
def test_known_operations_run_in_forward_mode(
    middle: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        assert Problem(middle).check(monkeypatch) == 3
    assert not caplog.records


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize(
    ("middle", "name"),
    [
        (lambda x: x.softmax(1), "Softmax"),
        (lambda x: x * x.logsumexp(1, keepdim=True), "Logsumexp"),
        (_attention, "Softmax"),
        (lambda x: torch.layer_norm(x, x.shape[1:]), "NativeLayerNorm"),
        (
            lambda x: torch.instance_norm(x, None, None, None, None, True, 0, 1e-5, False),
            "BatchNorm",
        ),
        (_scripted(), "NativeLayerNorm"),
    ],
    ids=[
        "softmax",
        "logsumexp",
        "attention",
        "torch.layer_norm",
        "torch.instance_norm",
        "scripted",
    ],
)
def test_other_operations_are_differentiated_twice(
    middle: Any,
    name: str,
    parts: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(forward_choice, "_said", set())
    problem = Problem(middle)
    for _ in range(2):
        assert problem.check(monkeypatch, parts=parts) == 0
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and name in said[0] and "plain double backward" in said[0]


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("leaf", [True, False])
def test_hyperparameters_read_by_the_network(
    leaf: bool, parts: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(forward_choice, "_said", set())
    source = torch.randn(4, dtype=torch.float64, requires_grad=True)
    scale = source if leaf else source.exp()
    problem = Problem(lambda x: x.tanh() * scale[:, None, None])
    problem.hyper.append(scale)
    assert problem.check(monkeypatch, parts=parts) == 0
    assert [r.getMessage() for r in caplog.records if "reads hyperparameters" in r.getMessage()]


class Double(torch.autograd.Function):
    """Linear, with a rule for forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2 * tangent


class Square(torch.autograd.Function):
    """Its rule for forward mode takes the value that it saved for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.value = x.detach().clone()
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2 * ctx.value * tangent


def test_functions_with_a_rule_of_their_own(monkeypatch: pytest.MonkeyPatch):
    assert Problem(lambda x: Double.apply(x).tanh()).check(monkeypatch) == 3
    assert Problem(lambda x: Square.apply(x).tanh()).check(monkeypatch) == 0


def test_blocks_that_are_run_again_for_their_gradient(monkeypatch: pytest.MonkeyPatch):
    """The second run of a checkpointed block knows no tangents."""
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Tanh())
    monkeypatch.setattr(forward_choice, "_said", set())
    problem = Problem(lambda x: checkpoint(block.double(), x, use_reentrant=False))
    assert problem.check(monkeypatch) > 0
    assert any("checkpoint" in reason for reason in forward_choice._said)


def test_the_graph_of_a_network_is_freed():
    """The look at it keeps no node, and so none of the tensors that a node saves."""
    held: list[int] = []

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()
            held.append(1)

        def __del__(self) -> None:
            held.pop()

    problem = Problem(nn.BatchNorm2d(4))
    seen: list[int] = []

    def inner(logits: Tensor) -> Tensor:
        seen.append(len(held))
        return problem.inner(logits)

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        bilevel_gradient(
            inner, problem.outer, problem.params, problem.hyper, network=problem.network, **STEPS
        )
    assert seen[0] == seen[1] > 0
    assert not held


def test_weight_norm_is_said_to_be_inexact(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(forward_choice, "_said", set())
    problem = Problem(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)))
    problem.check(monkeypatch)
    assert any("weight_norm" in record.getMessage() for record in caplog.records)
