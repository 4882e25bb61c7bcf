"""The choice between forward mode and plain double backward for the products of a call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from mclfast.bilevel.known_ops import INEXACT, RecordNorms, reads, unknown_operations

_LOG = logging.getLogger(__name__)
#: What was said already; a run says it once, not at each of its bilevel steps.
_said: set[str] = set()


class ForwardChoice:
    """Whether forward mode is right for the networks, found in the first graph of each.

    Args:
        hyperparams: tensors to differentiate by, which a network may read.
        parts: number of networks.
    """

    def __init__(self, hyperparams: Sequence[Tensor], parts: int) -> None:
        self._hyperparams = hyperparams
        self._unseen = set(range(parts))
        self._norms: RecordNorms | None = None
        #: Whether a network depends on hyperparameters, and not on its parameters alone.
        self.reads_hyperparams = False
        #: Whether the products may go through the networks in forward mode.
        self.allowed = True

    def watching(self, part: int) -> AbstractContextManager[Any]:
        """A context for a run of a network with a graph, before :meth:`look`."""
        self._norms = RecordNorms() if part in self._unseen else None
        return self._norms or nullcontext()

    def look(self, part: int, outputs: Sequence[Tensor]) -> None:
        """Looks at the graph of a network's outputs, the first time that there is one."""
        if self._norms is None:
            return
        self._unseen.discard(part)
        # Whatever keeps nodes is dropped here, or the graph would live on.
        norms, self._norms = self._norms.nodes, None
        unknown = unknown_operations(outputs, norms)
        if unknown:
            self.refuse(
                f"no forward-mode rule is known to be right for {', '.join(sorted(unknown))}"
            )
        if reads(outputs, self._hyperparams):
            self.reads_hyperparams = True
            self.refuse("the network reads hyperparameters")
        for operation in sorted(unknown & INEXACT.keys()):
            _say(
                "bilevel gradient equal to that of unrolled steps, which is not exact: %s",
                INEXACT[operation],
            )

    def refuse(self, reason: str) -> None:
        """Takes the plain product from now on, and says why."""
        self.allowed = False
        _say(
            "bilevel gradient by plain double backward, which takes more time and memory than "
            "forward mode: %s",
            reason,
        )


def _say(text: str, reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        _LOG.warning(text, reason)
