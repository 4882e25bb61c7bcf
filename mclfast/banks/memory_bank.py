"""Memory bank: one stored embedding of every training sample, for every network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mclfast._base.checks import (
    check_embeddings,
    check_indices,
    check_integer,
    check_range,
    unknown_name,
)
from mclfast.losses import reference_banks
from mclfast.ops import backends
from mclfast.ops import banks as bank_ops

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


class MemoryBank(nn.Module):
    """Moving averages of the embeddings of a whole data set; the losses read ``bank.banks``.

    A bank takes ``num_networks * num_samples * dim`` values: ImageNet (1,281,167 samples, 128
    values) needs 0.66 GB in float32 and half of that in bfloat16 for each network. It is written
    only by :meth:`update`, never by a loss. As a buffer it is part of ``state_dict``.

    Args:
        num_networks: number of networks M.
        num_samples: number of samples n in the data set.
        dim: width D of the embeddings.
        momentum: share of the old entry in an update, in [0, 1).
        dtype: float32, or bfloat16 for half the memory and traffic; float16 and float64 work too.
        device: device of the bank, or "pinned" for host memory that GPUs read in place, for banks
            larger than a GPU (losses then run at the speed of the bus). A pinned bank stays in host
            memory when the module is moved. The GPU may still write to it after an update has
            returned: synchronise before the host reads or saves it.
        seed: seed of the initial entries, which are uniform with expected norm 1.

    Attributes:
        banks: stored embeddings [M, n, D], a buffer.

    Raises:
        ValueError: a size is below 1, the momentum lies outside [0, 1), or the dtype is another.
        RuntimeError: "pinned" was asked for and there is no GPU.

    Examples:
        >>> import torch
        >>> from mclfast import MemoryBank, unit_norm
        >>> bank = MemoryBank(num_networks=2, num_samples=40, dim=16, momentum=0.5)
        >>> bank.update(torch.tensor([3, 7]), unit_norm(torch.randn(2, 2, 16)))
        >>> bank.banks.shape
        torch.Size([2, 40, 16])

    Source: arXiv 2104.12565, section 3 (memory bank); initial entries as in instance
    discrimination, arXiv 1805.01978.
    """

    banks: Tensor

    def __init__(
        self,
        num_networks: int,
        num_samples: int,
        dim: int,
        *,
        momentum: float = 0.5,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_networks", num_networks),
            ("num_samples", num_samples),
            ("dim", dim),
        ):
            check_integer(name, value, 1)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: expected a value in [0, 1), got {momentum}")
        if dtype not in DTYPES.values():
            raise unknown_name("dtype", str(dtype).removeprefix("torch."), DTYPES)
        self.momentum = float(momentum)
        self.pinned = device == "pinned"
        if self.pinned and not torch.cuda.is_available():
            raise RuntimeError("device: expected a GPU to pin host memory for, found none")
        banks = torch.empty(
            num_networks,
            num_samples,
            dim,
            dtype=dtype,
            device="cpu" if self.pinned else device,
            pin_memory=self.pinned,
        )
        self.register_buffer("banks", banks)
        self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Draws the entries uniform in [-s, s], s = sqrt(3 / D), in place and in parts."""
        generator = torch.Generator(self.banks.device).manual_seed(seed)
        scale = (3.0 / self.banks.shape[-1]) ** 0.5
        for bank in self.banks:
            for part in bank.split(65536):
                part.uniform_(-scale, scale, generator=generator)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # A bank in host memory, because it is large, must not follow the model to the GPU, and a
        # model that is cast to half must not change the stored precision.
        banks = self._buffers.pop("banks")
        assert banks is not None
        try:
            super()._apply(fn, recurse)
        finally:
            if not self.pinned:
                probe = fn(banks.new_empty(0))
                banks = fn(banks) if probe.dtype == banks.dtype else banks.to(probe.device)
            self._buffers["banks"] = banks
        return self

    @torch.no_grad()
    def update(self, index: Tensor, embeddings: Tensor, *, backend: str = "auto") -> None:
        """Mixes new embeddings in: ``unit_norm(momentum * banks[m, i] + (1 - momentum) * v)``.

        Call it once a step, after the backward of the losses. Where a sample occurs more than once
        in ``index``, the last occurrence counts and the others are left out, whatever the backend.

        Args:
            index: numbers of the samples, [B] int64.
            embeddings: new embeddings [M, B, D], unit-norm, on the device of ``index``.
            backend: "auto" or a name that ``mclfast env`` lists.

        Raises:
            TypeError, ValueError: an argument does not fit; the text names it.
            RuntimeError: an index is out of range (on a CPU), or the backend is not available.
        """
        networks, _, dim = self.banks.shape
        check_embeddings("embeddings", embeddings, [networks, "B", dim])
        check_indices("index", index, [embeddings.shape[1]], embeddings.device)
        if embeddings.device != self.banks.device and not self.pinned:
            raise ValueError(
                f"embeddings: expected device {self.banks.device} as the bank has, "
                f"got {embeddings.device}"
            )
        found = backends.resolve(backend, embeddings.device.type, banks=True)
        # The losses refuse float64 if "cuda" is asked for by name; an update does not.
        if found == "cuda" and torch.float64 in (embeddings.dtype, self.banks.dtype):
            found = "reference"
        if found == "reference":
            check_range("index", index, self.banks.shape[1])
            reference_banks.bank_update_(self.banks, index, embeddings, self.momentum)
        else:
            bank_ops.bank_update(self.banks, index, embeddings, self.momentum, found)

    def extra_repr(self) -> str:
        networks, samples, dim = self.banks.shape
        return (
            f"num_networks={networks}, num_samples={samples}, dim={dim}, "
            f"momentum={self.momentum}, dtype={self.banks.dtype}, pinned={self.pinned}"
        )
