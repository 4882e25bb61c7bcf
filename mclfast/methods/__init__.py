"""Training methods by name; one small file each says the method's loss."""

from __future__ import annotations

from mclfast._checks import unknown_name
from mclfast.methods.base import Method
from mclfast.methods.baseline import Baseline
from mclfast.methods.cl_ilr import CLILR
from mclfast.methods.dml import DML
from mclfast.methods.kdcl import KDCL
from mclfast.methods.lmcl import LayerwiseMCL
from mclfast.methods.mcl import MCL
from mclfast.methods.okddip import OKDDip
from mclfast.methods.one import ONE

__all__ = [
    "CLILR",
    "DML",
    "KDCL",
    "MCL",
    "ONE",
    "Baseline",
    "LayerwiseMCL",
    "Method",
    "OKDDip",
    "available",
    "method_class",
]

_METHODS: dict[str, type[Method]] = {
    "baseline": Baseline,
    "cl-ilr": CLILR,
    "dml": DML,
    "kdcl": KDCL,
    "lmcl": LayerwiseMCL,
    "mcl": MCL,
    "okddip": OKDDip,
    "one": ONE,
}


def available() -> list[str]:
    """Names of the methods."""
    return sorted(_METHODS)


def method_class(name: str) -> type[Method]:
    """The class of a method; ValueError for an unknown name."""
    if name not in _METHODS:
        raise unknown_name("method", name, _METHODS)
    return _METHODS[name]
