"""The CUDA kernels, run thread by thread on the CPU, against plain float64 torch and autograd."""

from __future__ import annotations

import math
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import emulated
from helpers import emulated_reference as reference
from helpers.emulated_reference import relative_error
from mclfast.kernels.families import ALL, ICL, SOFT_ICL, SOFT_VCL, VCL

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ on Linux"
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    # So few blocks that each has several tiles to work on.
    folder = tmp_path_factory.mktemp("cuda_emulation")
    return emulated.build(folder, "-DMCLFAST_WANTED_BLOCKS=2")


@pytest.fixture
def kernels(library) -> emulated.Kernels:
    return emulated.Kernels(library)


class Problem:
    """Random arguments, and float64 copies of the rounded values for the reference."""

    def __init__(
        self,
        networks: tuple[int, ...] = (0, 0, 1, 1),
        batch: int = 3,
        width: int = 128,
        n: int = 40,
        positives: int = 2,
        negatives: int = 37,
        tau: float = 0.2,
        t: float = 3.0,
        bank_type: torch.dtype = FP32,
        node_type: torch.dtype = FP32,
        shared: bool = False,
        banks: int | None = None,
        families: int = ALL,
    ) -> None:
        g = torch.Generator().manual_seed(len(networks) * 1000 + width)
        count = banks or max(networks) + 1

        def unit(*shape: int) -> Tensor:
            return F.normalize(torch.randn(*shape, generator=g), dim=-1)

        self.nodes = unit(len(networks), batch, width).to(node_type)
        self.banks = unit(count, n, width).to(bank_type)
        wide = torch.randint(n, (batch, 1 + positives + negatives + 3), generator=g)
        self.pos_idx = wide[:, : 1 + positives]
        self.neg_idx = wide[:, 1 + positives : 1 + positives + negatives]
        if shared:
            self.neg_idx = self.neg_idx[0].expand(batch, -1)
            assert self.neg_idx.stride(0) == 0
        shapes = [(len(networks),), (len(networks),) * 2, (count, len(networks))]
        shapes.append(shapes[1])
        self.cotangents = [torch.randn(*s, batch, generator=g) for s in shapes]
        self.tangent = torch.randn(self.nodes.shape, generator=g).to(node_type)
        self.options = (self.pos_idx, self.neg_idx, list(networks), tau, t, families)
        self.args = (self.nodes, self.banks, *self.options)
        self.wide = (self.nodes.double(), self.banks.double(), *self.options)

    def rows(self) -> list[Tensor]:
        return list(reference.bank_rows(*self.wide))

    def gradients(self) -> list[Tensor]:
        """Gradient, then those of the double backward."""
        grad, h_nodes, h = reference.bank_gradients(
            self.wide[0],
            [x.double() for x in self.cotangents],
            self.tangent.double(),
            *self.wide[1:],
        )
        return [grad, h_nodes, *h]


CASES = {
    "two_by_two": {},
    "one_key": {"negatives": 1, "positives": 0, "batch": 1},
    "no_positives": {"positives": 0, "width": 7},
    "narrow": {"width": 7, "batch": 1},
    "sharp": {"tau": 0.01, "negatives": 70},
    "unit_kl_temperature": {"t": 1.0, "width": 36},
    "unequal_stages": {"networks": (0, 0, 0, 1), "negatives": 65},
    "interleaved_networks": {"networks": (1, 0, 1, 2, 0), "width": 20},
    "bank_without_node": {"networks": (0, 0, 2), "width": 12},
    "one_network": {"networks": (0, 0), "width": 16},
    "ten_nodes": {"networks": (0,) * 3 + (1,) * 3 + (2,) * 4, "width": 64, "batch": 2},
    "sixteen_nodes_of_16": {"networks": tuple(range(16)), "width": 16, "batch": 1, "n": 20},
    "several_chunks": {"width": 260, "batch": 2},
    "more_parts_than_warps": {"networks": (0,) * 5 + (1,) * 4, "width": 520, "batch": 1},
    "many_keys": {"negatives": 600, "positives": 70, "width": 12, "batch": 1},
    "shared_negatives": {"shared": True},
    "bf16_bank": {"bank_type": BF16},
    "fp16_bank": {"bank_type": FP16, "width": 36},
    "fp16_bank_of_odd_width": {"bank_type": FP16, "width": 7},
    "bf16_nodes": {"node_type": BF16, "bank_type": BF16, "width": 64},
    "fp16_nodes": {"node_type": FP16, "width": 64},
    "vcl_alone": {"families": VCL},
    "soft_vcl_alone": {"families": SOFT_VCL},
    "icl_alone": {"families": ICL},
    "soft_icl_alone": {"families": SOFT_ICL},
    "intra_of_three": {"families": VCL | SOFT_VCL, "networks": (0, 1, 1, 2)},
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def problem(request) -> Problem:
    return Problem(**request.param)


def float32_error(problem: Problem) -> list[float]:
    """Of the reference itself in float32."""
    args = (problem.nodes.float(), problem.banks.float(), *problem.options)
    return [
        relative_error(a, b)
        for a, b in zip(reference.bank_rows(*args), problem.rows(), strict=True)
    ]


def test_rows_as_accurate_as_eager_float32(kernels, problem):
    got = kernels.forward(*problem.args)
    eager = float32_error(problem)
    for name, mine, want, theirs in zip(
        reference.Rows._fields, got, problem.rows(), eager, strict=True
    ):
        assert relative_error(mine, want) <= 2 * theirs + 1e-6, name


def gradient_bound(x: Tensor) -> float:
    return 1e-5 if x.dtype == FP32 else torch.finfo(x.dtype).eps


def test_backward_and_double_backward(kernels, problem):
    statistics = kernels.forward(*problem.args)[4:]
    grad, h_nodes, *h = problem.gradients()
    got = kernels.backward(problem.cotangents, statistics, *problem.args)
    assert got.dtype == problem.nodes.dtype
    assert relative_error(got, grad) < gradient_bound(got)
    second = kernels.double_backward(problem.tangent, problem.cotangents, statistics, *problem.args)
    assert relative_error(second[0], h_nodes) < gradient_bound(got)
    for mine, want in zip(second[1:], h, strict=True):
        assert relative_error(mine, want) < 1e-5


def test_fused_is_forward_and_backward(kernels, problem):
    got = kernels.fused(problem.cotangents, *problem.args)
    want = [*kernels.forward(*problem.args)]
    want.append(kernels.backward(problem.cotangents, want[4:], *problem.args))
    for mine, other in zip(got, want, strict=True):
        # The soft rows are small differences of sums that the two cut into other parts.
        bound = 3e-5 if mine.dtype == FP32 else torch.finfo(mine.dtype).eps
        assert relative_error(mine, other) < bound


def team_launches(library) -> int:
    return library.emulation_cooperative_launches()


@pytest.mark.parametrize(
    ("processors", "cache", "batch"),
    # One block; one team of all; as many teams as anchors; teams that run several anchors.
    [(1, 1 << 10, 2), (4, 1 << 10, 3), (4, 1 << 30, 3), (3, 300_000, 5)],
)
def test_fused_with_teams(kernels, library, processors, cache, batch):
    problem = Problem(batch=batch, negatives=150, width=64)
    kernels.device(processors=processors, cache=cache)
    before = team_launches(library)
    *rows, grad = kernels.fused(problem.cotangents, *problem.args)
    assert team_launches(library) == before + 1
    for mine, want in zip(rows, problem.rows(), strict=True):
        assert relative_error(mine, want) < 2e-5
    assert relative_error(grad, problem.gradients()[0]) < 1e-5


def test_fused_with_more_blocks_in_a_team_than_lanes(kernels, library):
    problem = Problem(batch=2, negatives=1200, width=8)
    kernels.device(processors=20, cache=1)
    before = team_launches(library)
    *rows, grad = kernels.fused(problem.cotangents, *problem.args)
    assert team_launches(library) == before + 1
    for mine, want in zip(rows, problem.rows(), strict=True):
        assert relative_error(mine, want) < 2e-5
    assert relative_error(grad, problem.gradients()[0]) < 1e-5


def test_fused_falls_back_where_no_team_fits(kernels, library):
    problem = Problem(**CASES["more_parts_than_warps"])
    before = team_launches(library)
    *_, grad = kernels.fused(problem.cotangents, *problem.args)
    assert team_launches(library) == before
    assert relative_error(grad, problem.gradients()[0]) < 1e-5


@pytest.mark.parametrize("order", [1, 2], ids=["descending", "random"])
# The first has room for one stage of bank rows only.
@pytest.mark.parametrize("shared", [17 * 1024, 227 * 1024])
def test_equal_bits_in_any_order_of_threads(kernels, order, shared):
    """A missing barrier would show: threads run in another order between two barriers."""

    def results() -> list[Tensor]:
        problem = Problem(networks=(0, 0, 1, 2), negatives=150, width=128)
        nce = NceProblem(width=128)
        out = kernels.forward(*problem.args)
        return [
            *out,
            kernels.backward(problem.cotangents, out[4:], *problem.args),
            *kernels.fused(problem.cotangents, *problem.args),
            *kernels.double_backward(problem.tangent, problem.cotangents, out[4:], *problem.args),
            *kernels.nce_fused(*nce.args),
            kernels.nce_double(nce.tangent, *nce.args),
        ]

    kernels.device(0, 3, 100_000, shared)
    first = results()
    kernels.device(order, 3, 100_000, shared)
    assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))


def test_a_missing_barrier_is_noticed(library):
    """The check of the check: a race gives different results in another order of threads."""
    results = set()
    for order in range(3):
        emulated.Kernels(library).device(order=order)
        results.add(library.emulation_race())
    assert len(results) > 1


def test_workspace_stays_small(tmp_path):
    kernels = emulated.Kernels(emulated.build(tmp_path))
    networks = [0] * 4 + [1] * 4
    nodes, banks = torch.zeros(8, 256, 128), torch.zeros(2, 10, 128)
    pos_idx, neg_idx = torch.zeros(256, 1).long(), torch.zeros(256, 8193).long()
    kernels.device(processors=132, cache=50 << 20)
    bank = kernels.bank(nodes, banks, pos_idx, neg_idx, networks, 0.1, 3.0)
    assert 0 < kernels.library.emulated_workspace(emulated.c.byref(bank)) < 16 << 20


def test_anchor_far_above_the_rest(kernels):
    """Scores of 1e4 apart: sums of exponentials neither overflow nor vanish."""
    problem = Problem(tau=1e-4, width=8)
    for mine, want in zip(kernels.forward(*problem.args), problem.rows(), strict=True):
        assert mine.isfinite().all()
        assert relative_error(mine, want) < 1e-5


class NceProblem:
    def __init__(self, networks=3, batch=3, width=36, n=50, negatives=44, tau=0.2, bank_type=FP32):
        problem = Problem(
            tuple(range(networks)), batch, width, n, 0, negatives, tau, bank_type=bank_type
        )
        g = torch.Generator().manual_seed(1)
        self.normalizer = torch.randn(networks, networks, generator=g) + 1
        self.tangent = problem.tangent
        inputs = (problem.nodes, problem.banks, problem.pos_idx, problem.neg_idx)
        self.inputs = (*inputs, tau)
        self.args = (*inputs, self.normalizer, tau, 1e-3)
        self.wide = [x.double() if x.is_floating_point() else x for x in self.args[:5]]
        self.wide += self.args[5:]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"networks": 2, "batch": 1, "negatives": 1},
        {"width": 7, "negatives": 300},
        {"bank_type": BF16, "width": 128},
        {"tau": 0.01},
        {"networks": 9, "width": 8},
    ],
    ids=str,
)
def test_nce(kernels, options):
    problem = NceProblem(**options)
    rows, lse = reference.nce_rows(*problem.wide)
    grad, second = reference.nce_gradients(
        problem.wide[0], problem.tangent.double(), *problem.wide[1:]
    )
    got_rows, got_grad = kernels.nce_fused(*problem.args)
    assert relative_error(kernels.nce_lse(*problem.inputs), lse) < 1e-6
    assert relative_error(got_rows, rows) < 2e-6
    assert relative_error(got_grad, grad) < 1e-5
    assert relative_error(kernels.nce_double(problem.tangent, *problem.args), second) < 1e-5


@pytest.mark.parametrize("bank_type", [FP32, BF16, FP16])
@pytest.mark.parametrize("order", [0, 1])
def test_update_keeps_the_last_of_equal_indices(kernels, bank_type, order):
    kernels.device(order=order)
    g = torch.Generator().manual_seed(0)
    banks = F.normalize(torch.randn(2, 9, 37, generator=g), dim=2).to(bank_type)
    embeddings = torch.randn(2, 40, 37, generator=g)
    index = torch.randint(7, (40,), generator=g)
    want = reference.updated(banks.double(), index, embeddings.double(), 0.5)
    kernels.update_(banks, index, embeddings, 0.5)
    tolerance = 1e-6 if bank_type == FP32 else torch.finfo(bank_type).eps
    torch.testing.assert_close(banks.double(), want, rtol=tolerance, atol=tolerance)


def test_update_with_a_zero_embedding(kernels):
    banks = torch.zeros(1, 3, 5)
    kernels.update_(banks, torch.tensor([1]), torch.zeros(1, 1, 5), 0.5)
    assert torch.equal(banks, torch.zeros(1, 3, 5))


ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(library, counter, key, want):
    out = (emulated.c.c_uint32 * 4)(*counter)
    library.emulated_philox(out, *map(emulated.c.c_uint32, key))
    assert tuple(out) == want
    assert reference.philox(counter, key) == want


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (0x123456789ABCDEF0, 7), (2**63 - 1, 2**31)])
def test_sampler(kernels, seed, step):
    labels = [3, 0, 1, 1, 0, 2, 1, 3, 3, 0, 1]  # class 2 has one sample
    tables = reference.class_tables(labels)
    order, position, starts = (torch.tensor(x, dtype=torch.int32) for x in tables)
    anchors = [5, 0, 2, 2, 10]
    got = kernels.sample(
        torch.tensor(anchors),
        (order, position, torch.tensor(labels, dtype=torch.int32), starts),
        3,
        20,
        seed,
        step,
    )
    want = reference.sample(anchors, labels, 3, 20, seed, step)
    assert got[0].tolist() == want[0]
    assert got[1].tolist() == want[1]


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("where", ["node", "negative", "own entry"])
def test_what_is_not_finite_stays_so(kernels, where, value):
    p = Problem()
    if where == "node":
        p.nodes[1, 0, 3] = value
    else:
        key = p.neg_idx[0, 5] if where == "negative" else p.pos_idx[0, 0]
        p.banks[1, key, 2] = value
    p.args = (p.nodes, p.banks, *p.options)
    p.wide = (p.nodes.double(), p.banks.double(), *p.options)
    *rows, lse, kl_lse = kernels.forward(*p.args)
    grad, *second = p.gradients()
    found = kernels.double_backward(p.tangent, p.cotangents, [lse, kl_lse], *p.args)
    for got, want in zip(found, second, strict=True):
        assert not (got.isfinite() & ~want.isfinite()).any()
    rows.append(kernels.backward(p.cotangents, [lse, kl_lse], *p.args))
    for got, want in zip(rows, [*p.rows()[:4], grad], strict=True):
        assert torch.equal(got.isfinite(), want.isfinite())
    assert torch.equal(kernels.fused(p.cotangents, *p.args)[-1].isfinite(), grad.isfinite())


def test_an_updated_entry_with_nan_is_nan(kernels):
    banks = torch.ones(1, 3, 8)
    embeddings = torch.ones(1, 1, 8)
    embeddings[0, 0, 2] = math.nan
    kernels.update_(banks, torch.tensor([1]), embeddings, 0.5)
    assert banks[0, 1].isnan().all()
    assert banks[0, 0].isfinite().all()
