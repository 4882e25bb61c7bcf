"""What the methods that distil between logits share: options, and the number of networks."""

from __future__ import annotations

from dataclasses import dataclass

from mclfast._checks import check_integer, check_temperature
from mclfast._settings import setting
from mclfast.methods.base import Method
from mclfast.schedule import sigmoid_rampup
from mclfast.types import Setup


@dataclass
class DistillOptions(Method.Options):
    """Options of a method that distils logits."""

    distill_temperature: float = setting(3.0, "softens the logits in logit distillation")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature("distill_temperature", self.distill_temperature)


@dataclass
class RampedDistillOptions(DistillOptions):
    """Options of a method whose distillation starts gently."""

    rampup_epochs: int = setting(
        80, "epochs over which the weight of distillation rises to one; 0 for none"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("rampup_epochs", self.rampup_epochs, 0)

    def weight(self, epoch: int) -> float:
        """Weight of distillation in an epoch, counted from 0."""
        return sigmoid_rampup(epoch, self.rampup_epochs)


def check_peers(setup: Setup, method: str, least: int, *, exactly: bool = False) -> None:
    """Raises ValueError where a cohort has fewer networks than a method needs, or too many."""
    count = len(setup.example.logits)
    if count < least or (exactly and count > least):
        how = "exactly" if exactly else "at least"
        raise ValueError(
            f"cohort: expected {how} {least} networks for method {method}, got {count}"
        )
