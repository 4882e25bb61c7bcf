"""Reads pickles of plain Python values and NumPy arrays only; all other pickles are refused."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np


def loads(data: bytes) -> Any:
    """Like ``pickle.loads(data, encoding="bytes")``, limited to plain values and NumPy arrays.

    Args:
        data: content of a pickle file; text written by Python 2 comes back as bytes.

    Returns:
        The object that was pickled.

    Raises:
        pickle.UnpicklingError: the pickle names anything that is not needed to rebuild an array.
        Exception: whatever ``pickle`` raises on damaged input.
    """
    return _RestrictedUnpickler(io.BytesIO(data), encoding="bytes").load()


def _encode(text: str, encoding: str) -> bytes:
    """Encodes latin1, in which Python 3 writes bytes into old pickles; refuses other codecs."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"refused the codec {encoding!r}")
    return text.encode("latin1")


# Taken from an array, because NumPy 1 and 2 keep this function in different modules.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"refused {module_name}.{global_name}") from None
