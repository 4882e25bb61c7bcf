"""The sweeps of whole runs, with small counts."""

from __future__ import annotations

import sys

import pytest
from sweeps import kills, soak

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


def test_killed_runs_end_with_the_same_weights():
    seed = 2
    print(f"seed {seed}")
    counts = kills.sweep(3, seed)
    assert counts == {"tried": 3, "survived": 3, "refused": 0, "lost": 0}


def test_memory_and_open_files_stay_flat():
    seed = 0
    print(f"seed {seed}")
    counts = soak.sweep(80, seed)
    assert (counts["tried"], counts["survived"], counts["lost"]) == (80, 80, 0), counts
