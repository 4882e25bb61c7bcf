"""What surrounds a call: transforms of ``torch.func``, compilation, tensors without values."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def under_transform() -> bool:
    """Whether a transform of ``torch.func`` (grad, jvp, vmap and those made of them) is at work."""
    return get_interpreter_stack() is not None


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are being taken (``torch.autograd.forward_ad``)."""
    return forward_ad._current_level >= 0


def takes_plain_form() -> bool:
    """Whether transforms ask for a derivative that no fused operator gives.

    A third derivative is one, and so is a forward-mode derivative of a forward-mode derivative: it
    would take the second derivative of each value, where the operators give their weighted sum.
    """
    kinds = [interpreter.key() for interpreter in get_interpreter_stack() or ()]
    forward = kinds.count(TransformType.Jvp)
    return forward > 1 or forward + kinds.count(TransformType.Grad) > 2


# torch.compile takes the answers as constants: it applies the transforms while it traces.
under_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]
takes_plain_form._dynamo_marked_constant = True  # type: ignore[attr-defined]


def has_values(x: Tensor) -> bool:
    """Whether Python may look at the values of a tensor without waiting for a device.

    It may not in a compiled graph, under a transform of ``torch.func``, while ``make_fx`` records
    a graph (``torch.func.linearize`` does), and where a tensor has a shape only.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or under_transform():
        return False
    return not isinstance(x, FakeTensor) and get_proxy_mode() is None


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A block that autocast does not act on; tensors on "meta" know no autocast."""
    if x.device.type == "meta":
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
