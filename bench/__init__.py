"""Measurement of the losses and of training steps: ``mclfast bench`` and the files ``bench_*``."""
