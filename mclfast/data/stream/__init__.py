"""Data sets that are decoded from files batch by batch."""
