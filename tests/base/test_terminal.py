"""What reaches a terminal: names of files and folders with their control characters spelt out."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from helpers.images import encoded
from mclfast._base.terminal import printable, printable_streams
from mclfast.cli.main import main


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("plain text, ünïcode, 猫 and 🙂\n", "plain text, ünïcode, 猫 and 🙂\n"),
        ("a\x1b[31mred", r"a\x1b[31mred"),
        ("a\x9b31m\x07\x08\x7f\0\r", r"a\x9b31m\x07\x08\x7f\x00\r"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("txt\u202egpj", r"txt\u202egpj"),
        ("line\u2028end\u200b", r"line\u2028end\u200b"),
        (b"\xff\xfe.jpg".decode(errors="surrogateescape"), r"\udcff\udcfe.jpg"),
    ],
)
def test_printable(text, want):
    assert printable(text) == want
    assert printable(want) == want


def test_streams_are_wrapped_and_put_back(monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(KeyError), printable_streams():
        print("\x1b[1m\r")
        print("\x1b[1m\r", file=sys.stderr, flush=True)
        assert sys.stderr.isatty() is False
        raise KeyError
    assert (sys.stdout, sys.stderr) == (out, err)
    assert out.getvalue() == "\\x1b[1m\\r\n"
    # A bar goes back to the start of its line.
    assert err.getvalue() == "\\x1b[1m\r\n"


RED = "x\x1b[31mRED"


@pytest.mark.parametrize("what", ["class folder", "file", "option", "recipe", "run folder"])
def test_no_escape_sequence_reaches_the_terminal(what, tmp_path, capsys):
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.jpg").write_bytes(encoded(1))
    arguments = ["train", "--data", "folder", "--data-root", str(tmp_path), "--device", "cpu"]
    arguments += ["--run-dir", str(tmp_path / "run"), "--no-progress"]
    status = 2
    match what:
        case "class folder":
            (tmp_path / "test" / RED).mkdir()
        case "file":
            (tmp_path / "train" / "a" / f"{RED}.png").write_bytes(b"none")
        case "option":
            arguments += ["--cohort", RED]
        case "recipe":
            arguments += ["--recipe", f"{RED}.yaml"]
        case "run folder":
            sizes = "--cohort resnet8 --method baseline --epochs 1 --batch-size 2 --image-size 8"
            arguments += [*sizes.split(), "--images-per-class", "1"]
            arguments += ["--run-dir", str(Path(tmp_path, RED))]
            status = 0
    assert main(arguments) == status
    found = capsys.readouterr()
    text = found.out + found.err
    assert "\x1b" not in text and r"x\x1b[31mRED" in text.replace("\\\\", "\\")
    assert len(found.err.splitlines()) == status // 2
