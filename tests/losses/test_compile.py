"""torch.compile and torch.export: few graphs for all sizes and temperatures, shapes only, scripts.

Graphs run with ``aot_eager``, which traces the derivatives as the compiler does and compiles
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

import mclfast
from mclfast import unit_norm
from mclfast.ops import backends

pytestmark = pytest.mark.skipif(
    not backends.backend_report()["cpu"].available,
    reason=f"backend cpu: {backends.backend_report()['cpu'].reason}",
)

Values = dict[str, Tensor]


def values(batch: int = 8, negatives: int = 5, stages: int = 2) -> Values:
    """Inputs of all losses; embeddings ask for a gradient."""
    g = torch.Generator().manual_seed(batch)

    def unit(*shape: int) -> Tensor:
        return unit_norm(torch.randn(*shape, generator=g))

    rows = torch.randint(50, (batch, 3 + negatives), generator=g)
    return {
        "plain": unit(2, batch, 8).requires_grad_(),
        "layers": unit(2, stages, batch, 8).requires_grad_(),
        "labels": torch.arange(batch) // 2,
        "pairs": torch.rand(2 * stages, 2 * stages, batch, generator=g),
        "banks": unit(2, 50, 8),
        "pos": rows[:, :3].contiguous(),
        "neg": rows[:, 3:].contiguous(),
        "contrast": rows,
        "log_z": torch.full((2, 2), 3.0),
    }


def added(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else sum(x.sum() for x in found[:4])


def _lists(v: Values, **settings: Any) -> Tensor:
    first, second, third = (v["layers"][i, j] for i, j in ((0, 0), (0, 1), (1, 0)))
    return mclfast.layerwise_mcl_loss([[first, second], [third]], v["labels"], **settings)


def _of(name: str, *arguments: str) -> Callable[..., Tensor]:
    function = getattr(mclfast, name)
    return lambda v, **settings: added(function(*(v[a] for a in arguments), **settings))


def _of_views(name: str) -> Callable[..., Tensor]:
    function = getattr(mclfast, name)
    return lambda v, **settings: function(v["plain"][0], v["plain"][1], **settings)


KEYS = "banks", "pos", "neg"
# The embeddings that a loss takes, and a call of it.
LOSSES: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "mcl_rows": ("layers", _of("mcl_rows", "layers", "labels")),
    "mcl_terms": ("plain", _of("mcl_terms", "plain", "labels")),
    "mcl_loss": ("plain", _of("mcl_loss", "plain", "labels")),
    "layerwise_mcl_terms": ("layers", _of("layerwise_mcl_terms", "layers", "labels", "pairs")),
    "layerwise_mcl_loss": ("layers", _of("layerwise_mcl_loss", "layers", "labels", "pairs")),
    "lists of stages": ("layers", _lists),
    "supcon_loss": (
        "plain",
        lambda v, **settings: mclfast.supcon_loss(v["plain"][0], v["labels"], **settings),
    ),
    "info_nce_loss": ("plain", _of_views("info_nce_loss")),
    "similarity_kl_loss": ("plain", _of_views("similarity_kl_loss")),
    "bank_mcl_rows": ("layers", _of("bank_mcl_rows", "layers", *KEYS)),
    "bank_mcl_terms": ("plain", _of("bank_mcl_terms", "plain", *KEYS)),
    "bank_mcl_loss": ("plain", _of("bank_mcl_loss", "plain", *KEYS)),
    "one set of negatives": (
        "plain",
        lambda v, **settings: mclfast.bank_mcl_loss(
            v["plain"], v["banks"], v["pos"], v["neg"][0], **settings
        ),
    ),
    "layerwise_bank_mcl_terms": ("layers", _of("layerwise_bank_mcl_terms", "layers", *KEYS)),
    "layerwise_bank_mcl_loss": ("layers", _of("layerwise_bank_mcl_loss", "layers", *KEYS, "pairs")),
    "bank_nce_loss": ("plain", _of("bank_nce_loss", "plain", "banks", "contrast")),
    "bank_nce_log_normalizer": (
        "plain",
        lambda v, **settings: mclfast.bank_nce_log_normalizer(
            v["plain"], v["banks"], v["contrast"], **settings
        ).sum(),
    ),
}
SIZES = [(8, 5, 2), (12, 9, 3), (6, 17, 4), (20, 3, 2), (9, 8, 3), (2, 2, 5), (7, 6, 2)]
SIZES += [(13, 4, 3), (10, 10, 3)]


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    torch._dynamo.reset()
    yield LOSSES[request.param]
    torch._dynamo.reset()


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_two_graphs_serve_all_sizes_and_temperatures(loss):
    embeddings, call = loss
    graphs = 0

    def counting(module: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return aot_eager(module, inputs)

    compiled = torch.compile(call, fullgraph=True, backend=counting)
    for step, sizes in enumerate(SIZES):
        given = values(*sizes)
        results = []
        for function in (compiled, call):
            x = given[embeddings].detach().requires_grad_()
            value = function({**given, embeddings: x}, temperature=0.1 * 0.95**step)
            results.append([value.detach()])
            if value.requires_grad:
                results[-1] += torch.autograd.grad(value, x)
        close(*results)
    assert graphs <= 2


@pytest.mark.parametrize("name", ["similarity_kl_loss", "mcl_loss"])
def test_two_graphs_serve_all_temperatures_of_the_distributions(name):
    """mcl_loss gets it as a tensor; as a number it would be a constant of the graph there."""
    torch._dynamo.reset()
    graphs = []

    def counted(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return aot_eager(module, inputs)

    def call(x: Tensor, kl_temperature: Any) -> Tensor:
        arguments = (x, torch.arange(8) // 2) if name == "mcl_loss" else (x[0], x[1])
        return getattr(mclfast, name)(*arguments, kl_temperature=kl_temperature)

    compiled = torch.compile(call, backend=counted, fullgraph=True)
    x = values()["plain"]
    for step in range(10):
        number: Any = 1 + 0.3 * step
        given = torch.tensor(number) if name == "mcl_loss" else number
        got, want = compiled(x, given), call(x, number)
        close(got, want)
        close(torch.autograd.grad(got, x)[0], torch.autograd.grad(want, x)[0])
    assert len(graphs) <= 2


def test_transforms_inside_of_a_compiled_function(loss):
    embeddings, call = loss
    given = values()
    if not call(given).requires_grad or embeddings == "layers":
        pytest.skip("has no gradient, or is a sum of more of the terms that are tried already")

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: call({**given, embeddings: y}))(x)

    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    close(compiled(given[embeddings].detach()), gradient(given[embeddings].detach()))


class _Called(nn.Module):
    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, given: Values) -> Tensor:
        return self.call(given)


def test_export_with_dynamic_sizes(loss):
    _, call = loss
    batch, negatives, stages = Dim("batch", min=2), Dim("negatives", min=2), Dim("stages", min=2)
    sizes: dict[str, dict[int, Any]] = {
        "plain": {1: batch},
        "layers": {1: stages, 2: batch},
        "labels": {0: batch},
        "pairs": {0: 2 * stages, 1: 2 * stages, 2: batch},
        "banks": {},
        "pos": {0: batch},
        "neg": {0: batch, 1: negatives},
        "contrast": {0: batch, 1: negatives + 3},
        "log_z": {},
    }
    if call is _lists:
        sizes["layers"], sizes["pairs"] = {2: batch}, {2: batch}
    given = {name: x.detach() for name, x in values().items()}
    program = torch.export.export(_Called(call), (given,), dynamic_shapes=(sizes,))
    for other in ((12, 9, 2), (20, 4, 2 if call is _lists else 3)):
        tensors = {name: x.detach() for name, x in values(*other).items()}
        close(program.module()(tensors), call(tensors))


def test_tensors_without_values(loss):
    embeddings, call = loss
    mode = FakeTensorMode()

    def meta(x: Tensor) -> Tensor:
        return x.detach().to("meta").requires_grad_(x.requires_grad)

    def fake(x: Tensor) -> Tensor:
        return mode.from_tensor(x.detach()).requires_grad_(x.requires_grad)

    for kind, surrounding in ((meta, nullcontext()), (fake, mode)):
        given = {name: kind(x) for name, x in values().items()}
        with surrounding:
            value = call(given)
            assert value.shape == () and value.dtype == torch.float32
            if value.requires_grad:
                value.backward()
                assert given[embeddings].grad.shape == given[embeddings].shape


def test_a_script_of_a_loss_is_refused_in_words():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = mclfast.SupConLoss()

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return self.loss(x, labels)

    for module in (mclfast.SupConLoss(), Model()):
        with pytest.raises(NotImplementedError, match=r"SupConLoss: torch.jit.script .*compile"):
            torch.jit.script(module)
