"""What works with torch and numpy alone, what loads with a loss, and what the rest answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mclfast

ROOT = Path(__file__).resolve().parents[2]
#: Packages of the extra ``train``, by the names of their modules.
TRAIN = ["PIL", "matplotlib", "safetensors", "sklearn", "tqdm", "yaml"]
# A finder that raised would not do: torch asks for some of them, and takes None for an answer.
WITHOUT = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {TRAIN}:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
LIBRARY = """
import torch
from mclfast import Cohort, MCLLoss, MemoryBank, config, methods, models, supcon_loss

x = torch.nn.functional.normalize(torch.randn(8, 4), dim=1).requires_grad_()
supcon_loss(x, torch.arange(8) % 2).backward()
MCLLoss()(torch.stack([x, x]), torch.arange(8) % 2)
MemoryBank(2, 9, 4)
cohort = Cohort([models.create("resnet8", num_classes=3, in_channels=1) for _ in range(2)])
method = methods.method_class("lmcl")(cohort.feature_dims)
cohort(torch.zeros(2, 1, 16, 16))
config.TrainConfig()
# Whatever these need is imported where it is used.
import mclfast.train.trainer, mclfast.compare.report, mclfast.plan.planner, mclfast.bench.draw
"""
COMMANDS = """
import contextlib, io, json
from mclfast.cli.main import main

answers = []
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(command)
        except SystemExit as leave:
            status = int(leave.code or 0)
    answers.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""


def python(code: str, *arguments: str, cwd: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env={**os.environ, "MCLFAST_TRACEBACK": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def answers(commands: list[list[str]], cwd: Path) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of commands where the packages are absent."""
    return json.loads(python(WITHOUT + COMMANDS, json.dumps(commands), cwd=cwd))


@pytest.mark.parametrize("name", ["supcon_loss", "unit_norm", "MCLLoss"])
def test_a_loss_loads_no_other_part(name, tmp_path):
    code = f"from mclfast import {name}; import json, sys; print(json.dumps(list(sys.modules)))"
    loaded = {m for m in json.loads(python(code, cwd=tmp_path)) if m.startswith("mclfast.")}
    parts = {m.split(".")[1] for m in loaded}
    assert parts <= {"_base", "_version", "kernels", "losses", "ops", "_C"}
    # Of the kernels the names of the row families alone, which need no Triton.
    assert {m for m in loaded if "kernels" in m} <= {"mclfast.kernels", "mclfast.kernels.families"}
    assert len(loaded) <= 25, sorted(loaded)


def test_every_public_name_is_there(tmp_path):
    assert set(mclfast.__all__) <= set(dir(mclfast))
    assert all(getattr(mclfast, name) is not None for name in mclfast.__all__)
    assert mclfast._MODULE_OF.keys() <= set(mclfast.__all__)
    assert list(mclfast._MODULE_OF) == sorted(mclfast._MODULE_OF)
    with pytest.raises(AttributeError, match="'mclfast' has no attribute 'no_such_name'"):
        mclfast.no_such_name  # noqa: B018
    python("import mclfast; mclfast.models.available(); mclfast.Cohort", cwd=tmp_path)


def test_library_without_the_packages_of_training(tmp_path):
    python(WITHOUT + LIBRARY, cwd=tmp_path)


@pytest.fixture
def files(tmp_path) -> Path:
    """A folder with a run, an exported backbone and images: as little of each as is looked for."""
    for name, content in (
        ("run/config.yaml", "method: mcl\n"),
        ("peer0/backbone.json", "{}"),
        *((f"images/{split}/{label}/a.png", "") for split in ("train", "val") for label in "ab"),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


def test_commands_that_need_no_more_than_torch_and_numpy(tmp_path):
    commands = [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["env"],
        ["bench", "--preset", "smoke", "--op", "info_nce", "--provider", "reference"],
    ]
    for command, (status, out, err) in zip(commands, answers(commands, tmp_path), strict=True):
        assert (status, bool(out)) == (0, True), (command, err)


def test_other_commands_name_the_extra_in_one_line(files):
    replot = ROOT / "bench" / "results" / "cpu-amd-epyc-2-threads" / "sweeps.json"
    commands = {
        "train --no-progress": "yaml",
        "train --recipe mcl-cifar100": "yaml",
        "plan --device-memory 1GiB --device cpu": "tqdm",
        "compare --methods baseline": "yaml",
        "eval peer0": "safetensors",
        "transfer peer0 --published": "safetensors",
        "transfer peer0 --data digits": "safetensors",
        "export run": "yaml",
        f"bench --replot {replot} --out .": "matplotlib",
        "bench --loader --data imagefolder --data-root images": "PIL",
    }
    found = answers([command.split() for command in commands], files)
    for (command, package), (status, _, err) in zip(commands.items(), found, strict=True):
        name = command.partition(" ")[0]
        assert (status, err) == (
            2,
            f"mclfast {name}: error: the package {package} is not installed; "
            'pip install "mclfast[train]"\n',
        )


def test_a_run_is_not_removed_where_the_new_one_could_not_be_written(tmp_path):
    for name in ("config.yaml", "checkpoint.pt"):
        (tmp_path / name).write_text("kept")
    command = f"train --data digits --overwrite --run-dir {tmp_path}"
    ((status, _, text),) = answers([command.split()], tmp_path)
    assert status == 2 and text.endswith('pip install "mclfast[train]"\n')
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "config.yaml"]
