"""The ordinary runner of the peers: forward before the loss, and what its backward leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from mclfast.cohort.cohort import Cohort
from mclfast.cohort.outputs import PeerOutputs
from mclfast.execution.batch_parts import forward_in_parts
from mclfast.methods import Method


class PeerRunner:
    """The ordinary way: one graph through all peers and the loss.

    Args:
        cohort: the peers.
        method: sets the number of parts that a batch is run in, see
            :mod:`mclfast.execution.batch_parts`.
        autocast: gives the context of a forward run. Open around :meth:`forward`, and closed before
            :meth:`backward`.
    """

    def __init__(
        self, cohort: Cohort, method: Method, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.cohort = cohort
        self.method = method
        self.parts = method.batch_parts()
        self.autocast = autocast

    def forward(self, images: Tensor | Sequence[Tensor]) -> PeerOutputs:
        """Outputs to compute the loss from, for images [B, C, H, W] or a view for each peer."""
        return forward_in_parts(self.cohort, images, self.parts)

    def backward(self, outputs: PeerOutputs) -> None:
        """Called after the backward of the loss: brings its gradient to all parameters.

        Args:
            outputs: the outputs that :meth:`forward` gave.
        """
