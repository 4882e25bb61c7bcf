"""Options that several methods share: logit distillation, its ramp-up, the terms' weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mclfast._base.checks import check_integer, check_not_negative, check_temperature
from mclfast._base.settings import setting
from mclfast.losses.results import MCLTerms
from mclfast.methods.base import Method


@dataclass
class DistillOptions(Method.Options):
    """Options of a method that distils logits."""

    distill_temperature: float = setting(3.0, "softens the logits in logit distillation")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature("distill_temperature", self.distill_temperature)


@dataclass
class RampedDistillOptions(DistillOptions):
    """Options of a method that distils logits with a weight that rises over the first epochs."""

    rampup_epochs: int = setting(
        80, "epochs over which the weight of distillation rises to one; 0 for none"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("rampup_epochs", self.rampup_epochs, 0)

    def weight(self, epoch: int) -> float:
        """Weight of distillation in an epoch, counted from 0."""
        return sigmoid_rampup(epoch, self.rampup_epochs)


def sigmoid_rampup(epoch: int, length: int) -> float:
    """``exp(-5 (1 - epoch / length)^2)`` of an epoch counted from 0, and 1 from ``length`` on.

    Epochs before 0 count as 0, where the weight is exp(-5) = 0.0067; a length of 0 gives 1
    throughout.

    Source: temporal ensembling, arXiv 1610.02242; used by ONE, OKDDip, FFL and PCL.
    """
    epoch = max(epoch, 0)
    return 1.0 if epoch >= length else math.exp(-5 * (1 - epoch / length) ** 2)


_WEIGHT_FIELDS = tuple(f"{term}_weight" for term in MCLTerms._fields)


def check_term_weights(options: Any) -> None:
    """Raises ValueError, naming the field, if a term's weight is negative or not finite."""
    for name in _WEIGHT_FIELDS:
        check_not_negative(name, getattr(options, name))


def term_weights(options: Any) -> tuple[float, float, float, float]:
    """The weights of vcl, soft_vcl, icl, soft_icl, in this order."""
    vcl, soft_vcl, icl, soft_icl = (getattr(options, name) for name in _WEIGHT_FIELDS)
    return vcl, soft_vcl, icl, soft_icl
