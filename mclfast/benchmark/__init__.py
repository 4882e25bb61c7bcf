"""Measurement of the losses against the published pair loop: ``mclfast bench`` and ``bench/``."""
