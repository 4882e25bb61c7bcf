"""Layer, group and instance normalisation with a tangent, against elementary operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from mclfast.bilevel.dual_ops import DualOps

EPS = 1e-5
Norm = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


def by_hand(x: Tensor, rows: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Rows of ``x.reshape(rows)`` normalised; the scale has the shape that broadcasts."""
    flat = x.reshape(rows)
    centred = flat - flat.mean(-1, keepdim=True)
    n = (centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()).reshape(x.shape)
    n = n if weight is None else n * weight
    return n if bias is None else n + bias


def planes(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.view(-1, 1, 1)


#: Shape of the input and of scale and shift, the function of PyTorch, the elementary one.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], Norm, Norm]] = {
    "layer": (
        (3, 5, 7),
        (7,),
        lambda x, w, b: F.layer_norm(x, [7], w, b, EPS),
        lambda x, w, b: by_hand(x, (15, 7), w, b),
    ),
    "layer of two axes": (
        (3, 5, 7),
        (5, 7),
        lambda x, w, b: F.layer_norm(x, [5, 7], w, b, EPS),
        lambda x, w, b: by_hand(x, (3, 35), w, b),
    ),
    "group": (
        (3, 6, 4, 5),
        (6,),
        lambda x, w, b: F.group_norm(x, 3, w, b, EPS),
        lambda x, w, b: by_hand(x, (9, 40), planes(w), planes(b)),
    ),
    "instance": (
        (3, 6, 4, 5),
        (6,),
        lambda x, w, b: F.instance_norm(x, None, None, w, b, eps=EPS),
        lambda x, w, b: by_hand(x, (18, 20), planes(w), planes(b)),
    ),
}


def run(norm: Norm, values: list[Tensor | None]) -> list[Tensor]:
    """Value, tangent, and the gradients of both by the value, the tangent, scale and shift."""
    x, x_t, w, w_t, b, b_t, g, g_t = values
    leaves = [x, x_t, *(t for t in (w, b) if t is not None)]
    for leaf in leaves:
        leaf.requires_grad_()
    with forward_ad.dual_level():
        dual = [
            t if t is None or t_t is None else forward_ad.make_dual(t * 1, t_t * 1)
            for t, t_t in ((x, x_t), (w, w_t), (b, b_t))
        ]
        y, y_t = forward_ad.unpack_dual(norm(*dual))
    grads = torch.autograd.grad([y, y_t], leaves, [g, g_t])
    return [t.detach() for t in (y, y_t, *grads)]


def draw(name: str, dtype: torch.dtype, last: bool, affine: bool, along: bool) -> list:
    """x, x_t, weight, weight_t, bias, bias_t, g, g_t; x far from zero mean."""
    shape, own, *_ = CASES[name]
    generator = torch.Generator().manual_seed(1)
    x, x_t, g, g_t = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) + 2 for _ in range(4)
    )
    if last and len(shape) == 4:
        x, x_t, g, g_t = (t.to(memory_format=torch.channels_last) for t in (x, x_t, g, g_t))
    w, w_t, b, b_t = (torch.randn(*own, generator=generator, dtype=torch.float64) for _ in range(4))
    rest = [w, w_t if along else None, b, b_t if along else None] if affine else [None] * 4
    return [None if t is None else t.detach().to(dtype) for t in (x, x_t, *rest, g, g_t)]


@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize(
    ("affine", "along"), [(True, True), (True, False), (False, False)], ids=str
)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, affine: bool, along: bool, last: bool):
    *_, norm, elementary = CASES[name]
    want = run(elementary, draw(name, torch.float64, last, affine, along))
    with DualOps():
        found = run(norm, draw(name, torch.float64, last, affine, along))
    for ours, exact in zip(found, want, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_float32_is_as_exact_as_elementary_operations(name: str):
    *_, norm, elementary = CASES[name]
    want = run(elementary, draw(name, torch.float64, False, True, True))
    eager = run(elementary, draw(name, torch.float32, False, True, True))
    with DualOps():
        found = run(norm, draw(name, torch.float32, False, True, True))
    for ours, theirs, exact in zip(found, eager, want, strict=True):
        error, other = ((v.double() - exact).abs().max() for v in (ours, theirs))
        assert error <= 2 * other + 4 * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_computed_in_float32(name: str):
    *_, norm, elementary = CASES[name]
    values = draw(name, torch.bfloat16, False, True, True)
    want = run(elementary, [t.detach().double() for t in values])
    with DualOps():
        found = run(norm, values)
    for ours, exact in zip(found, want, strict=True):
        assert ours.dtype == torch.bfloat16
        # Each result is rounded a few times, by up to 2**-9 of the largest number in it.
        assert (ours.double() - exact).abs().max() <= 2**-6 * exact.abs().max()


def test_an_input_that_depends_on_no_parameter():
    torch.manual_seed(0)
    x, w, w_t = torch.randn(4, 3, 5).double(), torch.randn(3).double(), torch.randn(3).double()
    with forward_ad.dual_level(), DualOps():
        dual = forward_ad.make_dual(w, w_t)
        for y in (
            F.batch_norm(x, None, None, dual, training=True, eps=EPS),
            F.group_norm(x, 3, dual, eps=EPS),
            F.instance_norm(x, None, None, dual, eps=EPS),
        ):
            value, tangent = forward_ad.unpack_dual(y)
            n = value / w.view(-1, 1)
            torch.testing.assert_close(tangent, n * w_t.view(-1, 1), rtol=1e-11, atol=1e-11)


def test_running_statistics_of_instances():
    torch.manual_seed(0)
    x, x_t = torch.randn(2, 4, 3, 5).double()
    mean, var = torch.randn(3).double(), torch.rand(3).double()
    want = mean.clone(), var.clone()
    F.instance_norm(x, *want, momentum=0.3)
    with forward_ad.dual_level(), DualOps():
        F.instance_norm(forward_ad.make_dual(x, x_t), mean, var, momentum=0.3)
    torch.testing.assert_close((mean, var), want)
