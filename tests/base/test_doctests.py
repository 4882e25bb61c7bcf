"""The examples in the docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import mclfast

#: Result types and the version: nothing that one would call.
WITHOUT_EXAMPLE = {
    "BankMCLRows",
    "Batch",
    "BilevelResult",
    "ContrastIndices",
    "MCLObjective",
    "MCLRows",
    "MCLTerms",
    "PeerOutputs",
    "Trainer",
    "__version__",
}


def modules() -> list[str]:
    """All modules of the package but the compiled one and the kernels, which need Triton."""
    found = pkgutil.walk_packages(mclfast.__path__, "mclfast.")
    return [
        m.name
        for m in found
        if not m.name.startswith(("mclfast._C", "mclfast.kernels", "mclfast.__main__"))
    ]


def with_examples() -> list[str]:
    return [name for name in modules() if ">>> " in (inspect.getsource(load(name)))]


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize("name", with_examples())
def test_examples_of_a_module(name: str):
    result = doctest.testmod(load(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted and not result.failed


def test_every_public_function_and_module_has_an_example():
    public = {name: getattr(mclfast, name) for name in mclfast.__all__}
    assert {n for n, value in public.items() if ">>> " not in (value.__doc__ or "")} == (
        WITHOUT_EXAMPLE
    )
