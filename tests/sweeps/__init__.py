"""Long sweeps of faults: the suite runs a few of each, ``make nightly`` many."""
