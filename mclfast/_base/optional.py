"""Import of optional packages, which may be missing or installed and broken."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingOptionalError(ImportError):
    """A feature needs an optional package that cannot be imported."""


def optional_import(name: str, *, extra: str) -> ModuleType:
    """Imports an optional package when a feature first needs it.

    Args:
        name: module to import, dots allowed.
        extra: name of the mclfast extra that installs the package.

    Returns:
        The imported module.

    Raises:
        MissingOptionalError: the import failed; the text is one line that ends with what to run.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    # A torchvision built for another torch raises RuntimeError, a missing shared library OSError.
    except (ImportError, RuntimeError, OSError) as error:
        state = f"is installed but fails to import ({_in_one_line(error)})"
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            state = "is not installed"
        raise MissingOptionalError(
            f'the package {package} {state}; pip install "mclfast[{extra}]"', name=name
        ) from error


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
