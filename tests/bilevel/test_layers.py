"""The bilevel gradient through every layer of torch.nn, in both modes and memory formats."""

from __future__ import annotations

import pytest
from sweeps.bilevel_layers import TOLERANCE, compared, sweep

from helpers.layer_cases import LAYERS, unlisted

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
