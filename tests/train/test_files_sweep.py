"""A few files of each fault; ``make nightly`` tries many."""

from __future__ import annotations

import pytest
from sweeps import bit_flips, hostile_files

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_flipped_bit_is_refused_or_changes_nothing():
    found = bit_flips.sweep(20, seed=4)
    assert found["tried"] == 20 and found["lost"] == 0
    assert found["refused"] + found["survived"] == 20 and found["refused"] >= 15
    assert found["recovered"] >= 1


def test_a_hostile_file_is_refused_or_does_no_harm():
    found = hostile_files.sweep(40, seed=4)
    assert found["tried"] == 40 and found["lost"] == 0
    assert found["refused"] + found["survived"] == 40 and found["refused"] >= 20


def test_the_sweeps_count_what_gets_through(monkeypatch):
    """A reader that takes anything is told from one that checks."""
    monkeypatch.setattr(bit_flips.checkpoint, "damage_of", lambda path: None)
    monkeypatch.setattr(bit_flips, "FILES", {"checkpoint.pt": 1})
    assert bit_flips.sweep(10, seed=4)["lost"] >= 5
    monkeypatch.setattr(hostile_files, "_READERS", {"checkpoint.pt": load_with_code})
    monkeypatch.setattr(hostile_files, "_lie", hostile_files._code)
    assert hostile_files.sweep(10, seed=4)["lost"] >= 3


def load_with_code(run):
    hostile_files.torch.load(run / "checkpoint.pt", weights_only=False)
    return "survived"
