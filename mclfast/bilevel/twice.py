"""Operations that cannot be differentiated twice, found by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mclfast.bilevel.known_ops import RecordNorms, unknown_operations
from mclfast.bilevel.nest import Nest
from mclfast.bilevel.step import grad, inner_product

#: What PyTorch says where a second derivative is missing, with the name of the operation.
_MISSING = re.compile(
    r"derivative for '?(?:aten::)?(?P<name>\w+?)(?:_backward)?'? is not implemented"
    r"|no autograd formula registered for (?P<custom>[\w:.]+)"
    r"|(?P<once>once_differentiable|does not (?:currently )?support double backward"
    r"|don't support automatic differentiation)"
)


class MissingDerivative(NotImplementedError):
    """An operation cannot be differentiated twice.

    Args:
        operation: its name, or the error of PyTorch where that has none.
    """

    def __init__(self, operation: str) -> None:
        super().__init__(
            "inner, outer, network: expected operations that can be differentiated twice, got "
            f"{operation}"
        )
        self.operation = operation


@contextmanager
def named_refusals() -> Iterator[None]:
    """Errors of PyTorch on a missing second derivative become one that names the operation.

    Raises:
        MissingDerivative: an operation in the block cannot be differentiated twice.
    """
    try:
        yield
    except RuntimeError as error:
        found = _MISSING.search(str(error))
        if found is None:
            raise
        name = found["name"] or found["custom"] or f"one ({str(error).splitlines()[0]})"
        raise MissingDerivative(name) from error


def check_twice(network: Callable[[Any], Any], params: Mapping[str, Tensor]) -> None:
    """Raises MissingDerivative where an operation of a network cannot be differentiated twice.

    A graph of operations that are known is not differentiated.

    Args:
        network: function from parameters to any nest of tensors.
        params: parameters that the network is differentiated by.
    """
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), named_refusals():
        leaves = {name: p.detach().requires_grad_(p.requires_grad) for name, p in params.items()}
        trained = [leaf for leaf in leaves.values() if leaf.requires_grad]
        with RecordNorms() as norms:
            outputs = Nest(network(leaves)).tensors
        if not trained or not unknown_operations(outputs, norms.nodes):
            return
        # Squares, because a second derivative of a sum may be none of the operations'.
        first = grad([inner_product(outputs, outputs)], trained, create_graph=True)
        grad([inner_product(first, first)], trained)
