"""The bilevel step of a training step: any layer in any memory mode, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from helpers.small_cohort import SmallNet
from helpers.unrolled import unrolled
from mclfast import Batch, Cohort, TrainStep
from mclfast._base.random import rng_restored
from mclfast.cohort.functions import cohort_function
from mclfast.config import TrainConfig, learning_rate
from mclfast.execution.parts import make_sgd
from mclfast.methods import LayerwiseMCL

pytestmark = pytest.mark.usefixtures("one_thread")


class Tokens(nn.Module):
    """A layer of tokens [B, n, C] on a map [B, C, H, W]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x.flatten(2).transpose(1, 2))
        return found.transpose(1, 2).unflatten(2, x.shape[2:])


class Net(SmallNet):
    """A small network with a layer between its stem and its stages, without dropout.

    Numbers are drawn in the order of memory, which unrolled steps need not keep.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(1)
        self.stem = nn.Sequential(self.stem, layer)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0


def make_step(make: Callable[[], nn.Module], **settings: Any) -> TrainStep:
    torch.manual_seed(0)
    cohort = Cohort([Net(make()) for _ in range(2)], auxiliary_heads=True)
    values = {"device": "cpu", "batch_size": 6, "images_per_class": 2, "weight_decay": 0.01}
    config = TrainConfig.from_values({**values, "matcher_dim": 3, "method": "lmcl", **settings})
    method = LayerwiseMCL(cohort.feature_dims, config.options)
    labels = torch.arange(12) % 3
    step = TrainStep(cohort, method, config, labels=labels, image_shape=(1, 10, 10))
    for module in (cohort, method):
        module.double()
    step.begin_epoch(0)
    return step


def batch() -> tuple[Tensor, Batch]:
    torch.manual_seed(1)
    return torch.randn(6, 1, 10, 10).double(), Batch(torch.arange(6) // 2, torch.arange(6), 0, 0)


def expected(step: TrainStep, images: Tensor, labels: Batch) -> list[Tensor]:
    """The meta parameters after a step along the gradient of the unrolled steps."""
    cohort, method, config = step.cohort, copy.deepcopy(step.method), step.config
    network = cohort_function(cohort, images)
    params = dict(cohort.named_parameters())
    fixed = {name: p.detach() for name, p in params.items() if not p.requires_grad}
    trained = {name: p.detach() for name, p in params.items() if p.requires_grad}
    losses = [
        lambda p, loss=loss: loss(network({**p, **fixed}), labels)
        for loss in (method.inner_loss, method.outer_loss)
    ]
    meta = method.meta_parameters()
    counts = config.inner_steps, config.outer_steps
    lr = learning_rate(config, 0)
    sizes = lr, config.momentum, config.weight_decay
    with rng_restored(), sdpa_kernel(SDPBackend.MATH):
        grads = unrolled(trained, meta, *losses, *counts, *sizes)[1]
    for parameter, grad in zip(meta, grads, strict=True):
        parameter.grad = grad
    make_sgd(dataclasses.replace(config, lr=lr), meta).step()
    return [p.detach() for p in meta]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm2d(4),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True),
    "layer norm": lambda: Tokens(nn.LayerNorm(4)),
    "attention": lambda: Tokens(nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)),
    "softmax": lambda: nn.Softmax2d(),
    "hardswish": lambda: nn.Hardswish(inplace=True),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
}
MODES: dict[str, dict[str, Any]] = {
    "ordinary": {},
    "channels last": {"channels_last": "on"},
    "checkpoint": {"memory": "checkpoint"},
    "sequential": {"memory": "sequential", "channels_last": "off"},
    "offload": {"memory": "sequential", "offload": "peers"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_memory_mode_equals_the_unrolled_steps(layer: str, mode: str):
    step = make_step(LAYERS[layer], **MODES[mode])
    images, labels = batch()
    before = copy.deepcopy(step.cohort.state_dict())
    want = expected(make_step(LAYERS[layer]), images, labels)
    step.bilevel(images, labels)
    for found, exact in zip(step.method.meta_parameters(), want, strict=True):
        torch.testing.assert_close(found.detach(), exact, rtol=1e-9, atol=1e-11)
    for name, value in step.cohort.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("mode", ["ordinary", "sequential", "offload"])
def test_frozen_parameters_take_no_part(mode: str):
    def frozen(**settings: Any) -> TrainStep:
        step = make_step(lambda: nn.BatchNorm2d(4), **settings)
        for parameter in step.cohort.peers[0].parameters():
            parameter.requires_grad_(False)
        return step

    step = frozen(**MODES[mode])
    images, labels = batch()
    want = expected(frozen(), images, labels)
    step.bilevel(images, labels)
    found = [p.detach() for p in step.method.meta_parameters()]
    for ours, exact in zip(found, want, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)
    other = expected(make_step(lambda: nn.BatchNorm2d(4)), images, labels)
    assert not torch.allclose(found[0], other[0], rtol=1e-6)
    # Nor in ordinary steps, in spite of weight decay.
    before = {name: p.detach().clone() for name, p in step.cohort.named_parameters()}
    step(images, labels)
    step.wait()
    for name, parameter in step.cohort.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("mode", ["ordinary", "sequential", "offload"])
def test_a_layer_without_second_derivative_is_refused_before_training(mode: str):
    message = (
        "^bilevel_every: expected 0 for networks and objectives that cannot be differentiated "
        r"twice, got 10 with hardsigmoid in networks\.0\.backbone\.stem\.1$"
    )
    with pytest.raises(ValueError, match=message):
        make_step(nn.Hardsigmoid, **MODES[mode])
    # Without bilevel steps it trains; one that is asked for all the same says why not.
    step = make_step(nn.Hardsigmoid, bilevel_every=0, **MODES[mode])
    with pytest.raises(ValueError, match="^bilevel_every: expected 0 .* with hardsigmoid$"):
        step.bilevel(*batch())


def test_the_trial_changes_nothing():
    torch.manual_seed(0)
    cohort = Cohort([Net(nn.Softmax2d()) for _ in range(2)], auxiliary_heads=True)
    modes = [m.training for m in cohort.modules()]
    before = copy.deepcopy(cohort.state_dict())
    config = TrainConfig.from_values(
        {"device": "cpu", "batch_size": 6, "images_per_class": 2, "method": "lmcl"}
    )
    state = torch.get_rng_state()
    made = LayerwiseMCL(cohort.feature_dims)
    after = torch.get_rng_state()
    assert not torch.equal(state, after)
    TrainStep(cohort, made, config, labels=torch.arange(12) % 3, image_shape=(1, 10, 10))
    assert torch.equal(torch.get_rng_state(), after)
    assert [m.training for m in cohort.modules()] == modes
    assert all(torch.equal(v, before[name]) for name, v in cohort.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in cohort.parameters())
