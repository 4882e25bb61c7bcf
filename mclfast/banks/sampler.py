"""Sampler of the bank entries that an anchor is contrasted with: positives and negatives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mclfast._base.checks import check_indices, check_integer, check_range, describe
from mclfast.banks.philox import uniform_integers
from mclfast.ops import backends
from mclfast.ops.in_batch import implementation

_POSITIVES, _NEGATIVES, _SHARED = 0, 1, 2


class ContrastIndices(NamedTuple):
    """Numbers of the samples that the memory-bank losses contrast a batch with.

    Attributes:
        pos_idx: positives [B, 1 + P] int64, the anchor's own number, then samples of its class.
        neg_idx: negatives [B, K] int64, samples of other classes; [K] if the batch shares them.
    """

    pos_idx: Tensor
    neg_idx: Tensor


class ContrastSampler(nn.Module):
    """Draws positives and negatives for memory-bank losses, on the device of the batch.

    Positives are drawn from the other samples of the anchor's class, never the anchor itself (a
    sample that is alone in its class is its own positive); negatives from all samples of other
    classes, with replacement, all equally likely. Draws are a function of the seed, the step and
    the anchor's number (Philox4x32-10): the same on every device and for any number of processes
    or workers. They are uniform up to one part in 2**33.

    The sampler keeps three tables of one int32 for each sample (15 MB for ImageNet), outside
    ``state_dict``. Lists of each class's negatives would take n times the number of classes.

    Args:
        labels: class of every sample, [n] integers of any kind, in [0, 2**63) and with gaps.
        num_negatives: number of negatives K for each anchor, published 8192 (16384 for MCL-OKD).
        num_positives: number of positives P for each anchor, published 1; 0 for the
            noise-contrastive loss.
        shared_negatives: draw one set of K for the whole batch instead of one for each anchor, from
            the classes that are not in the batch: far fewer rows to gather.
        seed: seed of the draws, in [0, 2**63).

    Raises:
        TypeError, ValueError: the labels are not integers [n] >= 0, are all of one class or more
            than 2**31 - 1, or num_negatives is below 1 or num_positives below 0.

    Examples:
        >>> import torch
        >>> from mclfast import ContrastSampler
        >>> labels = torch.arange(40) % 4
        >>> sampler = ContrastSampler(labels, num_negatives=8)
        >>> pos_idx, neg_idx = sampler.sample(torch.tensor([5, 6]), step=0)
        >>> pos_idx[:, 0].tolist(), bool((labels[pos_idx[0]] == labels[5]).all())
        ([5, 6], True)
        >>> neg_idx.shape, bool((labels[neg_idx[0]] != labels[5]).all())
        (torch.Size([2, 8]), True)

    Source: arXiv 2104.12565 (ImageNet runs; there a positive may be the anchor itself).
    """

    order: Tensor
    position: Tensor
    labels: Tensor
    starts: Tensor

    def __init__(
        self,
        labels: Tensor,
        num_negatives: int,
        *,
        num_positives: int = 1,
        shared_negatives: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (
            not isinstance(labels, Tensor)
            or labels.dtype.is_floating_point
            or labels.dtype.is_complex
            or labels.dtype == torch.bool
            or labels.dim() != 1
        ):
            raise TypeError(f"labels: expected an integer tensor [n], got {describe(labels)}")
        # PyTorch can do little with unsigned integers; here one of 2**63 or more becomes negative.
        unsigned, labels = labels.dtype == torch.uint64, labels.to(torch.int64)
        if not 2 <= len(labels) < 2**31 or int(labels.min()) < 0:
            least = int(labels.min()) if len(labels) else 0
            found = f"{least % 2**64} among them" if unsigned else f"smallest {least}"
            raise ValueError(
                f"labels: expected 2 to 2**31 - 1 labels in [0, 2**63), got {len(labels)}"
                + (f" with {found}" if least < 0 else "")
            )
        check_integer("num_negatives", num_negatives, 1)
        check_integer("num_positives", num_positives, 0)
        check_integer("seed", seed, 0)
        if seed >= 2**63:
            raise ValueError(f"seed: expected a value < 2**63, got {seed}")
        # Classes are numbered anew: memory goes by their number and not by the largest label.
        _, labels, counts = torch.unique(labels, return_inverse=True, return_counts=True)
        if len(counts) < 2:
            raise ValueError("labels: expected at least two classes, got one")
        order = labels.argsort(stable=True)
        position = torch.empty_like(order)
        position[order] = torch.arange(len(labels), device=labels.device)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        tables = {"order": order, "position": position, "labels": labels, "starts": starts}
        for name, table in tables.items():
            self.register_buffer(name, table.to(torch.int32), persistent=False)
        self._num_classes = len(counts)
        self.num_negatives, self.num_positives = num_negatives, num_positives
        self.shared_negatives, self.seed = bool(shared_negatives), seed

    def sample(self, index: Tensor, step: int, *, backend: str = "auto") -> ContrastIndices:
        """The positives and negatives of a batch.

        Args:
            index: numbers of the anchors in the data set, [B] int64.
            step: number of the training step, in [0, 2**32), counted over the whole run: the same
                number gives the same draws, in a later epoch too.
            backend: "auto" or a name that ``mclfast env`` lists.

        Raises:
            TypeError, ValueError: an argument does not fit, and the text names it; or the batch has
                all classes with ``shared_negatives``.
            RuntimeError: an index is out of range (on a CPU; on a GPU it is not checked).
        """
        check_integer("step", step, 0)
        if step >= 2**32:
            raise ValueError(f"step: expected a value < 2**32, got {step}")
        check_indices("index", index, ["B"], self.order.device)
        found = backends.resolve(backend, index.device.type, banks=True)
        # The compiled sampler checks its index itself; plain indexing would take -1 for the last.
        if self.shared_negatives or found == "reference":
            check_range("index", index, len(self.order))
        if self.shared_negatives:
            own = self._positives(index, step)
            return ContrastIndices(own, self._shared_negatives(index, step))
        if found == "reference":
            return ContrastIndices(self._positives(index, step), self._negatives(index, step))
        tables = (self.order, self.position, self.labels, self.starts)
        sample = implementation(found, "sample_contrast")
        counts = (self.num_positives, self.num_negatives)
        return ContrastIndices(*sample(index, *tables, *counts, self.seed, step))

    def _class_of(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """First place in ``order`` and size of the class of every anchor, [B] each."""
        label = self.labels[index]
        first = self.starts[label].long()
        return first, self.starts[label + 1].long() - first

    def _positives(self, index: Tensor, step: int) -> Tensor:
        first, size = self._class_of(index)
        bound = (size - 1).clamp_min(1)
        drawn = uniform_integers(
            self.num_positives, bound, index, seed=self.seed, step=step, stream=_POSITIVES
        )
        # Skipping the anchor's own place keeps the others equally likely.
        own = (self.position[index].long() - first)[:, None]
        place = torch.where(size[:, None] > 1, drawn + (drawn >= own), 0)
        return torch.cat([index[:, None], self.order[first[:, None] + place].long()], dim=1)

    def _negatives(self, index: Tensor, step: int) -> Tensor:
        first, size = self._class_of(index)
        drawn = uniform_integers(
            self.num_negatives,
            len(self.order) - size,
            index,
            seed=self.seed,
            step=step,
            stream=_NEGATIVES,
        )
        return self.order[drawn + (drawn >= first[:, None]) * size[:, None]].long()

    def _shared_negatives(self, index: Tensor, step: int) -> Tensor:
        sizes = self.starts.diff().long()
        sizes[self.labels[index].long()] = 0
        ends = sizes.cumsum(0)
        # The question waits for the device, so it is asked only if a batch can hold every class.
        if self._num_classes <= len(index) and int(ends[-1]) == 0:
            raise ValueError(
                "shared_negatives: expected a class that is not in the batch, got a batch with all "
                f"{self._num_classes} classes"
            )
        drawn = uniform_integers(
            self.num_negatives, ends[-1:], 0, seed=self.seed, step=step, stream=_SHARED
        ).flatten()
        label = torch.searchsorted(ends, drawn, right=True)
        return self.order[self.starts[label] + drawn - (ends - sizes)[label]].long()

    def extra_repr(self) -> str:
        return (
            f"num_samples={len(self.order)}, num_negatives={self.num_negatives}, "
            f"num_positives={self.num_positives}, shared_negatives={self.shared_negatives}"
        )
