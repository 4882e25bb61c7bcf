"""Fast, memory-lean losses and training for online knowledge distillation between peer networks."""

from typing import TYPE_CHECKING, Any

from mclfast._base.tensors import unit_norm
from mclfast._version import __version__
from mclfast.banks.memory_bank import MemoryBank
from mclfast.banks.sampler import ContrastIndices, ContrastSampler
from mclfast.bilevel.gradient import BilevelResult, bilevel_gradient
from mclfast.cohort.cohort import Cohort
from mclfast.cohort.heads import LayerMatcher, LogitAggregator, ProjectionHead
from mclfast.cohort.outputs import Batch, PeerOutputs
from mclfast.losses.banks import (
    bank_mcl_loss,
    bank_mcl_rows,
    bank_nce_log_normalizer,
    bank_nce_loss,
    layerwise_bank_mcl_loss,
)
from mclfast.losses.in_batch import (
    info_nce_loss,
    layerwise_mcl_loss,
    mcl_loss,
    mcl_rows,
    similarity_kl_loss,
    supcon_loss,
)
from mclfast.losses.modules import (
    BankMCLLoss,
    BankNCELoss,
    InfoNCELoss,
    LayerwiseBankMCLLoss,
    LayerwiseMCLLoss,
    MCLLoss,
    SimilarityKLLoss,
    SupConLoss,
)
from mclfast.losses.results import BankMCLRows, MCLObjective, MCLRows, MCLTerms
from mclfast.models.staged import staged

if TYPE_CHECKING:
    from mclfast.execution.step import TrainStep
    from mclfast.train.trainer import Trainer

__all__ = [
    "BankMCLLoss",
    "BankMCLRows",
    "BankNCELoss",
    "Batch",
    "BilevelResult",
    "Cohort",
    "ContrastIndices",
    "ContrastSampler",
    "InfoNCELoss",
    "LayerMatcher",
    "LayerwiseBankMCLLoss",
    "LayerwiseMCLLoss",
    "LogitAggregator",
    "MCLLoss",
    "MCLObjective",
    "MCLRows",
    "MCLTerms",
    "MemoryBank",
    "PeerOutputs",
    "ProjectionHead",
    "SimilarityKLLoss",
    "SupConLoss",
    "TrainStep",
    "Trainer",
    "__version__",
    "bank_mcl_loss",
    "bank_mcl_rows",
    "bank_nce_log_normalizer",
    "bank_nce_loss",
    "bilevel_gradient",
    "info_nce_loss",
    "layerwise_bank_mcl_loss",
    "layerwise_mcl_loss",
    "mcl_loss",
    "mcl_rows",
    "similarity_kl_loss",
    "staged",
    "supcon_loss",
    "unit_norm",
]


def __getattr__(name: str) -> Any:
    # The trainer brings data sets and plotting: a program that imports a loss does not need them.
    if name == "Trainer":
        from mclfast.train.trainer import Trainer

        return Trainer
    if name == "TrainStep":
        from mclfast.execution.step import TrainStep

        return TrainStep
    raise AttributeError(f"module 'mclfast' has no attribute {name!r}")
