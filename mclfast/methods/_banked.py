"""Base class of the methods with memory banks: options, draws from the banks, their updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mclfast._base.checks import check_keys, check_temperature
from mclfast._base.settings import setting
from mclfast.banks.memory_bank import DTYPES, MemoryBank
from mclfast.banks.sampler import ContrastIndices, ContrastSampler
from mclfast.cohort.outputs import Batch, PeerOutputs, Setup
from mclfast.methods.base import Method, prepared
from mclfast.ops import backends


class BankMethod(Method):
    """A method that contrasts embeddings with memory banks, one of each network's embeddings."""

    projections = True
    uses_maps = False

    @dataclass
    class Options(Method.Options):
        temperature: float = setting(0.1, "divides the cosine similarities")
        num_negatives: int = setting(8192, "bank entries of other classes per anchor")
        bank_momentum: float = setting(0.5, "share of the old entry when a bank is updated")
        bank_dtype: Literal["float32", "bfloat16", "float16"] = setting(
            "float32", "storage of the banks"
        )
        bank_storage: Literal["device", "pinned"] = setting(
            "device", "banks on the device of the run, or in pinned host memory"
        )
        backend: str = setting("auto", "backend of the contrastive losses, see mclfast env")

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature("temperature", self.temperature)
            check_keys("num_negatives", self.num_negatives)
            if not 0 <= self.bank_momentum < 1:
                raise ValueError(
                    f"bank_momentum: expected a value in [0, 1), got {self.bank_momentum}"
                )
            backends.check_name(self.backend)

    def __init__(
        self, feature_dims: Sequence[Sequence[int]], options: Options | None = None
    ) -> None:
        super().__init__(feature_dims, options)
        self.num_networks = len(feature_dims)
        self.bank: MemoryBank | None = None
        self.sampler: ContrastSampler | None = None
        self._drawn: tuple[Batch, ContrastIndices] | None = None

    @property
    def uses_banks(self) -> bool:
        """Whether the method needs banks with its options."""
        return True

    def sampling(self) -> dict[str, Any]:
        """Arguments of :class:`ContrastSampler` other than the number of negatives and the seed."""
        return {}

    def prepare(self, setup: Setup) -> None:
        if not self.uses_banks:
            return
        o = self.options
        labels, projection_dim, seed = setup.labels, setup.projection_dim, setup.seed
        if projection_dim is None:
            raise ValueError("projection_dim: expected a width for a method with banks, got None")
        self.bank = MemoryBank(
            self.num_networks,
            len(labels),
            projection_dim,
            momentum=o.bank_momentum,
            dtype=DTYPES[o.bank_dtype],
            device="pinned" if o.bank_storage == "pinned" else labels.device,
            seed=seed,
        )
        self.sampler = ContrastSampler(labels, o.num_negatives, seed=seed, **self.sampling())

    def check_device(self, device: torch.device) -> None:
        backends.resolve(self.options.backend, device.type, banks=self.uses_banks)
        if self.options.bank_storage == "pinned" and device.type != "cuda":
            raise ValueError(
                f"bank_storage: expected 'device' on a {device.type} device, got 'pinned', which "
                "only GPUs can read"
            )

    def after_step(self, outputs: PeerOutputs, batch: Batch) -> None:
        if self.bank is not None:
            last = torch.stack([stages[-1].detach() for stages in outputs.embeddings])
            self.bank.update(batch.index, last, backend=self.options.backend)

    def contrast(self, batch: Batch) -> tuple[Tensor, ContrastIndices]:
        """The banks [M, n, D] and the numbers of their entries that a batch is contrasted with.

        The numbers are drawn once for a batch, because the bilevel step needs the same ones again.

        Raises:
            RuntimeError: :meth:`prepare` was not called before.
        """
        bank, sampler = prepared(self.bank), prepared(self.sampler)
        if self._drawn is None or self._drawn[0] is not batch:
            drawn = sampler.sample(batch.index, batch.step, backend=self.options.backend)
            self._drawn = (batch, drawn)
        return bank.banks, self._drawn[1]
