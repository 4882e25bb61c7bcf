"""Import of packages that are not always there, or are there and broken."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingOptionalError(ImportError):
    """A feature needs an optional package that cannot be imported."""


def optional_import(name: str, *, extra: str) -> ModuleType:
    """Imports an optional package when a feature first needs it.

    Args:
        name: module to import, dots allowed.
        extra: the mclfast extra that installs it.

    Returns:
        The imported module.

    Raises:
        MissingOptionalError: the import failed; the text holds the pip line and the first error.
    """
    try:
        return importlib.import_module(name)
    # RuntimeError: a torchvision built for another torch. OSError: a missing shared library.
    except (ImportError, RuntimeError, OSError) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]
        state = "is not installed" if absent else "is installed but fails to import"
        raise MissingOptionalError(
            f"{name} {state}; try: pip install 'mclfast[{extra}]' "
            f"(first error: {type(error).__name__}: {error})",
            name=name,
        ) from error
