"""Operations of dual tensors that are taken over from PyTorch; see also test_dual_batch_norm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from mclfast.bilevel.dual_ops import DualOps

IN_PLACE = {
    "functional": lambda x: F.relu(x, inplace=True),
    "module": nn.ReLU(inplace=True),
    "torch": torch.relu_,
    "method": Tensor.relu_,
}


def run(relu: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Value and tangent of a product with the changed tensor, and gradients of both."""
    torch.manual_seed(0)
    x, x_t, other, g, g_t = (
        torch.randn(2, 3, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
        for _ in range(5)
    )
    x.requires_grad_(), x_t.requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x * other, x_t * other)
        result = relu(dual)
        # Whoever holds the tensor that was changed in place sees the change.
        assert result is dual
        value, tangent = forward_ad.unpack_dual(dual * dual)
    return [value, tangent, *torch.autograd.grad([value, tangent], [x, x_t], [g, g_t])]


@pytest.mark.parametrize("name", IN_PLACE)
def test_relu_in_place(name: str):
    want = run(IN_PLACE[name])
    with DualOps():
        found = run(IN_PLACE[name])
    for ours, theirs in zip(found, want, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous(memory_format=torch.channels_last)


def test_relu_after_a_norm_passes_gradients_on_as_they_are():
    """No copy by way of a base tensor: the layout stays, and no other node comes between."""
    x, x_t, g = (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last) for _ in range(3))
    x.requires_grad_()
    norm = nn.BatchNorm2d(3)
    with forward_ad.dual_level(), DualOps():
        y = norm(forward_ad.make_dual(x, x_t))
        assert not y._is_view()
        value, tangent = forward_ad.unpack_dual(F.relu(y, inplace=True))
    assert "CopySlices" not in value.grad_fn.next_functions[0][0].name()
    seen = []
    handle = value.grad_fn.register_hook(lambda _, grads: seen.append(grads[0]))
    value.backward(g)
    handle.remove()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    plain = F.relu(F.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(x.grad, torch.autograd.grad(plain, x, g)[0])


def test_relu_in_place_without_tangent_or_graph():
    x = torch.tensor([-1.0, 2.0])
    with DualOps(), torch.no_grad():
        assert torch.relu_(x) is x
    assert torch.equal(x, torch.tensor([0.0, 2.0]))
