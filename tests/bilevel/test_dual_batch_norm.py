"""Batch normalisation with a tangent: the operator, its plain twin, and autograd of PyTorch."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mclfast.bilevel import dual_batch_norm as norms
from mclfast.bilevel.dual_batch_norm import FusedBatchNorm, PlainBatchNorm, Running
from mclfast.ops import backends

EPS = 1e-5
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
#: Whole vectors and ends of them, small and large planes, several chunks, one value per plane.
SHAPES = [
    (6, 3),
    (70, 16),
    (4, 5, 7),
    (3, 16, 4, 4),
    (5, 19, 3, 5),
    (2, 3, 40, 33),
    (130, 33, 1, 1),
]
FUNCTIONS = [
    pytest.param(PlainBatchNorm, id="plain"),
    pytest.param(
        FusedBatchNorm,
        id="fused",
        marks=pytest.mark.skipif(not norms.fused_available(), reason="no C++ extension here"),
    ),
]


def tensors(
    shape: tuple[int, ...], dtype: torch.dtype, *, last: bool = False, offset: float = 3.0
) -> list[Tensor]:
    """x, x_t, weight, weight_t, bias, bias_t, g, g_t; x far from zero mean."""
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size: int) -> Tensor:
        values = torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)
        return values.to(memory_format=LAST[len(size)]) if last and len(size) > 3 else values

    c = shape[1]
    return [
        draw(*shape) + offset,
        draw(*shape) - 2,
        *(draw(c) for _ in range(4)),
        draw(*shape) + 1,
        draw(*shape),
    ]


def expected(values: list[Tensor], eps: float = EPS) -> list[Tensor]:
    """y, y_t, gradients of x, x_t, weight, bias by double use of autograd in float64."""
    x, x_t, w, w_t, b, b_t, g, g_t = (v.double() for v in values)
    x, x_t, w, b = (v.clone().requires_grad_() for v in (x, x_t, w, b))

    def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        axes = [0, *range(2, x.dim())]
        shape = (1, -1, *[1] * (x.dim() - 2))
        centred = x - x.mean(axes, keepdim=True)
        std = (centred.square().mean(axes, keepdim=True) + eps).sqrt()
        return w.view(shape) * centred / std + b.view(shape)

    # PyTorch's own forward mode, of elementary operations.
    y, y_t = torch.func.jvp(norm, (x, w, b), (x_t, w_t, b_t))
    grads = torch.autograd.grad([y, y_t], [x, x_t, w, b], [g, g_t])
    return [v.detach() for v in (y, y_t, *grads)]


def found(function: type[torch.autograd.Function], values: list[Tensor]) -> list[Tensor]:
    x, x_t, w, w_t, b, b_t, g, g_t = values
    x, x_t, w, b = (v.clone().requires_grad_() for v in (x, x_t, w, b))
    y, y_t = function.apply(x, x_t, w, w_t, b, b_t, Running(None, None, 0.1), EPS)
    grads = torch.autograd.grad([y, y_t], [x, x_t, w, b], [g, g_t])
    return [v.detach() for v in (y, y_t, *grads)]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(function: type, shape: tuple[int, ...], last: bool):
    values = tensors(shape, torch.float64, last=last)
    for got, want in zip(found(function, values), expected(values), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(64, 16, 16, 16), (128, 24, 4, 4)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_float32_is_as_exact_as_the_plain_twin(shape: tuple[int, ...], last: bool, offset: float):
    if not norms.fused_available():
        pytest.skip("no C++ extension here")
    values = tensors(shape, torch.float32, last=last, offset=offset)
    want = expected(values)
    fused, plain = found(FusedBatchNorm, values), found(PlainBatchNorm, values)
    for ours, theirs, exact in zip(fused, plain, want, strict=True):
        error, eager = ((v.double() - exact).abs().max() for v in (ours, theirs))
        # A few roundings of the largest value: sums have another order on every processor.
        floor = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert error <= 1.5 * eager + floor


CAPABILITY_SCRIPT = """
import sys, torch
torch.ops.load_library(sys.argv[1])
ops = torch.ops.mclfast_cpu
found = []
for x, x_t, w, w_t, b, b_t, g, g_t in torch.load(sys.argv[2]):
    y, y_t, *rest = ops.dual_batch_norm(x, x_t, w, w_t, b, b_t, None, None, 0.1, 1e-5)
    found.append([y, y_t, *ops.dual_batch_norm_backward(g, g_t, x, x_t, w, w_t, *rest)])
torch.save((ops.capability(), found), sys.argv[3])
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability: str, tmp_path: Path):
    extension = backends.extension()
    if extension is None:
        pytest.skip("no C++ extension here")
    cases = [
        tensors(shape, torch.float64, last=last)
        for shape in ((5, 19, 3, 5), (2, 3, 20, 33))
        for last in (False, True)
    ]
    torch.save(cases, tmp_path / "cases.pt")
    files = [str(extension.__file__), str(tmp_path / "cases.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(
        [sys.executable, "-c", CAPABILITY_SCRIPT, *files],
        env={**os.environ, "MCLFAST_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    if done.returncode and "MCLFAST_CPU_CAPABILITY" in done.stderr and capability != "default":
        pytest.skip(f"this processor has no {capability}")
    assert done.returncode == 0, done.stderr
    name, results = torch.load(files[2])
    assert name == capability
    for values, got in zip(cases, results, strict=True):
        for ours, exact in zip(got, expected(values), strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("given", list(itertools.product([True, False], repeat=2)), ids=str)
def test_without_weight_or_tangents(function: type, given: tuple[bool, bool]):
    """What is not given counts as weight one, and as tangent zero."""
    affine, along = given
    x, x_t, w, w_t, b, b_t, g, g_t = tensors((5, 3, 4), torch.float64)
    w, b = (w, b) if affine else (torch.ones(3).double(), torch.zeros(3).double())
    zero = torch.zeros(3).double()
    want = expected([x, x_t, w, w_t if along else zero, b, b_t if along else zero, g, g_t])
    x.requires_grad_(), x_t.requires_grad_()
    y, y_t = function.apply(
        x,
        x_t,
        w if affine else None,
        w_t if along else None,
        b if affine else None,
        b_t if along else None,
        Running(None, None, 0.1),
        EPS,
    )
    grads = torch.autograd.grad([y, y_t], [x, x_t], [g, g_t])
    for got, exact in zip((y, y_t, *grads), want, strict=False):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_running_statistics(function: type):
    x, x_t, *rest = tensors((6, 3, 5), torch.float64)
    mean, var = torch.randn(3).double(), torch.rand(3).double()
    want_mean, want_var = mean.clone(), var.clone()
    F.batch_norm(x, want_mean, want_var, training=True, momentum=0.3)
    function.apply(x, x_t, *rest[:4], Running(mean, var, 0.3), EPS)
    torch.testing.assert_close(mean, want_mean)
    torch.testing.assert_close(var, want_var)


def test_layouts_may_differ():
    """A gradient or tangent of another layout than x is taken as it is meant."""
    if not norms.fused_available():
        pytest.skip("no C++ extension here")
    values = tensors((3, 5, 4, 2), torch.float64)
    mixed = [v.to(memory_format=torch.channels_last) if v.dim() == 4 else v for v in values]
    mixed[1], mixed[6] = values[1], values[6].expand_as(values[6]).transpose(2, 3).mT
    for got, want in zip(found(FusedBatchNorm, mixed), expected(values), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_which_function_runs(monkeypatch: pytest.MonkeyPatch):
    x, x_t, w, w_t, b, b_t, *_ = tensors((4, 3, 5), torch.float32)
    running = Running(None, None, 0.1)

    def name(*values: Tensor) -> str:
        y, _ = norms.dual_batch_norm(*[v.requires_grad_() for v in values], running, EPS)
        return y.grad_fn.name()

    halves = [v.bfloat16() for v in (x, x_t)]
    assert name(*halves, w, w_t, b, b_t) == "PlainBatchNormBackward"
    if norms.fused_available():
        assert name(x, x_t, w, w_t, b, b_t) == "FusedBatchNormBackward"
    monkeypatch.setattr(norms, "fused_available", lambda: False)
    assert name(x, x_t, w, w_t, b, b_t) == "PlainBatchNormBackward"


def test_tensors_without_data():
    """The plan of a training step runs the operator on such."""
    if not norms.fused_available():
        pytest.skip("no C++ extension here")
    with FakeTensorMode() as mode:
        values = [mode.from_tensor(v) for v in tensors((4, 8, 3, 3), torch.float32, last=True)]
        for fake, like in zip(found(FusedBatchNorm, values), [0, 0, 0, 0, 2, 4], strict=True):
            assert fake.shape == values[like].shape and fake.stride() == values[like].stride()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(3), r"x must be \[N, C, ...\] and not empty, got \[3\]"),
        (1, torch.zeros(4, 3, 2), r"x_t must be \[4, 3, 5\] of Float, got \[4, 3, 2\]"),
        (2, torch.zeros(4), r"weight must be \[3\], got \[4\]"),
        (3, torch.zeros(3).double(), "weight_t must be of Float, got Double"),
    ],
)
def test_bad_input(place: int, value: Tensor, message: str):
    if not norms.fused_available():
        pytest.skip("no C++ extension here")
    values = tensors((4, 3, 5), torch.float32)[:6]
    values[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mclfast_cpu.dual_batch_norm(*values, None, None, 0.1, EPS)


@pytest.mark.skipif(not norms.fused_available(), reason="no C++ extension here")
def test_the_choice_of_a_backend_ends_with_its_block():
    with backends.use_backend("reference"):
        assert not norms.fused_available()
    assert norms.fused_available()
