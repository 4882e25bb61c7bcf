"""The levels of the package: which part may import which, read from the source of every file."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEVELS = """_version kernels | _base | models data ops recipe | losses bilevel cohort env | banks |
    methods | config | execution | plan | train | compare | bench | cli | __main__"""
LEVEL = {part: i for i, level in enumerate(LEVELS.split("|")) for part in level.split()}

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the checkout")


def modules() -> dict[str, Path]:
    """Every file by the name of its module."""
    found = {}
    for folder in ("mclfast", "bench", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if folder == "mclfast" else ("mclfast", *parts))
            # Last comes the folder: of it and the file that stands in for it, the folder counts.
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file names, in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in known else str(node.module) for name in names}
    return found & known.keys()


def arrows() -> dict[str, set[str]]:
    known = modules()
    found = {name: imports(path, known) - {name} for name, path in known.items()}
    # It only hands out names, and no module imports it.
    del found["mclfast"]
    return found


def test_a_part_imports_from_earlier_levels_only():
    wrong = []
    for name, targets in arrows().items():
        for target in targets:
            here, there = (f"{module}.".split(".")[1] for module in (name, target))
            if here != there and (not there or LEVEL[there] >= LEVEL[here]):
                wrong.append(f"{name} -> {target}")
    assert not wrong, "imports against the levels: " + ", ".join(sorted(wrong))


def test_no_two_files_import_each_other_in_a_circle():
    try:
        TopologicalSorter(arrows()).prepare()
    except CycleError as error:
        pytest.fail("circle of imports: " + " -> ".join(reversed(error.args[1])), pytrace=False)


def test_few_modules_lie_loose():
    loose = sorted(path.name for path in (ROOT / "mclfast").glob("*.py"))
    assert len(loose) <= 8, loose
