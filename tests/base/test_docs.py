"""What the documents say of the code, as far as it can be run or compared."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mclfast import methods, recipe

ROOT = Path(__file__).resolve().parents[2]
METHODS = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def table() -> dict[str, list[str]]:
    """Cells of the table of methods, by the method's name."""
    rows = re.findall(r"^\| `([\w-]+)` \| (.*) \|$", METHODS, re.MULTILINE)
    return {name: rest.split(" | ") for name, rest in rows}


def test_the_table_has_every_method_and_every_recipe():
    rows = table()
    assert sorted(rows) == methods.available()
    named = {name: re.findall(r"`([\w-]+)`", cells[-1]) for name, cells in rows.items()}
    assert sorted(sum(named.values(), [])) == recipe.available()
    for method, recipes in named.items():
        assert {recipe.load(name)["method"] for name in recipes} == {method}


@pytest.mark.usefixtures("one_thread")
def test_a_method_of_your_own(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", METHODS, re.DOTALL)
    (tmp_path / "method_of_the_document.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    result = importlib.import_module("method_of_the_document").result
    assert len(result.peers) == 3
    assert {"train_loss", "train_ce", "train_agree"} <= result.history[0].keys()
    assert str(result.peers) in capsys.readouterr().out


@pytest.mark.parametrize(
    "path", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(path):
    """Files, and headings within the documents."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, heading = target.partition("#")
        found = (ROOT / path).parent / file if file else ROOT / path
        assert found.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
            assert heading in slugs, target


RELIABILITY = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_promise_names_tests_that_exist():
    rows = re.findall(
        r"^\| [A-Z`].*\| ([^|]*tests/[^|]*|sweep [^|]*) \|$", RELIABILITY, re.MULTILINE
    )
    assert len(rows) > 20
    for cell in rows:
        folder = ROOT
        for name in re.findall(r"`([^`]+)`", cell):
            place = ROOT / name if "/" in name else folder / name
            if not place.exists():
                place = ROOT / "tests" / "sweeps" / f"{name}.py"
            assert place.exists(), name
            folder = place.parent


def test_the_figures_are_those_that_were_recorded():
    script = ROOT / "scripts" / "reliability.py"
    figures = ROOT / "bench" / "results" / "cpu-amd-epyc-2-threads" / "reliability" / "sweeps.json"
    run = subprocess.run([sys.executable, str(script), str(figures), "--check"])
    assert run.returncode == 0
    for name, found in json.loads(figures.read_text()).items():
        assert found["counts"].get("lost", 0) == 0, name
