"""mclfast.data.sampler: what every batch and every epoch holds, and reproducibility."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mclfast.data import BalancedSampler, ShuffleSampler


@st.composite
def balanced_cases(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    """Class sizes, B, m and the seed, with B / m <= C and m <= every class size."""
    m = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(m, 12), min_size=1, max_size=9))
    groups = draw(st.integers(1, len(sizes)))
    return sizes, groups * m, m, draw(st.integers(0, 2**40))


def labels_of(sizes: list[int], seed: int) -> torch.Tensor:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


@settings(max_examples=150, deadline=None)
@given(balanced_cases(), st.integers(0, 500))
def test_balanced_epoch(case, epoch):
    sizes, batch_size, m, seed = case
    labels = labels_of(sizes, seed)
    sampler = BalancedSampler(labels, batch_size=batch_size, images_per_class=m, seed=seed)
    order = sampler.epoch(epoch)
    assert order.dtype == torch.int64
    assert order.shape == (len(sampler), batch_size)
    assert len(sampler) == max(1, sum(sizes) // batch_size)
    for batch in order:
        assert len(batch.unique()) == batch_size
        counts = labels[batch].bincount(minlength=len(sizes))
        assert set(counts.tolist()) <= {0, m}
        groups = labels[batch].view(-1, m)
        assert (groups == groups[:, :1]).all()
    uses = labels[order.flatten()].bincount(minlength=len(sizes))
    assert uses.max() - uses.min() <= m
    image_uses = order.flatten().bincount(minlength=len(labels))
    for c in range(len(sizes)):
        own = image_uses[labels == c]
        assert own.max() - own.min() <= 1


@settings(max_examples=50, deadline=None)
@given(balanced_cases())
def test_balanced_epochs_do_not_depend_on_the_order_of_calls(case):
    sizes, batch_size, m, seed = case
    labels = labels_of(sizes, seed)

    def make() -> BalancedSampler:
        return BalancedSampler(labels, batch_size=batch_size, images_per_class=m, seed=seed)

    first, second = make(), make()
    forward = [first.epoch(e) for e in range(4)]
    torch.rand(3)
    backward = [second.epoch(e) for e in reversed(range(4))][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.data())
def test_shuffle_epoch(num_samples, draw):
    batch_size = draw.draw(st.integers(1, num_samples))
    sampler = ShuffleSampler(num_samples, batch_size=batch_size, seed=draw.draw(st.integers()))
    order = sampler.epoch(draw.draw(st.integers(0, 10**6)))
    assert order.dtype == torch.int64
    assert order.shape == (num_samples // batch_size, batch_size) == (len(sampler), batch_size)
    flat = order.flatten()
    assert len(flat.unique()) == len(flat)
    assert 0 <= flat.min() and flat.max() < num_samples


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: ShuffleSampler(100, batch_size=10, seed=seed),
        lambda seed: BalancedSampler(
            torch.arange(100) % 10, batch_size=10, images_per_class=2, seed=seed
        ),
    ],
)
def test_seeds_and_epochs_give_different_orders(make):
    orders = [make(seed).epoch(epoch) for seed in range(3) for epoch in range(3)]
    for i, one in enumerate(orders):
        assert torch.equal(one, make(i // 3).epoch(i % 3))
        assert not any(torch.equal(one, other) for other in orders[:i])


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    BalancedSampler(torch.arange(8) % 2, batch_size=4, images_per_class=2).epoch(0)
    ShuffleSampler(8, batch_size=4).epoch(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_class_pair_and_image_is_drawn():
    labels = torch.arange(15) % 5
    sampler = BalancedSampler(labels, batch_size=4, images_per_class=2)
    pairs = set()
    for epoch in range(60):
        for batch in sampler.epoch(epoch):
            pairs.add(tuple(sorted(labels[batch].unique().tolist())))
    assert len(pairs) == 10


def test_no_image_is_preferred():
    # m does not divide the class size and B / m not the number of classes: both decks wrap.
    labels = torch.arange(35) % 5
    sampler = BalancedSampler(labels, batch_size=9, images_per_class=3)
    uses = torch.zeros(35)
    for epoch in range(800):
        uses += sampler.epoch(epoch).flatten().bincount(minlength=35)
    mean = uses.mean()
    assert ((uses - mean).abs() < 6 * mean.sqrt()).all()


def test_all_batches_of_an_epoch_of_whole_decks_visit_every_image_once():
    labels = torch.arange(40) % 5
    order = BalancedSampler(labels, batch_size=10, images_per_class=2).epoch(3)
    assert order.flatten().sort().values.tolist() == list(range(40))


def test_fewer_samples_than_a_batch_still_give_one():
    # 5 classes would need 2 images each, the set has 10 of them: B = N.
    sampler = BalancedSampler(torch.arange(10) % 5, batch_size=10, images_per_class=2)
    assert sampler.epoch(0).shape == (1, 10)


def test_cifar_100_is_fast():
    sampler = BalancedSampler(torch.arange(50_000) % 100, batch_size=128, images_per_class=2)
    start = time.perf_counter()
    order = sampler.epoch(0)
    assert time.perf_counter() - start < 1
    assert order.shape == (390, 128)
    assert (order.flatten().bincount(minlength=50_000) <= 1).all()


LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 2])


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (LABELS, {"batch_size": 5}, "batch_size: .*multiple of images_per_class=2, got 5"),
        (LABELS, {"batch_size": 8}, r"batch_size: .*2 \* 3 = 6, got 8"),
        (
            LABELS,
            {"batch_size": 3, "images_per_class": 3},
            "images_per_class=3 images of every class, got 2 of class 0",
        ),
        (LABELS, {"batch_size": 4, "num_classes": 4}, "got 0 of class 3"),
        # A count for each of so many classes would not fit into memory.
        (LABELS * 10**12, {"batch_size": 4}, "got 0 of class 1"),
        (LABELS, {"batch_size": 4, "num_classes": 10**12}, "got 0 of class 3"),
        (LABELS, {"batch_size": 4, "num_classes": 2}, r"\[0, 2\), got \[0, 2\]"),
        (LABELS - 1, {"batch_size": 4}, r"\[0, 2\), got \[-1, 1\]"),
        (LABELS, {"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        (LABELS, {"batch_size": 4, "images_per_class": 0}, "images_per_class: .*got 0"),
        (LABELS, {"batch_size": 4, "num_classes": 0}, "num_classes: .*got 0"),
        (LABELS[:0], {"batch_size": 4}, r"labels: expected \[N\]"),
        (LABELS[None], {"batch_size": 4}, r"labels: expected \[N\]"),
    ],
)
def test_balanced_refuses(labels, options, message):
    with pytest.raises(ValueError, match=message) as error:
        BalancedSampler(labels, **({"images_per_class": 2} | options))
    assert "\n" not in str(error.value)


def test_balanced_refuses_other_types():
    with pytest.raises(TypeError, match="labels: expected torch.int64, got torch.float32"):
        BalancedSampler(LABELS.float(), batch_size=4, images_per_class=2)


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "message"),
    [
        (3, 4, "batch_size: expected at most num_samples=3, got 4"),
        (0, 1, "num_samples: expected at least 1, got 0"),
        (3, 0, "batch_size: expected at least 1, got 0"),
    ],
)
def test_shuffle_refuses(num_samples, batch_size, message):
    with pytest.raises(ValueError, match=message):
        ShuffleSampler(num_samples, batch_size=batch_size)


def test_negative_epoch():
    with pytest.raises(ValueError, match="epoch: expected at least 0, got -1"):
        ShuffleSampler(3, batch_size=1).epoch(-1)
