"""Implementations of the losses that are measured side by side."""
