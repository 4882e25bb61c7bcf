"""Fast, memory-lean losses and training for online knowledge distillation between peer networks."""

from typing import TYPE_CHECKING, Any

from mclfast._version import __version__
from mclfast.aggregation import LogitAggregator
from mclfast.bank_functional import (
    bank_mcl_loss,
    bank_mcl_rows,
    bank_nce_log_normalizer,
    bank_nce_loss,
    layerwise_bank_mcl_loss,
)
from mclfast.cohort import Cohort, PeerOutputs
from mclfast.contrast_sampler import ContrastIndices, ContrastSampler
from mclfast.functional import (
    info_nce_loss,
    layerwise_mcl_loss,
    mcl_loss,
    mcl_rows,
    similarity_kl_loss,
    supcon_loss,
)
from mclfast.heads import ProjectionHead
from mclfast.losses import (
    BankMCLLoss,
    BankNCELoss,
    InfoNCELoss,
    LayerwiseBankMCLLoss,
    LayerwiseMCLLoss,
    MCLLoss,
    SimilarityKLLoss,
    SupConLoss,
)
from mclfast.matching import LayerMatcher
from mclfast.memory_bank import MemoryBank
from mclfast.meta import BilevelResult, bilevel_gradient
from mclfast.models.staged import staged
from mclfast.types import BankMCLRows, Batch, MCLObjective, MCLRows, MCLTerms

if TYPE_CHECKING:
    from mclfast.train import Trainer

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
]


def __getattr__(name: str) -> Any:
    # The trainer brings data sets and plotting: a program that imports a loss does not need them.
    if name == "Trainer":
        from mclfast.train import Trainer

        return Trainer
    raise AttributeError(f"module 'mclfast' has no attribute {name!r}")
