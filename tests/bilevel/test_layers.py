"""The bilevel gradient through every layer of torch.nn, in both modes and memory formats."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from sweeps.bilevel_layers import TOLERANCE, compared, sweep

from helpers.layer_cases import LAYERS, LayerNet, functions_of, unlisted
from mclfast.bilevel.known_ops import FORWARD_MODE, operation

pytestmark = pytest.mark.usefixtures("one_thread")

#: Layers that PyTorch cannot differentiate twice, and the operation that the error names.
REFUSED = {
    "CrossMapLRN2d": "support automatic differentiation",
    "EmbeddingBag max": "_embedding_bag",
    "EmbeddingBag mean": "_embedding_bag",
    "EmbeddingBag sum": "_embedding_bag",
    "Hardsigmoid": "hardsigmoid",
}
#: Kind of the call, channels last, training. Both kinds see both formats and both modes.
SETTINGS = [
    ("whole", False, False),
    ("whole", False, True),
    ("whole", True, False),
    ("whole", True, True),
    ("parts", True, True),
    ("parts", False, False),
]


def test_every_layer_has_a_case():
    assert not unlisted()


def operations(node: Any, seen: set[Any]) -> set[str]:
    """The operations in a graph, from its last node on."""
    if node is None or node in seen:
        return set()
    seen.add(node)
    found = (operations(following, seen) for following, _ in node.next_functions)
    return {operation(node)}.union(*found)


@pytest.mark.skipif(
    not torch.__version__.startswith("2.13."), reason="names of nodes are those of torch 2.13"
)
def test_every_operation_trusted_with_forward_mode_is_in_a_case():
    images = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    seen: set[str] = set()
    for name, last, training in itertools.product(LAYERS, (False, True), (False, True)):
        net = LayerNet(name, channels_last=last, training=training)
        outputs = functions_of(net, images)(dict(net.named_parameters()))
        seen |= operations(outputs["flat"].grad_fn, set())
    assert not FORWARD_MODE - seen


@pytest.mark.parametrize("name", LAYERS)
def test_equals_autograd_through_unrolled_steps(name: str):
    for kind, channels_last, training in SETTINGS:
        found = compared(
            name, kind, channels_last=channels_last, training=training, seed=0, steps=(1, 1)
        )
        if found.outcome == "refused":
            assert name in REFUSED and REFUSED[name] in found.text
        else:
            assert found.outcome == "right", (kind, channels_last, training, found)
            assert found.error <= TOLERANCE


def test_sweep():
    counts = sweep(20, seed=1)
    assert counts["tried"] == 20 and counts["lost"] == 0
    assert counts["survived"] + counts["refused"] == 20
