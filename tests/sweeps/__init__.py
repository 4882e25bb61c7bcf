"""Long searches for faults, which the suite runs with small counts."""
