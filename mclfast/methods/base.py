"""What a training method is: a function of the peers' outputs, with modules of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mclfast._settings import coerce_fields
from mclfast.cohort import PeerOutputs
from mclfast.types import Batch


class Method(nn.Module):
    """Turns the outputs of a cohort into a loss; it never sees the networks.

    A subclass sets the class attributes, takes its ``Options`` and implements :meth:`loss`. A
    method with hyperparameters learned by the bilevel step implements the three ``meta`` methods
    too; the trainer calls them every ``bilevel_every`` steps.

    Args:
        feature_dims: width of the pooled feature of every stage, networks of stages.
        options: the method's own settings, the defaults if None.
    """

    #: Whether the networks carry auxiliary heads at their intermediate stages.
    auxiliary_heads: ClassVar[bool] = False
    #: Whether the cohort carries projection heads (``PeerOutputs.embeddings``).
    projections: ClassVar[bool] = False

    @dataclass
    class Options:
        """Settings of the method; each becomes a command-line option and a recipe field.

        Those of a method derive from these, so that their types are checked.
        """

        def __post_init__(self) -> None:
            coerce_fields(self)

    def __init__(self, feature_dims: Sequence[Sequence[int]], options: Any = None) -> None:
        super().__init__()
        self.options: Any = self.Options() if options is None else options
        if not isinstance(self.options, self.Options):
            raise TypeError(
                f"options: expected {self.Options.__qualname__}, "
                f"got {type(options).__qualname__}"
            )

    def prepare(self, labels: Tensor, projection_dim: int | None, seed: int) -> None:
        """Builds what depends on the data set; the trainer calls it once, before a run starts.

        Args:
            labels: [n] int64, of the training set, on the device of the run.
            projection_dim: width of the embeddings, None where the cohort has none.
            seed: of the run.
        """

    def loss(self, outputs: PeerOutputs, batch: Batch) -> dict[str, Tensor]:
        """The loss of one training step.

        Returns:
            "loss", the 0-dim total to differentiate, and its parts by name for logging.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss")

    def after_step(self, outputs: PeerOutputs, batch: Batch) -> None:
        """Called after the optimiser's step, with the outputs that the loss got."""

    def check_device(self, device: torch.device) -> None:
        """Raises, before a run starts, where the method cannot work on a device."""

    def meta_parameters(self) -> list[nn.Parameter]:
        """Parameters that only the bilevel step trains; none unless overridden."""
        return []

    def inner_loss(self, outputs: PeerOutputs, batch: Batch) -> Tensor:
        """The objective whose SGD steps the bilevel gradient runs through."""
        raise NotImplementedError(f"{type(self).__name__} has meta parameters but no inner_loss")

    def outer_loss(self, outputs: PeerOutputs, batch: Batch) -> Tensor:
        """The objective that the meta parameters should lower."""
        raise NotImplementedError(f"{type(self).__name__} has meta parameters but no outer_loss")
