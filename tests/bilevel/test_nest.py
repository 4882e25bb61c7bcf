"""Outputs of networks in nests of every kind."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.unrolled import unrolled
from mclfast import bilevel_gradient
from mclfast.bilevel.nest import Nest

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Output:
    logits: Tensor
    note: str
    more: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: Tensor
    count: int = 3


@dataclasses.dataclass
class Slotted:
    __slots__ = ("logits",)
    logits: Tensor


class ItemsAndAttributes(OrderedDict):
    """A mapping whose items are attributes too, as outputs of language models are."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


def _both(logits: Tensor, other: Tensor) -> ItemsAndAttributes:
    result = ItemsAndAttributes()
    result["logits"], result["other"] = logits, (other,)
    return result


#: Functions that put two tensors into a nest, and that take them out again.
KINDS = {
    "named tuple": (Pair, lambda o: (o.first, o.second)),
    "dictionary": (lambda a, b: {"a": a, "b": [b]}, lambda o: (o["a"], o["b"][0])),
    "dataclass": (lambda a, b: Output(a, "x", b), lambda o: (o.logits, o.more)),
    "dataclasses": (
        lambda a, b: Output(a, "x", {"y": (Frozen(b), 2)}),
        lambda o: (o.logits, o.more["y"][0].logits),
    ),
    "frozen in a named tuple": (
        lambda a, b: Pair(Frozen(a), Slotted(b)),
        lambda o: (o.first.logits, o.second.logits),
    ),
    "items and attributes": (_both, lambda o: (o.logits, o["other"][0])),
    "integers beside": (
        lambda a, b: {"a": a, "b": b, "n": torch.arange(3)},
        lambda o: (o["a"] * o["n"].sum(), o["b"]),
    ),
    "one tensor twice": (lambda a, b: (a, a, b), lambda o: (o[0] * o[1], o[2])),
}


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_equals_unrolled(kind: str, parts: bool):
    make, take = KINDS[kind]
    torch.manual_seed(0)
    params = {"w": torch.randn(3, 2, dtype=torch.float64)}
    hyper = [torch.randn(2, dtype=torch.float64, requires_grad=True)]
    x = torch.randn(4, 3, dtype=torch.float64)

    def network(theta: dict[str, Tensor]) -> Any:
        return make((x @ theta["w"]).tanh(), (x @ theta["w"]).square())

    def inner(outputs: Any) -> Tensor:
        first, second = take(outputs)
        return (first * hyper[0] + second.sin()).square().mean()

    def outer(outputs: Any) -> Tensor:
        first, second = take(outputs)
        return (first * second).mean()

    steps = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
    want = unrolled(
        params,
        hyper,
        lambda p: inner(network(p)),
        lambda p: outer(network(p)),
        2,
        1,
        *steps.values(),
    )[1]
    losses = (inner, outer)
    if parts:
        losses = [lambda o, loss=loss: loss(o[0]) + 0 * loss(o[1]) for loss in losses]
    got = bilevel_gradient(
        *losses, params, hyper, network=[network] * 2 if parts else network, **steps
    )
    torch.testing.assert_close(got.grads[0], want[0], rtol=1e-10, atol=1e-14)


def test_rebuilding_leaves_the_original_alone():
    original = Output(torch.ones(2), "x", Frozen(torch.zeros(1)))
    nest = Nest(original)
    other = nest.rebuilt([torch.full((2,), 5.0), torch.full((1,), 6.0)])
    assert float(other.logits[0]) == 5 and float(other.more.logits) == 6
    assert other.note == "x" and other.more.count == 3 and other.more is not original.more
    assert float(original.logits[0]) == 1 and float(original.more.logits) == 0


def test_errors():
    with pytest.raises(TypeError, match=r"^network: expected .* got a tensor in \.y of a Simple"):
        Nest([SimpleNamespace(x=1, y=torch.ones(2))])
    with pytest.raises(TypeError, match="^network: expected outputs of real .* got complex64"):
        Nest(torch.ones(2, dtype=torch.complex64))
    assert Nest([SimpleNamespace(x=1), "text", None, 3]).tensors == []
