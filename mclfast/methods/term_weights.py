"""Weights of the four contrastive terms among the options of a method: ``vcl_weight`` and so on.

Each method has its own published defaults, so it names the fields itself.
"""

from __future__ import annotations

from typing import Any

from mclfast._checks import check_not_negative
from mclfast.types import MCLTerms

_FIELDS = tuple(f"{term}_weight" for term in MCLTerms._fields)


def check_term_weights(options: Any) -> None:
    """Raises ValueError, naming the field, where a weight is negative or not finite."""
    for name in _FIELDS:
        check_not_negative(name, getattr(options, name))


def term_weights(options: Any) -> tuple[float, float, float, float]:
    """Weights of vcl, soft_vcl, icl, soft_icl."""
    vcl, soft_vcl, icl, soft_icl = (getattr(options, name) for name in _FIELDS)
    return vcl, soft_vcl, icl, soft_icl
