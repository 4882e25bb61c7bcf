"""Outputs of networks in any nest: the tensors in it, and the same nest with other tensors."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from mclfast._base.checks import describe

_PLAIN = (str, bytes, int, float, complex, bool, type(None))


class Nest:
    """Outputs of a network; ``tensors`` are its tensors that can have a gradient.

    Args:
        outputs: tensors in tuples, lists, named tuples, mappings and dataclasses, one in another.

    Raises:
        TypeError: an object of another kind holds tensors, or a tensor is complex.
    """

    def __init__(self, outputs: Any) -> None:
        self._outputs = outputs
        self.tensors: list[Tensor] = []
        _mapped(outputs, self._collect)

    def _collect(self, tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            raise TypeError(f"network: expected outputs of real numbers, got {describe(tensor)}")
        if tensor.is_floating_point():
            self.tensors.append(tensor)
        return tensor

    def rebuilt(self, tensors: Sequence[Tensor]) -> Any:
        """The same nest with other tensors."""
        rest: Iterator[Tensor] = iter(tensors)
        return _mapped(self._outputs, lambda t: next(rest) if t.is_floating_point() else t)


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The nest with the results of a function in place of its tensors, in a fixed order."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if isinstance(leaf, Mapping):
            return _mapped_mapping(leaf, function)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            return _mapped_dataclass(leaf, function)
        if not isinstance(leaf, _PLAIN) and (name := _hidden_tensor(leaf)) is not None:
            raise TypeError(
                "network: expected outputs in tuples, lists, named tuples, mappings and "
                f"dataclasses, got a tensor in .{name} of a {type(leaf).__name__}"
            )
        return leaf

    return pytree.tree_map(of_leaf, value)


def _mapped_mapping(value: Mapping[Any, Any], function: Callable[[Tensor], Tensor]) -> Any:
    """A mapping of a kind of its own, which may show its items as attributes too."""
    result: Any = copy.copy(value)
    for key, item in value.items():
        result[key] = _mapped(item, function)
    return result


def _mapped_dataclass(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    result = copy.copy(value)
    for field in dataclasses.fields(value):
        # A field may be without a value yet, and the class may be frozen.
        if hasattr(value, field.name):
            new = _mapped(getattr(value, field.name), function)
            object.__setattr__(result, field.name, new)
    return result


def _hidden_tensor(value: Any) -> str | None:
    """Name of an attribute of an object of unknown kind that holds a tensor."""
    own = getattr(value, "__dict__", {})
    slots = [s for kind in type(value).__mro__ for s in getattr(kind, "__slots__", ())]
    for name in (*own, *(s for s in slots if isinstance(s, str))):
        leaves = pytree.tree_leaves(getattr(value, name, None))
        if any(isinstance(leaf, Tensor) for leaf in leaves):
            return str(name)
    return None
