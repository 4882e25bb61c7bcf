"""Training methods by name; one small file each says the method's loss."""

from __future__ import annotations

from mclfast._checks import unknown_name
from mclfast.methods.base import Method
from mclfast.methods.baseline import Baseline
from mclfast.methods.lmcl import LayerwiseMCL
from mclfast.methods.mcl import MCL
from mclfast.methods.moco_mcl import MomentumMCL

__all__ = [
    "MCL", "Baseline", "LayerwiseMCL", "Method", "MomentumMCL", "available", "method_class",
]  # fmt: skip

_METHODS: dict[str, type[Method]] = {
    "baseline": Baseline,
    "lmcl": LayerwiseMCL,
    "mcl": MCL,
    "moco-mcl": MomentumMCL,
}


def available() -> list[str]:
    """Names of the methods."""
    return sorted(_METHODS)


def method_class(name: str) -> type[Method]:
    """The class of a method; ValueError for an unknown name."""
    if name not in _METHODS:
        raise unknown_name("method", name, _METHODS)
    return _METHODS[name]
