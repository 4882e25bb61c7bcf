"""YAML files of settings: doubled keys, aliases, nesting and size are refused before they cost."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from sweeps.yaml_files import sweep

from mclfast import recipe
from mclfast._base import yaml_text
from mclfast._base.files import read_yaml
from mclfast.cli.main import main
from mclfast.config import TrainConfig


def aliases() -> str:
    """A recipe of a few hundred bytes that stands for 10**8 names."""
    lines = [f"x0: &x0 [{','.join(['resnet8'] * 10)}]"]
    lines += [f"x{i}: &x{i} [{','.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 8)]
    return "\n".join([*lines, f"cohort: [{','.join(['*x7'] * 10)}]"])


REFUSED = [
    ("lr: 0.1\nepochs: 3\nlr: 0.5\n", "'lr' twice, in lines 1 and 3"),
    ("'lr': 0.1\n\"lr\": 0.5\n", "'lr' twice, in lines 1 and 2"),
    ("methods: {mcl: {lr: 1, lr: 2}}\n", "'lr' twice, in lines 1 and 1"),
    ("- [{a: 1, a: 2}]\n", "'a' twice"),
    ("a: &x [1]\nb: *x\n", r"the alias \*x in line 2"),
    ("<<: {lr: 0.5}\nlr: 0.1\n", "the merge key << in line 1"),
    (aliases(), r"the alias \*x0 in line 2"),
    ("a: " + "[" * 50_000, "more than 16 levels of nesting in line 1"),
    ("- " * 5000 + "a", "more than 16 levels"),
    ("a: " + "{b: " * 17 + "1" + "}" * 17, "more than 16 levels"),
    ("cohort: [" + "resnet8," * 100_000 + "]", "bytes where 262,144 are the most"),
    ("method: !!python/object/apply:os.mkdir [x]", "could not determine a constructor"),
    ("a: [1", "while parsing a flow sequence"),
    ("a: 2020-99-99", "month must be in 1..12"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(text, message, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    tracemalloc.start()
    try:
        with pytest.raises(
            ValueError, match=f"^recipe: expected YAML in .*, got .*{message}"
        ) as error:
            read_yaml(file, "recipe")
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_what_is_read():
    deepest = "{b: " * 15 + "1" + "}" * 15
    assert yaml_text.parse(f"a: {deepest}")
    assert yaml_text.parse("a: {x: 1}\nb: {x: 2}\nc: ['&x', '*x']\n") == {
        "a": {"x": 1},
        "b": {"x": 2},
        "c": ["&x", "*x"],
    }
    assert yaml_text.parse("") is None


def test_every_recipe_is_read():
    for file in recipe.folder().glob("*.yaml"):
        assert read_yaml(file, "recipe")


def test_a_bomb_on_the_command_line_is_one_line(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(aliases())
    run = tmp_path / "run"
    assert main(["train", "--recipe", str(tmp_path / "r.yaml"), "--run-dir", str(run)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not run.exists()


def test_a_cohort_of_too_many_networks():
    assert len(TrainConfig(cohort=("resnet8",) * 256).cohort) == 256
    message = "^cohort: expected at most 256 networks, got 100000$"
    with pytest.raises(ValueError, match=message):
        TrainConfig(cohort=("resnet8",) * 100_000)
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_values({"cohort": ",".join(["resnet8"] * 100_000)})


def test_a_file_that_is_no_text(tmp_path: Path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="^recipe: expected YAML in .*, got 'utf-8' codec"):
        read_yaml(tmp_path / "r.yaml", "recipe")


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 9 + "x" * 3000 + "]" * 9, "0x" + "f" * 9000])
@pytest.mark.parametrize("name", ["lr", "seed", "amp", "augment", "cohort", "image_size", "zzz"])
def test_errors_about_long_values_are_short(name, value, tmp_path):
    (tmp_path / "r.yaml").write_text(f"{name}: {value}\n")
    with pytest.raises(ValueError) as error:
        TrainConfig.from_values(read_yaml(tmp_path / "r.yaml", "recipe"))
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)


def test_a_short_sweep_loses_nothing():
    found = sweep(300, seed=0)
    assert found["tried"] == 300 and found["lost"] == 0
    assert found["survived"] > 50 and found["refused"] > 50


def test_an_error_of_the_reader_that_quotes_the_text_is_short(tmp_path):
    (tmp_path / "r.yaml").write_text(f"!{'9' * 5000}!x: off")
    with pytest.raises(ValueError, match="^recipe: expected YAML in .*undefined tag") as error:
        read_yaml(tmp_path / "r.yaml", "recipe")
    assert len(str(error.value)) < 1000
