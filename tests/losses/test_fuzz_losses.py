"""A short run of the sweep over random calls of every loss."""

from sweeps.fuzz_losses import sweep


def test_random_calls_equal_the_plain_form():
    counts = sweep(1500, 0)
    assert counts["tried"] == 1500
    assert counts["lost"] == 0
