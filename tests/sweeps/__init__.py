"""Long sweeps of faults: the suite runs a few of each, ``make nightly`` many."""

from __future__ import annotations

from collections import Counter


def tally(found: Counter[str], outcome: str, case: str) -> None:
    """Counts a case; an outcome that is neither "survived" nor "refused" is lost, and printed."""
    if outcome not in ("survived", "refused"):
        print(f"lost: {case}: {outcome[:300]}")
        outcome = "lost"
    found["tried"] += 1
    found[outcome] += 1
