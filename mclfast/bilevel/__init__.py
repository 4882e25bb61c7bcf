"""Exact gradients of an outer loss through steps of training."""
