"""The package as installed: imports, environment report, backends, build decisions, wheel."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from mclfast import env
from mclfast._base.optional import MissingOptionalError, optional_import
from mclfast.ops import backends

ROOT = Path(__file__).resolve().parents[2]
HEAVY = "torchvision timm triton sklearn matplotlib yaml tqdm PIL kornia datasets torchmetrics"
in_checkout = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the checkout")


def run(*command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs Python elsewhere than in the checkout, so that it finds the installed package."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


def run_ok(*command: str, cwd: Path, **variables: str) -> str:
    result = run(*command, cwd=cwd, **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def fresh_backends():
    """Forgets the cached answers before and after a test."""
    backends.probe_again()
    yield
    backends.probe_again()


def test_import_does_not_load_heavy_packages(tmp_path):
    code = (
        "import json, sys, torch; before = set(sys.modules); import mclfast;"
        f"print(json.dumps([m for m in {HEAVY.split()} if m in set(sys.modules) - before]))"
    )
    assert json.loads(run_ok("-c", code, cwd=tmp_path)) == []


def test_import_survives_a_broken_torchvision(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator nms does not exist')")
    code = (
        "import mclfast; from mclfast._base.optional import optional_import\n"
        "try: optional_import('torchvision', extra='vision')\n"
        "except ImportError as error: print(error)"
    )
    text = run_ok("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert text == (
        "the package torchvision is installed but fails to import (RuntimeError: operator nms "
        'does not exist); pip install "mclfast[vision]"\n'
    )


def test_optional_import_of_a_missing_package():
    assert optional_import("json", extra="none") is json
    with pytest.raises(MissingOptionalError, match=r"such_package is not installed; .*extra-x"):
        optional_import("no_such_package.part", extra="extra-x")


def test_kernels_are_a_subpackage_without_triton(tmp_path):
    code = (
        "import sys, mclfast.kernels as k;"
        "print(k.__spec__.parent, list(k.__path__)[0], 'triton' in sys.modules)"
    )
    parent, folder, has_triton = run_ok("-W", "error", "-c", code, cwd=tmp_path).split()
    assert parent == "mclfast.kernels"
    assert Path(folder).name == "kernels"
    assert has_triton == "False"


@in_checkout
def test_kernels_in_a_checkout_that_is_not_installed(tmp_path):
    for name in ("mclfast", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "kernels" / "first.py").write_text("from .second import x\n")
    (tmp_path / "kernels" / "second.py").write_text("x = 3\n")
    code = "from mclfast.kernels import first; print(first.x, first.__name__)"
    text = run_ok("-W", "error", "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert text.split() == ["3", "mclfast.kernels.first"]


def test_env_command(tmp_path):
    text = run_ok("-m", "mclfast", "env", cwd=tmp_path)
    for expected in ("mclfast", "torch", "extension", "backends", "reference", "plain PyTorch"):
        assert expected in text
    assert torch.__version__ in text
    assert str(Path(env.__file__).parent) in text


def test_env_console_script(tmp_path):
    script = Path(sys.executable).parent / "mclfast"
    if not script.exists():
        pytest.skip("mclfast is not installed in this environment")
    result = subprocess.run([script, "env"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert torch.__version__ in result.stdout


def test_env_report_is_json_and_aligned():
    report = json.loads(json.dumps(env.report_dict()))
    reference = report["backends"]["reference"]
    assert reference == {"available": True, "reason": "plain PyTorch, any device"}
    assert report["packages"]["pillow"][0].isdigit()
    rows = [line for line in env.report().splitlines() if line.startswith("  ")]
    assert all(row[19] == " " and row[20] != " " for row in rows)


def test_git_hash_outside_of_a_checkout(tmp_path):
    assert env.git_hash(tmp_path) is None
    assert env.git_hash(tmp_path / "absent" / "file") is None


def test_git_hash_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert env.git_hash(tmp_path) is None


def test_git_hash_marks_changes(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("needs git")

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True)

    file = tmp_path / "a.txt"
    file.write_text("1")
    git("init", "-q")
    git("add", "a.txt")
    git("commit", "-q", "--no-verify", "-m", "one")
    clean = env.git_hash(file)
    assert clean is not None and len(clean) == 12
    file.write_text("2")
    assert env.git_hash(tmp_path) == f"{clean}-dirty"


def test_extension_that_does_not_load_is_a_reason(monkeypatch, fresh_backends):
    def refuse(name, *arguments):
        raise ImportError("libc10.so: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", refuse)
    assert backends.extension() is None
    assert backends.build_info() is None
    report = backends.backend_report()
    assert report["reference"].available
    assert not report["cpu"].available
    assert "libc10.so: cannot open" in report["cpu"].reason
    assert "triton cannot be imported" in report["triton"].reason
    assert "MCLFAST_BUILD_EXT=1" in env.report()


def test_extension_of_another_torch_is_refused(monkeypatch, fresh_backends):
    class Other:
        @staticmethod
        def build_info():
            return {"torch": "1.13.0"}

    monkeypatch.setattr(importlib, "import_module", lambda name: Other)
    assert backends.extension() is None
    assert "compiled for torch 1.13.0" in backends.extension_reason()


def test_extension_build_info():
    info = backends.build_info()
    if info is None:
        pytest.skip(backends.extension_reason())
    assert info["cxx_standard"] >= 201703
    assert info["threads"] == torch.get_num_threads()
    assert torch.__version__.startswith(".".join(info["torch"].split(".")[:2]))


def test_resolve():
    assert backends.resolve("reference", "cpu") == "reference"
    assert backends.resolve("auto", "a device of the future") == "reference"
    with pytest.raises(ValueError, match="backend: expected one of auto, .*reference.*got 'fast'"):
        backends.resolve("fast", "cpu")


def test_resolve_says_why_a_backend_is_not_available(monkeypatch, fresh_backends):
    missing = backends.BackendStatus(False, "the reason")
    monkeypatch.setitem(backends.PROBES, "cpu", lambda: missing)
    with pytest.raises(RuntimeError, match="'cpu' is not available: the reason.*'reference'"):
        backends.resolve("cpu", "cpu")
    assert backends.resolve("auto", "cpu") == "reference"


def test_resolve_takes_the_best_backend_of_the_device(monkeypatch, fresh_backends):
    ready = backends.BackendStatus(True, "ready")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("cpu", "triton"):
        monkeypatch.setitem(backends.PROBES, name, lambda: ready)
    assert backends.resolve("auto", "cpu") == "cpu"
    assert backends.resolve("auto", "cuda") == "triton"
    with pytest.raises(ValueError, match="expected one for cuda tensors, got 'cpu', which takes"):
        backends.resolve("cpu", "cuda")
    with pytest.raises(ValueError, match="expected one for cpu tensors, got 'triton'"):
        backends.resolve("triton", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.resolve("triton", "cpu") == "triton"


def test_auto_takes_no_kernels_without_float64(monkeypatch):
    kernels = {False: "triton", True: "cuda"}
    monkeypatch.setattr(backends, "resolve", lambda backend, device, banks: kernels[banks])
    narrow, wide = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    for banks, name in kernels.items():
        assert backends.resolve_for("auto", narrow, narrow, banks=banks) == name
        assert backends.resolve_for("auto", narrow, wide, banks=banks) == "reference"
        assert backends.resolve_for(name, wide, narrow, banks=banks) == name


@in_checkout
@pytest.mark.parametrize(
    ("value", "code", "text"),
    [("0", 0, "extension: no, MCLFAST_BUILD_EXT=0"), ("yes", 1, "must be 0, 1 or auto, got 'yes'")],
)
def test_setup_decision(value, code, text):
    result = run("setup.py", "--name", cwd=ROOT, MCLFAST_BUILD_EXT=value)
    assert result.returncode == code
    assert text in result.stderr
    assert "Traceback" not in result.stderr
    if code == 0:
        assert result.stdout.strip() == "mclfast"


@in_checkout
@pytest.mark.parametrize(("mode", "code"), [("auto", 0), ("1", 1)])
def test_setup_without_torch(tmp_path, mode, code):
    (tmp_path / "torch.py").write_text("raise OSError('libfoo.so is missing')")
    result = run("setup.py", "--name", cwd=ROOT, MCLFAST_BUILD_EXT=mode, PYTHONPATH=str(tmp_path))
    assert result.returncode == code
    assert "torch cannot be imported here (OSError: libfoo.so is missing)" in result.stderr
    assert "Traceback" not in result.stderr


@in_checkout
def test_setup_without_a_compiler():
    result = run("setup.py", "--name", cwd=ROOT, MCLFAST_BUILD_EXT="auto", CXX="no-such-compiler")
    assert result.returncode == 0
    assert "no C++ compiler found" in result.stderr


@pytest.fixture
def sources(tmp_path) -> Path:
    """A copy of what a wheel is built from: building leaves files behind."""
    copy = tmp_path / "sources"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "results")
    for name in ("mclfast", "kernels", "bench", "recipes", "csrc", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def build_wheel(sources: Path, **variables: str) -> Path:
    target = sources.parent / "dist"
    options = ["-q", "--no-build-isolation", "--no-deps", "-w", str(target)]
    run_ok("-m", "pip", "wheel", *options, ".", cwd=sources, **variables)
    (wheel,) = target.glob("*.whl")
    return wheel


@in_checkout
@pytest.mark.slow
def test_pure_wheel(sources):
    (sources / "recipes" / "probe.yaml").write_text("a: 1\n")
    (sources / "bench" / "results").mkdir()
    (sources / "bench" / "results" / "probe.json").write_text("{}")
    wheel = build_wheel(sources, MCLFAST_BUILD_EXT="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"mclfast/recipes/{path.name}" for path in (sources / "recipes").glob("*.yaml")}
    files = {"mclfast/py.typed", "mclfast/kernels/__init__.py", "mclfast/bench/providers/banks.py"}
    assert recipes | files <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"mclfast"}
    assert not [name for name in names if "results/" in name or "/test" in name]
    data = {name for name in names if name.startswith("mclfast/") and not name.endswith(".py")}
    assert data == recipes | {"mclfast/py.typed"}


@in_checkout
@pytest.mark.slow
def test_wheel_when_the_extension_does_not_compile(sources):
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    (sources / "csrc" / "bindings.cpp").write_text("#error broken\n")
    wheel = build_wheel(sources, MCLFAST_BUILD_EXT="auto")
    assert not any("_C" in name for name in zipfile.ZipFile(wheel).namelist())


@in_checkout
@pytest.mark.slow
def test_sdist_holds_what_a_build_needs(sources):
    run_ok("setup.py", "-q", "sdist", cwd=sources, MCLFAST_BUILD_EXT="0")
    (archive,) = (sources / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, sources / "unpacked")
    (root,) = (sources / "unpacked").iterdir()
    wanted = [p.relative_to(sources) for p in (sources / "csrc").rglob("*") if p.is_file()]
    wanted += [p.relative_to(sources) for p in (sources / "recipes").glob("*.yaml")]
    wanted += [p.relative_to(sources) for p in (sources / "tests" / "data").rglob("*.npz")]
    wanted += [Path("kernels/__init__.py"), Path("mclfast/py.typed"), Path("LICENSE")]
    wanted += [Path("bench/__init__.py"), Path("tests/conftest.py")]
    assert [path for path in wanted if not (root / path).exists()] == []
