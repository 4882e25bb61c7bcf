"""Long sweeps, which the test suite runs with a small count."""
