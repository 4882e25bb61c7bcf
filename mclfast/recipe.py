"""Recipes: YAML files with the settings of published runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mclfast._checks import unknown_name


def folder() -> Path:
    """Where the recipes lie: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def available() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def load(name: str) -> dict[str, Any]:
    """Flat settings of a recipe, by its name or by the path of a YAML file.

    Raises:
        ValueError: unknown name, or a file that is not a YAML mapping.
        FileNotFoundError: a path that does not exist.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if name not in available():
            raise unknown_name("recipe", name, available())
        path = folder() / f"{name}.yaml"
    return read_yaml(path, "recipe")


def read_yaml(path: Path, argument: str) -> dict[str, Any]:
    """The YAML mapping of a file.

    Raises:
        ValueError: the file is not a YAML mapping; the text begins with ``argument``.
        FileNotFoundError: there is none.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"{argument}: expected a file {path}, found none")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{argument}: expected YAML in {path}, got {problem}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(
            f"{argument}: expected `field: value` lines in {path}, got {type(values).__name__}"
        )
    return values
