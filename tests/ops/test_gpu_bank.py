"""The memory-bank operators on a GPU against float64 autograd on the CPU; skipped without one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import emulated_reference as reference
from helpers.emulated_reference import relative_error
from mclfast.kernels.families import ALL, SOFT_VCL, VCL

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def ops():
    pytest.importorskip("mclfast._C", reason="extension not built")
    if not hasattr(torch.ops.mclfast_cuda, "bank_mcl_forward"):
        pytest.skip("extension built without CUDA")
    return torch.ops.mclfast_cuda


class Problem:
    """Random arguments on the GPU; the reference works on float64 copies of the rounded values."""

    def __init__(
        self,
        networks=(0, 0, 1, 1),
        batch=8,
        width=128,
        n=3000,
        positives=2,
        negatives=509,
        tau=0.1,
        t=3.0,
        bank_type=torch.float32,
        node_type=torch.float32,
        shared=False,
        pinned=False,
        families=ALL,
    ):
        g = torch.Generator().manual_seed(0)
        banks = F.normalize(torch.randn(max(networks) + 1, n, width, generator=g), dim=2)
        nodes = F.normalize(torch.randn(len(networks), batch, width, generator=g), dim=2)
        banks, nodes = banks.to(bank_type), nodes.to(node_type)
        index = torch.randint(n, (batch, 1 + positives + negatives), generator=g)
        pos_idx, neg_idx = index[:, : 1 + positives], index[:, 1 + positives :]
        if shared:
            neg_idx = neg_idx[:1].expand(batch, -1)
        options = (list(networks), tau, t, families)
        self.wide = (nodes.double(), banks.double(), pos_idx, neg_idx, *options)
        on_gpu = index.cuda()
        gpu_neg = on_gpu[:, 1 + positives :]
        if shared:
            gpu_neg = gpu_neg[:1].expand(batch, -1)
        gpu_banks = banks.pin_memory() if pinned else banks.cuda()
        self.options = options[1:]
        self.inputs = (nodes.cuda(), gpu_banks, on_gpu[:, : 1 + positives], gpu_neg, options[0])
        count = len(networks)
        shapes = [(count,), (count, count), (len(banks), count), (count, count)]
        self.cotangents = [torch.randn(*s, batch, generator=g).cuda() for s in shapes]
        self.tangent = torch.randn(nodes.shape, generator=g).to(node_type).cuda()

    def forward(self, ops) -> list[Tensor]:
        return list(ops.bank_mcl_forward(*self.inputs, *self.options))

    def backward(self, ops, statistics: list[Tensor]) -> Tensor:
        return ops.bank_mcl_backward(*self.cotangents, *self.inputs, *statistics, *self.options)

    def fused(self, ops) -> list[Tensor]:
        return list(ops.bank_mcl_fused(*self.cotangents, *self.inputs, *self.options))

    def double_backward(self, ops, statistics: list[Tensor]) -> list[Tensor]:
        return list(
            ops.bank_mcl_double_backward(
                self.tangent, *self.cotangents, *self.inputs, *statistics, *self.options
            )
        )


BF16, FP16 = torch.bfloat16, torch.float16
CASES = {
    "small": {"batch": 3, "n": 50, "negatives": 37},
    "small_odd": {"batch": 2, "n": 50, "negatives": 90, "width": 7, "networks": (0, 1, 1)},
    "small_bf16": {"batch": 2, "n": 50, "negatives": 20, "bank_type": BF16, "node_type": BF16},
    "large": {"networks": (0,) * 4 + (1,) * 4, "negatives": 4096},
    "four_networks": {"networks": (0,) * 4 + (1,) * 4 + (2,) * 4 + (3,) * 4, "batch": 4},
    "wide": {"width": 512, "networks": (0, 0, 0, 1, 1)},
    "more_parts_than_warps": {"width": 520, "networks": (0,) * 5 + (1,) * 4, "batch": 3},
    "one_key": {"positives": 0, "negatives": 1, "batch": 1},
    "sharp": {"tau": 0.01},
    "shared_negatives": {"shared": True, "batch": 64},
    "bank_of_fp16": {"bank_type": FP16},
    "bank_in_host_memory": {"pinned": True},
    "odd_bank_in_host_memory": {"pinned": True, "width": 7, "bank_type": BF16},
    "intra_alone": {"families": VCL | SOFT_VCL},
}


@pytest.mark.parametrize("case", CASES)
def test_bank_terms(ops, case):
    problem = Problem(**CASES[case])
    got = problem.forward(ops)
    rows = list(reference.bank_rows(*problem.wide))
    for mine, want in zip(got, rows, strict=True):
        assert relative_error(mine.cpu(), want) < 2e-5
    grad, h_nodes, h = reference.bank_gradients(
        problem.wide[0],
        [x.double().cpu() for x in problem.cotangents],
        problem.tangent.double().cpu(),
        *problem.wide[1:],
    )
    dtype = problem.inputs[0].dtype
    bound = 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert relative_error(problem.backward(ops, got[4:]).cpu(), grad) < bound
    for mine, want in zip(problem.fused(ops), [*rows, grad], strict=True):
        assert relative_error(mine.cpu(), want) < max(bound, 3e-5)
    for mine, want in zip(problem.double_backward(ops, got[4:]), [h_nodes, *h], strict=True):
        assert relative_error(mine.cpu(), want) < bound


def test_bank_terms_have_equal_bits_from_run_to_run(ops):
    problem = Problem(**CASES["large"] | {"batch": 32})
    first, second = (
        [*out, problem.backward(ops, out[4:]), *problem.fused(ops)]
        + problem.double_backward(ops, out[4:])
        for out in (problem.forward(ops) for _ in range(2))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bank_memory_beyond_the_outputs(ops):
    problem = Problem(**CASES["large"] | {"batch": 256, "negatives": 8193, "n": 50_000})
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    problem.fused(ops)
    assert torch.cuda.max_memory_allocated() - before < 32 * 2**20


def test_fused_bank_terms_in_a_graph(ops):
    problem = Problem()
    want = problem.fused(ops)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = problem.fused(ops)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("options", [{"networks": (0, 1, 2)}, {"networks": (0, 1), "width": 7}])
def test_bank_nce(ops, options):
    problem = Problem(positives=0, batch=16, **options)
    nodes, banks, pos_idx, neg_idx, _ = problem.inputs
    normalizer = torch.rand(len(nodes), len(nodes)) + 1
    tau, eps = problem.options[0], 1e-7
    wide = (*problem.wide[:4], normalizer.double(), tau, eps)
    rows, lse = reference.nce_rows(*wide)
    grad, second = reference.nce_gradients(wide[0], problem.tangent.double().cpu(), *wide[1:])
    args = (nodes, banks, pos_idx, neg_idx, normalizer.cuda(), tau, eps)
    got = [
        ops.bank_nce_lse(nodes, banks, pos_idx, neg_idx, tau),
        *ops.bank_nce_fused(*args),
        ops.bank_nce_double_backward(problem.tangent, *args),
    ]
    for mine, want in zip(got, [lse, rows, grad, second], strict=True):
        assert relative_error(mine.cpu(), want) < 2e-5


@pytest.mark.parametrize("pinned", [False, True])
def test_bank_update(ops, pinned):
    g = torch.Generator().manual_seed(0)
    banks = F.normalize(torch.randn(2, 50, 100, generator=g), dim=2)
    embeddings, index = torch.randn(2, 64, 100, generator=g), torch.randint(30, (64,), generator=g)
    want = reference.updated(banks.double(), index, embeddings.double(), 0.5)
    got = banks.pin_memory() if pinned else banks.cuda()
    ops.bank_update_(got, index.cuda(), embeddings.cuda(), 0.5)
    torch.cuda.synchronize()
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-6)


def test_sampler(ops):
    labels = torch.randint(10, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    order, position, starts = (
        torch.tensor(x, dtype=torch.int32, device="cuda") for x in reference.class_tables(labels)
    )
    table = torch.tensor(labels, dtype=torch.int32, device="cuda")
    anchors = list(range(0, 500, 7))
    seed, step = 2**40 + 3, 12
    got = ops.sample_contrast(
        torch.tensor(anchors).cuda(), order, position, table, starts, 3, 65, seed, step
    )
    want = reference.sample(anchors, labels, 3, 65, seed, step)
    assert [x.tolist() for x in got] == list(want)


def test_errors_name_the_argument(ops):
    problem = Problem(batch=2, negatives=5, n=9)
    nodes, banks, *rest = problem.inputs
    with pytest.raises(RuntimeError, match="nodes must be float32, bfloat16 or float16 on a GPU"):
        ops.bank_mcl_forward(nodes.double(), banks, *rest, *problem.options)
    with pytest.raises(RuntimeError, match="banks must be on cuda:0 or in page-locked memory"):
        ops.bank_mcl_forward(nodes, banks.cpu(), *rest, *problem.options)
    with pytest.raises(RuntimeError, match=r"banks must be \[M, n, 128\]"):
        ops.bank_mcl_forward(nodes, banks[..., :64], *rest, *problem.options)
    with pytest.raises(RuntimeError, match="temperature must be finite and positive"):
        ops.bank_mcl_forward(nodes, banks, *rest, 0.0, 3.0, 15)
