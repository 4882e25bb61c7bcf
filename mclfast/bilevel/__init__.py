"""Bilevel optimisation: exact gradients of an outer loss through a few training steps."""
