"""The bilevel gradient with the networks apart from the losses, against the unrolled steps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.unrolled import unrolled
from mclfast import Cohort, bilevel_gradient, models
from mclfast.bilevel.split_step import SplitStep
from mclfast.cohort.functions import cohort_function, peer_functions
from mclfast.cohort.outputs import joined

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
    problem.peers.to(memory_format=torch.channels_last)
    check(problem, problem.whole)
    problem.peers.eval()
    check(problem, problem.parts)


def test_parameters_left_out():
    problem = Problem()
    for name in ("0.layers.0.weight", "0.layers.7.bias", "1.layers.1.weight", "1.layers.1.bias"):
        del problem.params[name]
    check(problem, problem.whole)
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


def counted(monkeypatch, step_name: str):
    """Backward convolutions while ``SplitStep.<step_name>`` runs, call by call."""
    counts: list[int] = []
    original = getattr(SplitStep, step_name)

    def call(self, *args, **settings):
        with Count() as count:
            result = original(self, *args, **settings)
        counts.append(count.backward)
        return result

    monkeypatch.setattr(SplitStep, step_name, call)
    return counts


class Count(TorchDispatchMode):
    """Counts convolutions, those of the forward and of the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forward += func is torch.ops.aten.convolution.default
        self.backward += func is torch.ops.aten.convolution_backward.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["whole", "parts"])
def test_no_parameter_gradient_for_the_first_step(kind, monkeypatch):
    problem = Problem()
    counts = counted(monkeypatch, "product")
    problem.gradient(getattr(problem, kind))
    outer, inner, first = counts
    # Per convolution: through value, tangent, and the constant direction of the weight; the first
    # of the three in each peer takes images, which have neither tangent nor gradient.
    assert outer == inner == 2 * (1 + 3 + 3)
    assert first == 0


def test_the_last_step_does_not_compute_its_values_again(monkeypatch):
    problem = Problem()
    found: list[int] = []
    original = SplitStep.dual_run

    def run(self, *args):
        with Count() as count:
            result = original(self, *args)
        found.append(count.forward)
        return result

    monkeypatch.setattr(SplitStep, "dual_run", run)
    problem.gradient(problem.whole)
    # Value and two parts of the tangent, but the image has no tangent. The value of the last one is
    # lost in the outer step: what follows it works in place.
    assert found == [2 * (1 + 2 + 3), 2 * (2 + 3 + 3), 2 * (2 + 3 + 3)]


def peak_saved(function) -> int:
    """Largest number of bytes that graphs hold at one time."""
    held: dict[int, list[int]] = {}
    peak = total = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal peak, total
            # With its graph, an output would keep alive the node that keeps it.
            self.tensor = tensor.detach()
            storage = tensor.untyped_storage()
            self.key = storage.data_ptr()
            entry = held.setdefault(self.key, [0, storage.nbytes()])
            if entry[0] == 0:
                total += entry[1]
                peak = max(peak, total)
            entry[0] += 1

        def __del__(self) -> None:
            nonlocal total
            entry = held[self.key]
            entry[0] -= 1
            if entry[0] == 0:
                total -= entry[1]
                del held[self.key]

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        function()
    return peak


def test_memory_of_graphs():
    """At most 2.5 ordinary steps, and those of one peer of two where each runs alone."""
    torch.manual_seed(0)
    cohort = Cohort([models.create("resnet8", num_classes=10) for _ in range(2)])
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    params = dict(cohort.named_parameters())
    hyper = [torch.ones(()).requires_grad_()]

    def outer(outputs):
        logits = [z for own in outputs.logits for z in own]
        return torch.stack([F.cross_entropy(z, labels) for z in logits]).sum()

    def inner(outputs):
        return hyper[0].sigmoid() * (outputs.features[0][0] * outputs.features[1][2]).sum()

    def ordinary():
        torch.autograd.grad(outer(cohort(images)), list(params.values()), allow_unused=True)

    def bilevel(network, inner, outer):
        bilevel_gradient(inner, outer, params, hyper, network=network, lr=0.1)

    parts = peer_functions(cohort, images)
    whole = cohort_function(cohort, images)
    sequential = (
        lambda peers: inner(joined(peers, [images] * 2)),
        lambda peers: outer(joined(peers, [images] * 2)),
    )
    base = peak_saved(ordinary)
    split = peak_saved(lambda: bilevel(whole, inner, outer))
    one = peak_saved(lambda: bilevel(parts, *sequential))
    assert split <= 2.2 * base
    assert one <= 1.3 * base


def test_one_network_at_a_time_without_forward_mode():
    problem = Problem(nn.Sequential(nn.Softmax2d(), nn.Conv2d(4, 4, 1)))
    problem.images = torch.randn(64, 2, 7, 7, dtype=torch.float64)
    problem.labels = torch.arange(64) % 3
    whole, parts = (
        peak_saved(lambda network=network: problem.gradient(network))
        for network in (problem.whole, problem.parts)
    )
    assert parts < 0.7 * whole


def test_autocast_comes_close():
    problem = Problem(dtype=torch.float32)
    problem.peers.eval()
    want = problem.gradient(problem.whole).grads
    for network in (problem.whole, problem.parts, [problem.parts[0], problem.parts[1]]):
        with torch.autocast("cpu", torch.bfloat16):
            got = problem.gradient(network).grads
        for g, w in zip(got, want, strict=True):
            assert g.dtype == torch.float32
            # bfloat16 rounds by up to 2**-9, layer after layer.
            assert 1e-6 < (g - w).norm() / w.norm() < 0.06


def test_autocast_comes_as_close_as_double_backward():
    problem = Problem(dtype=torch.float32)
    plain = [
        bilevel_gradient(
            lambda p: problem.inner(problem.whole(p)),
            lambda p: problem.outer(problem.whole(p)),
            problem.params,
            problem.hyper,
            **STEPS,
        ).grads
    ]
    with torch.autocast("cpu", torch.bfloat16):
        plain.append(
            bilevel_gradient(
                lambda p: problem.inner(problem.whole(p)),
                lambda p: problem.outer(problem.whole(p)),
                problem.params,
                problem.hyper,
                **STEPS,
            ).grads
        )
        split = problem.gradient(problem.whole).grads
    for exact, usual, ours in zip(*plain, split, strict=True):
        assert (ours - exact).norm() < 2 * (usual - exact).norm() + 0.01 * exact.norm()


def test_errors():
    problem = Problem()
    for network, error, message in (
        (3, TypeError, "network: expected a function of the parameters or a list of them, got 3"),
        ([problem.whole, 3], TypeError, "network: expected a function"),
        ([], ValueError, "network: expected at least one function, got none"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            problem.gradient(network)
    fixed = {k: v.detach() for k, v in problem.params.items()}
    parts = [lambda p, part=part: part(fixed) for part in problem.parts]
    for network in (lambda p: problem.whole(fixed), parts):
        with pytest.raises(ValueError, match="^inner: expected a loss that depends on the params"):
            problem.gradient(network)
