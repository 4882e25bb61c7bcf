"""DML: deep mutual learning, every network learns from the predictions of every other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mclfast._base.settings import setting
from mclfast.cohort.outputs import Batch, PeerOutputs, Setup
from mclfast.losses.distillation import mutual_kd_loss
from mclfast.methods._options import DistillOptions
from mclfast.methods.base import Method, check_peers
from mclfast.methods.baseline import sum_cross_entropy


class DML(Method):
    """``sum_a [CE(logits_a) + 1 / (M - 1) sum_{b != a} KD(logits_a <- logits_b)]``, M >= 2.

    Teachers are constants, and all networks take one step together, as in the comparisons of
    MCL-OKD (arXiv 2006.04093), whose temperature 2 is the default. The original updates its
    independent networks one after another within a step, at temperature 1.

    Source: arXiv 1706.00384.
    """

    uses_maps = False

    @dataclass
    class Options(DistillOptions):
        distill_temperature: float = setting(2.0, "softens the logits in logit distillation")

    def prepare(self, setup: Setup) -> None:
        check_peers(setup, "dml", 2)

    @property
    def repeatable(self) -> bool:
        return True

    def loss(self, outputs: PeerOutputs, batch: Batch) -> dict[str, Tensor]:
        logits = outputs.final_logits
        ce = sum_cross_entropy(outputs, batch.labels)
        distill = mutual_kd_loss(logits, logits, self.options.distill_temperature)
        return {"loss": ce + distill, "ce": ce, "distill": distill}
