"""Triton kernels, installed as ``mclfast.kernels``.

Importing this package does not import triton; its modules do.
"""
