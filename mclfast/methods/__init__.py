"""Training methods by name; each has a file of its own with its loss and its options."""

from __future__ import annotations

from mclfast._base.checks import unknown_name
from mclfast.methods.afd import AFD
from mclfast.methods.base import Method
from mclfast.methods.baseline import Baseline
from mclfast.methods.cl_ilr import CLILR
from mclfast.methods.dml import DML
from mclfast.methods.ffl import FFL
from mclfast.methods.kdcl import KDCL
from mclfast.methods.lmcl import LayerwiseMCL
from mclfast.methods.mcl import MCL
from mclfast.methods.mcl_okd import MCLOKD
from mclfast.methods.moco_mcl import MomentumMCL
from mclfast.methods.okddip import OKDDip
from mclfast.methods.one import ONE
from mclfast.methods.pcl import PCL

__all__ = [
    "AFD",
    "CLILR",
    "DML",
    "FFL",
    "KDCL",
    "MCL",
    "MCLOKD",
    "ONE",
    "PCL",
    "Baseline",
    "LayerwiseMCL",
    "Method",
    "MomentumMCL",
    "OKDDip",
    "available",
    "method_class",
]

_METHODS: dict[str, type[Method]] = {
    "afd": AFD,
    "baseline": Baseline,
    "cl-ilr": CLILR,
    "dml": DML,
    "ffl": FFL,
    "kdcl": KDCL,
    "lmcl": LayerwiseMCL,
    "mcl": MCL,
    "mcl-okd": MCLOKD,
    "moco-mcl": MomentumMCL,
    "okddip": OKDDip,
    "one": ONE,
    "pcl": PCL,
}


def available() -> list[str]:
    """Names of the methods."""
    return sorted(_METHODS)


def method_class(name: str) -> type[Method]:
    """The class of a method; ValueError for an unknown name."""
    # A settings file may hold a list here, which no mapping can be asked for.
    if not isinstance(name, str) or name not in _METHODS:
        raise unknown_name("method", name, _METHODS)
    return _METHODS[name]
