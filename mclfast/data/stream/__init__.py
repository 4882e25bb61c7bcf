"""Data sets that stay in files and are decoded batch by batch by worker processes."""
