"""A short run of the sweep over random calls of every loss."""

from sweeps.fuzz_losses import sweep


def test_random_calls_equal_the_plain_form():
    counts = sweep(2_000, 0)
    assert counts["tried"] == 2_000
    assert counts["lost"] == 0
