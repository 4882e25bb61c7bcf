"""Recipes: YAML files with the settings of published runs, and one with their results."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from mclfast._base.checks import unknown_name
from mclfast._base.files import read_yaml

# A file in the folder of the recipes that is no recipe.
_FIGURES = "published.yaml"


def folder() -> Path:
    """The folder of the recipes: inside an installed package, or next to it in a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def available() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(p.stem for p in folder().glob("*.yaml") if p.name != _FIGURES)


def load(name: str) -> dict[str, Any]:
    """Flat settings of a recipe, by its name or by the path of a YAML file.

    Raises:
        ValueError: the name is unknown, or the file is not a YAML mapping.
        FileNotFoundError: the file does not exist.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if name not in available():
            raise unknown_name("recipe", name, available())
        path = folder() / f"{name}.yaml"
    return read_yaml(path, "recipe")


@cache
def published() -> dict[str, Any]:
    """Content of ``published.yaml``: sources, figures of networks alone, and tables of cohorts."""
    return read_yaml(folder() / _FIGURES, "published")
