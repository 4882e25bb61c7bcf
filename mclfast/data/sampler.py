"""Batches of sample numbers, the whole epoch at once, as a pure function of (seed, epoch).

A run resumes from the number of the epoch and the position in it; samplers have no state to save.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Generator, Tensor


def smallest_class(labels: Tensor, num_classes: int) -> tuple[int, int]:
    """The first class with the fewest samples, and their number.

    The memory that this takes goes by the number of labels: a label may be any number.

    Args:
        labels: int64 [N], in [0, num_classes).
        num_classes: number of classes.
    """
    used, counts = torch.unique(labels, return_counts=True)
    if len(used) < num_classes:
        # The labels that are used ascend: the first that is not its own position leaves a gap.
        gaps = (used != torch.arange(len(used), device=used.device)).nonzero()
        return (int(gaps[0]) if len(gaps) else len(used)), 0
    smallest = int(counts.argmin())
    return smallest, int(counts[smallest])


class ShuffleSampler:
    """Draws every sample at most once in an epoch; an incomplete last batch is dropped.

    Args:
        num_samples: number of samples N.
        batch_size: number of samples in a batch B, at most N.
        seed: seed of all epochs.

    Raises:
        ValueError: a size is not positive, or batch_size exceeds num_samples.
    """

    def __init__(self, num_samples: int, *, batch_size: int, seed: int = 0) -> None:
        _check_positive("num_samples", num_samples)
        _check_positive("batch_size", batch_size)
        if batch_size > num_samples:
            raise ValueError(
                f"batch_size: expected at most num_samples={num_samples}, got {batch_size}"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed

    def __len__(self) -> int:
        """Batches in an epoch, floor(N / B)."""
        return self.num_samples // self.batch_size

    def epoch(self, epoch: int) -> Tensor:
        """The sample numbers of one epoch.

        Args:
            epoch: number of the epoch, from 0.

        Returns:
            int64 [len(self), B] on the CPU.
        """
        generator = _epoch_generator("shuffle", self.seed, epoch)
        order = torch.randperm(self.num_samples, generator=generator)
        return order[: len(self) * self.batch_size].view(len(self), self.batch_size)


class BalancedSampler:
    """Draws batches of B / m distinct classes with m distinct images of each class.

    Within an epoch, the numbers of times that two classes are used differ by at most one, and so do
    those of two images of a class. Images of small classes therefore come more often than images of
    large ones. (The published sampler draws the images of every batch anew, so that some come again
    before others have come at all; here they are dealt without replacement across the batches of an
    epoch, like cards from shuffled decks.)

    Args:
        labels: int64 [N], on any device.
        batch_size: number of samples in a batch B, a multiple of m.
        images_per_class: number of images m of each class in a batch.
        num_classes: number of classes C; by default the largest label plus one.
        seed: seed of all epochs.

    Raises:
        TypeError: labels are not int64.
        ValueError: a size is not positive, labels are not [N] or out of range, batch_size is not a
            multiple of m or exceeds m * C, or a class has fewer than m images.
    """

    def __init__(
        self,
        labels: Tensor,
        *,
        batch_size: int,
        images_per_class: int,
        num_classes: int | None = None,
        seed: int = 0,
    ) -> None:
        _check_positive("batch_size", batch_size)
        _check_positive("images_per_class", images_per_class)
        if labels.dtype != torch.int64:
            raise TypeError(f"labels: expected torch.int64, got {labels.dtype}")
        if labels.ndim != 1 or len(labels) == 0:
            raise ValueError(f"labels: expected [N] with N > 0, got shape {list(labels.shape)}")
        labels = labels.cpu()
        lowest, highest = int(labels.min()), int(labels.max())
        classes = max(highest, 0) + 1 if num_classes is None else num_classes
        _check_positive("num_classes", classes)
        if lowest < 0 or highest >= classes:
            raise ValueError(
                f"labels: expected values in [0, {classes}), got [{lowest}, {highest}]"
            )
        if batch_size % images_per_class != 0:
            raise ValueError(
                f"batch_size: expected a multiple of images_per_class={images_per_class}, "
                f"got {batch_size}"
            )
        if images_per_class * classes < batch_size:
            raise ValueError(
                f"batch_size: expected at most images_per_class * classes = {images_per_class} * "
                f"{classes} = {images_per_class * classes}, got {batch_size}"
            )
        smallest, count = smallest_class(labels, classes)
        if count < images_per_class:
            raise ValueError(
                f"labels: expected at least images_per_class={images_per_class} images of every "
                f"class, got {count} of class {smallest}"
            )
        counts = torch.bincount(labels, minlength=classes)
        self.batch_size = batch_size
        self.images_per_class = images_per_class
        self.num_classes = classes
        self.num_samples = len(labels)
        self.seed = seed
        # members[c] int64 [n_c]: the samples of class c.
        self._members = torch.argsort(labels, stable=True).split(counts.tolist())

    def __len__(self) -> int:
        """Batches in an epoch, floor(N / B) but at least 1."""
        return max(1, self.num_samples // self.batch_size)

    def epoch(self, epoch: int) -> Tensor:
        """The sample numbers of one epoch.

        Args:
            epoch: number of the epoch, from 0.

        Returns:
            int64 [len(self), B] on the CPU; the m images of a class are neighbours in their row.
        """
        generator = _epoch_generator("balanced", self.seed, epoch)
        m = self.images_per_class
        classes = _draw_groups(
            self.num_classes, self.batch_size // m, len(self), generator
        )  # [len, B / m]
        samples = torch.empty(classes.numel(), m, dtype=torch.int64)
        # Turns of the same class stand together in ``turns``, in the order of the epoch.
        turns = torch.argsort(classes.flatten(), stable=True)
        uses = torch.bincount(classes.flatten(), minlength=self.num_classes).tolist()
        for members, turn in zip(self._members, turns.split(uses), strict=True):
            samples[turn] = members[_draw_groups(len(members), m, len(turn), generator)]
        return samples.view(len(self), self.batch_size)


def _draw_groups(items: int, size: int, groups: int, generator: Generator) -> Tensor:
    """Deals shuffled decks of range(items) into groups of ``size`` distinct items.

    Decks are used up one after the other, so the use counts of two items differ by at most 1.

    Args:
        items: number of items in a deck.
        size: number of items in a group, at most ``items``.
        groups: number of groups.
        generator: source of randomness, on the CPU.

    Returns:
        int64 [groups, size].
    """
    decks = -(-groups * size // items)
    dealt = torch.rand(decks, items, dtype=torch.float64, generator=generator).argsort(1)
    if items % size != 0:
        _separate(dealt, size)
    return dealt.flatten()[: groups * size].view(groups, size)


def _separate(dealt: Tensor, size: int) -> None:
    """Reorders decks [decks, items] in place so that no group holds an item twice.

    A group that begins at the end of one deck takes its last items from the start of the next
    deck. Items that the group already holds are moved back in that deck; enough others remain,
    because items >= size.
    """
    decks, items = dealt.shape
    for deck in range(1, decks):
        held = deck * items % size
        if held == 0:
            continue
        current = dealt[deck]
        is_free = ~torch.isin(current, dealt[deck - 1, items - held :])
        # The first ``size - held`` free items come first, all others keep their order.
        is_first = is_free & (is_free.cumsum(0) <= size - held)
        dealt[deck] = torch.cat((current[is_first], current[~is_first]))


def _epoch_generator(sampler: str, seed: int, epoch: int) -> Generator:
    """A generator for one epoch.

    Its seed is a hash: with seed + epoch, run 1 would repeat the epochs of run 0, and the CPU
    generator uses only the low 32 bits of its seed.
    """
    if epoch < 0:
        raise ValueError(f"epoch: expected at least 0, got {epoch}")
    digest = hashlib.blake2b(f"{sampler} {seed} {epoch}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
