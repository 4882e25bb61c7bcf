"""The bilevel gradient with the networks apart from the losses, against the unrolled steps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from test_meta import unrolled
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mclfast import bilevel_gradient

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}


class Peer(nn.Module):
    """Convolutions with and without bias, groups and batch norm; dropout; two outputs."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, 3, stride=2, bias=False, groups=2),
            nn.BatchNorm2d(6, affine=False),
            nn.Tanh(),
            nn.Dropout(0.3),
            nn.Conv2d(6, 4, 1),
            middle or nn.Identity(),
            nn.SELU(inplace=True),
        )
        self.classifier = nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor | str]:
        feature = self.layers(x).mean((2, 3))
        return {"feature": feature, "logits": self.classifier(feature), "name": "peer"}


class Problem:
    """Two peers, a loss between them with hyperparameters, and one of each alone."""

    def __init__(self, *middle: nn.Module, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.peers = nn.ModuleList(Peer(*middle) for _ in range(2)).to(dtype)
        self.images = torch.randn(6, 2, 7, 7, dtype=dtype)
        self.labels = torch.arange(6) % 3
        matrix, bias = torch.randn(4, 4, dtype=dtype), torch.randn(2, dtype=dtype)
        self.hyper = [matrix.requires_grad_(), bias.requires_grad_()]
        self.params = dict(self.peers.named_parameters())
        self.parts = [self.part(j) for j in range(2)]

    def part(self, peer: int):
        def outputs(params):
            prefix = f"{peer}."
            own = {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}
            module = self.peers[peer]
            own |= {k: v.clone() for k, v in module.named_buffers()}
            return functional_call(module, own, (self.images,))

        return outputs

    def whole(self, params):
        return [part(params) for part in self.parts]

    def inner(self, outputs):
        a, b = (out["feature"] for out in outputs)
        weights = torch.sigmoid(a @ self.hyper[0] * b)
        return (weights * (a - b.detach()) ** 2).sum() + (self.hyper[1] ** 2).sum() * (a * b).sum()

    def outer(self, outputs):
        return sum(F.cross_entropy(out["logits"], self.labels) for out in outputs)

    def gradient(self, network, **steps):
        return bilevel_gradient(
            self.inner, self.outer, self.params, self.hyper, network=network, **STEPS, **steps
        )

    def unrolled(self, inner_steps: int = 2, outer_steps: int = 1):
        params = {k: v.detach() for k, v in self.params.items()}
        return unrolled(
            params,
            self.hyper,
            lambda p: self.inner(self.whole(p)),
            lambda p: self.outer(self.whole(p)),
            inner_steps,
            outer_steps,
            *STEPS.values(),
        )


def check(problem: Problem, network, inner_steps: int = 2, outer_steps: int = 1) -> None:
    state = torch.get_rng_state()
    got = problem.gradient(network, inner_steps=inner_steps, outer_steps=outer_steps)
    assert torch.equal(torch.get_rng_state(), state)
    loss, want = problem.unrolled(inner_steps, outer_steps)
    torch.testing.assert_close(got.outer_loss, loss.detach(), rtol=1e-12, atol=0)
    for g, w in zip(got.grads, want, strict=True):
        assert w.abs().max() > 1e-6
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-11 * float(w.abs().max()))
    assert len(got.inner_losses) == inner_steps
    assert not any(t.requires_grad for t in (*got.grads, *got.inner_losses, got.outer_loss))


@pytest.mark.parametrize("inner_steps", [1, 2, 3])
@pytest.mark.parametrize("outer_steps", [0, 1, 2])
@pytest.mark.parametrize("kind", ["whole", "parts"])
def test_equals_autograd_through_unrolled_steps(kind, inner_steps, outer_steps):
    problem = Problem()
    buffers = copy.deepcopy(dict(problem.peers.named_buffers()))
    check(problem, getattr(problem, kind), inner_steps, outer_steps)
    for name, value in problem.peers.named_buffers():
        assert torch.equal(value, buffers[name])


def test_channels_last_images_in_evaluation_mode():
    problem = Problem()
    problem.images = problem.images.to(memory_format=torch.channels_last)
    check(problem, problem.whole)
    problem.peers.eval()
    check(problem, problem.parts)


class Cube(torch.autograd.Function):
    """No rule for forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


@torch.library.custom_op("mclfast_test::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    """Drops tangents without a word where there is no graph."""
    return x**3


cube.register_autograd(
    lambda ctx, grad: 3 * ctx.saved_tensors[0] ** 2 * grad,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Call(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("kind", ["whole", "parts"])
@pytest.mark.parametrize("operation", [Cube.apply, cube, torch.ops.mclfast_test.cube])
def test_operations_without_forward_mode(operation, kind):
    problem = Problem(Call(operation))
    check(problem, getattr(problem, kind))
    check(problem, getattr(problem, kind), inner_steps=1, outer_steps=0)
