"""Which samples an anchor meets: their classes, their distribution, equality of backends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mclfast import ContrastSampler
from mclfast.banks.philox import philox, uniform_integers

pytestmark = pytest.mark.usefixtures("backend")

# Known answers of the generator's authors (Random123): counter, key, words.
KNOWN = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter, key, words):
    assert tuple(int(w) for w in philox(counter, key)) == words


def chi_square_is_usual(counts: Tensor, expected: Tensor) -> bool:
    """Whether the statistic lies within five standard deviations of its mean."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    return abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def unbalanced() -> Tensor:
    """Labels of 200 samples in six classes of sizes 1, 2, 17, 30, 50 and 100, out of order."""
    sizes = torch.tensor([1, 2, 17, 30, 50, 100])
    labels = torch.repeat_interleave(torch.arange(6), sizes)
    return labels[torch.randperm(200, generator=torch.Generator().manual_seed(0))]


def test_classes_of_what_is_drawn():
    labels = unbalanced()
    sampler = ContrastSampler(labels, 33, num_positives=3, seed=1)
    index = torch.arange(200)
    pos, neg = sampler.sample(index, step=4)
    assert pos.shape == (200, 4) and neg.shape == (200, 33)
    assert pos.dtype == neg.dtype == torch.int64
    assert torch.equal(pos[:, 0], index)
    assert (labels[pos] == labels[:, None]).all()
    assert (labels[neg] != labels[:, None]).all()
    alone = torch.bincount(labels)[labels] == 1
    assert (pos[~alone, 1:] != index[~alone, None]).all()
    assert (pos[alone] == index[alone, None]).all()


def test_draws_are_uniform():
    labels = unbalanced()
    sampler = ContrastSampler(labels, 100, num_positives=40, seed=2)
    anchor = int((labels == 3).nonzero()[4])
    index = torch.tensor([anchor])
    draws = [sampler.sample(index, step) for step in range(300)]
    positives = torch.cat([d.pos_idx[0, 1:] for d in draws])
    negatives = torch.cat([d.neg_idx[0] for d in draws])
    own = (labels == 3) & (torch.arange(200) != anchor)
    for drawn, allowed in ((positives, own), (negatives, labels != 3)):
        counts = torch.bincount(drawn, minlength=200)[allowed].double()
        assert chi_square_is_usual(counts, torch.full_like(counts, len(drawn) / len(counts)))
    # Draws of neighbouring columns and steps are independent: pairs fill the square evenly.
    place = torch.cumsum(labels != 3, 0)[negatives] - 1
    cells = (place * 10 // 170).view(300, 100)
    for a, b in ((cells[:, :-1], cells[:, 1:]), (cells[:-1], cells[1:])):
        counts = torch.bincount((a * 10 + b).flatten(), minlength=100).double()
        assert chi_square_is_usual(counts, torch.full_like(counts, a.numel() / 100))


def test_draws_depend_on_seed_step_and_anchor_only():
    labels = unbalanced()
    sampler = ContrastSampler(labels, 50, seed=3)
    index = torch.arange(40)
    pos, neg = sampler.sample(index, step=7)
    # However the batch is cut or ordered, an anchor draws the same.
    parts = [sampler.sample(part, step=7) for part in index.flip(0).split(7)]
    assert torch.equal(torch.cat([p.pos_idx for p in parts]).flip(0), pos)
    assert torch.equal(torch.cat([p.neg_idx for p in parts]).flip(0), neg)
    for seed, step in ((3, 8), (4, 7), (3 + 2**32, 7)):
        other = ContrastSampler(labels, 50, seed=seed).sample(index, step)
        assert (other.neg_idx == neg).double().mean() < 0.05
    # More draws of one anchor go on where fewer end.
    more = ContrastSampler(labels, 75, seed=3).sample(index, step=7)
    assert torch.equal(more.neg_idx[:, :50], neg)


@pytest.mark.parametrize("positives", [0, 1, 4])
@pytest.mark.parametrize("negatives", [1, 8, 127])
def test_backends_draw_the_same_numbers(positives, negatives):
    sampler = ContrastSampler(unbalanced(), negatives, num_positives=positives, seed=2**63 - 12345)
    index = torch.tensor([0, 199, 5, 5, 77])
    for step in (0, 1, 2**32 - 1):
        got, want = sampler.sample(index, step), sampler.sample(index, step, backend="reference")
        assert torch.equal(got.pos_idx, want.pos_idx)
        assert torch.equal(got.neg_idx, want.neg_idx)


def test_shared_negatives():
    labels = unbalanced()
    sampler = ContrastSampler(labels, 5000, shared_negatives=True, seed=1)
    index = torch.cat([(labels == c).nonzero()[:2, 0] for c in (1, 4)])
    pos, neg = sampler.sample(index, step=3)
    assert pos.shape == (4, 2) and neg.shape == (5000,)
    assert (labels[pos] == labels[index][:, None]).all()
    allowed = (labels != 1) & (labels != 4)
    assert allowed[neg].all()
    counts = torch.bincount(neg, minlength=200)[allowed].double()
    assert chi_square_is_usual(counts, torch.full_like(counts, 5000 / len(counts)))
    with pytest.raises(ValueError, match="^shared_negatives: expected a class that is not in"):
        sampler.sample(torch.arange(200), step=0)


def test_shared_negatives_where_class_numbers_have_gaps():
    labels = torch.tensor([0, 0, 50, 50, 90])
    sampler = ContrastSampler(labels, 20, shared_negatives=True)
    assert (sampler.sample(torch.tensor([0, 2]), step=0).neg_idx == 4).all()
    with pytest.raises(ValueError, match="^shared_negatives: .*a batch with all 3 classes"):
        sampler.sample(torch.tensor([0, 2, 4]), step=0)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("wrong", [-1, 200])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_numbers_out_of_range(backend, wrong, shared):
    sampler = ContrastSampler(unbalanced(), 4, shared_negatives=shared)
    with pytest.raises(RuntimeError, match=f"^index must be in 0 .. 199, got {wrong}"):
        sampler.sample(torch.tensor([0, wrong]), step=0, backend=backend)


def test_memory_is_three_tables():
    labels = torch.arange(100_000) % 1000
    sampler = ContrastSampler(labels, 16)
    held = sum(b.nbytes for b in sampler.buffers())
    assert held <= 3 * 4 * 100_000 + 4 * 1001
    assert not sampler.state_dict()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("kind", "stretch"),
    [
        (torch.uint8, 40),
        (torch.int16, 6000),
        (torch.uint16, 13_000),
        (torch.uint32, 800_000_000),
        (torch.int64, 10**9),
        (torch.int64, 2**60),
        (torch.uint64, 2**60),
    ],
)
def test_memory_and_draws_do_not_depend_on_the_largest_label(kind, stretch, shared):
    plain = unbalanced()
    labels = (plain * stretch).to(kind)
    index = torch.arange(0, 200, 50)
    want = ContrastSampler(plain, 9, shared_negatives=shared).sample(index, step=2)
    sampler = ContrastSampler(labels, 9, shared_negatives=shared)
    for backend in ("auto", "reference"):
        got = sampler.sample(index, step=2, backend=backend)
        assert torch.equal(got.pos_idx, want.pos_idx)
        assert torch.equal(got.neg_idx, want.neg_idx)
    assert sum(b.nbytes for b in sampler.buffers()) == 4 * (3 * 200 + 7)


def test_uniform_integers_cover_their_range():
    drawn = uniform_integers(4001, 7, 0, seed=0, step=0, stream=5)
    counts = torch.bincount(drawn).double()
    assert drawn.shape == (4001,) and len(counts) == 7
    assert chi_square_is_usual(counts, torch.full_like(counts, 4001 / 7))
    largest = uniform_integers(2000, 2**31 - 1, 0, seed=0, step=0, stream=0)
    assert largest.max() < 2**31 - 1 and largest.min() >= 0
    assert largest.double().mean() == pytest.approx(2**30, rel=0.05)


@pytest.mark.parametrize(
    ("labels", "change", "error", "message"),
    [
        (torch.zeros(4), {}, TypeError, "^labels: expected an integer tensor"),
        (torch.tensor([True, False]), {}, TypeError, "^labels: expected .*got bool tensor"),
        (torch.zeros(4).long(), {}, ValueError, "^labels: expected at least two classes"),
        (torch.tensor([-1, 2]), {}, ValueError, "^labels: expected .*smallest -1"),
        (torch.arange(4)[:, None], {}, TypeError, r"^labels: expected .*of shape \[4, 1\]"),
        (
            torch.tensor([0, 2**63], dtype=torch.uint64),
            {},
            ValueError,
            "got 2 with 9223372036854775808",
        ),
        (torch.arange(4), {"num_negatives": 0}, ValueError, "^num_negatives: expected"),
        (torch.arange(4), {"num_positives": -1}, ValueError, "^num_positives: expected"),
        (torch.arange(4), {"seed": 2**63}, ValueError, "^seed: expected a value"),
    ],
)
def test_wrong_settings(labels, change, error, message):
    with pytest.raises(error, match=message):
        ContrastSampler(labels, **({"num_negatives": 4} | change))


def test_wrong_batches():
    sampler = ContrastSampler(torch.arange(6) % 2, 3)
    with pytest.raises(TypeError, match="^index: expected an int64 tensor"):
        sampler.sample(torch.zeros(2), 0)
    with pytest.raises(ValueError, match="^step: expected a value < 2"):
        sampler.sample(torch.zeros(2).long(), 2**32)
