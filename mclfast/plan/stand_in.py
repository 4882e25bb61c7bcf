"""A step to rehearse with that holds nothing large: unwritten weights, labels of few images.

Weights are real tensors that nobody has written to: the system gives them no memory before that.
Banks and tables are real too, for a set of few images; what grows with the number of images is
scaled to the true one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mclfast._base.random import rng_restored
from mclfast.config import TrainConfig
from mclfast.execution.parts import make_parts
from mclfast.execution.step import TrainStep
from mclfast.plan.sizes_of_data import DataFacts


def stand_in_step(config: TrainConfig, known: DataFacts) -> TrainStep:
    """The step of a config on the CPU, whatever the device of the run; its weights mean nothing.

    Raises:
        ValueError: a config that no step could be built from.
    """
    config = dataclasses.replace(
        config,
        device="cpu",
        memory="ordinary",
        offload="none",
        # Only a GPU has graphs and streams, and nothing is run.
        cuda_graphs=False,
        compile_peers=False,
        peers_parallel="auto" if config.peers_parallel == "streams" else config.peers_parallel,
        options=_for_cpu(config.options),
    )
    with rng_restored():
        with Unwritten():
            cohort, method = make_parts(config, known.num_classes, known.image_shape[0])
        labels = few_labels(known.num_classes, config.batch_size)
        return TrainStep(cohort, method, config, labels=labels, image_shape=known.image_shape)


def few_labels(num_classes: int, batch_size: int) -> Tensor:
    """Labels [n] of enough images of every class to train on; n is a prime, see scaled_bytes."""
    count = max(4 * num_classes, 2 * batch_size, 1000)
    while any(count % factor == 0 for factor in range(2, math.isqrt(count) + 1)):
        count += 1
    return torch.arange(count) % num_classes


class Unwritten(TorchDispatchMode):
    """Within it, nothing is written into tensors by operations that draw or fill."""

    _SKIPPED = {"aten::uniform_", "aten::normal_", "aten::fill_", "aten::zero_"}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func._schema.name in self._SKIPPED:
            return args[0]
        return func(*args, **(kwargs or {}))


def _for_cpu(options: Any) -> Any:
    """Options of a method without what only a GPU has; none of it changes the size of a tensor."""
    portable = {}
    if getattr(options, "backend", "reference") != "reference":
        portable["backend"] = "auto"
    if getattr(options, "bank_storage", "device") != "device":
        portable["bank_storage"] = "device"
    return dataclasses.replace(options, **portable)


def scaled_bytes(tensors: Sequence[Tensor], stand_in: int, true: int) -> int:
    """Bytes of tensors, with a dimension as long as the stand-in set as long as the true one."""
    # No other dimension is that prime.
    return sum(t.nbytes * true // stand_in if stand_in in t.shape else t.nbytes for t in tensors)
