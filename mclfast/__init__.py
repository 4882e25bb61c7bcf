"""Fast, memory-lean losses and training for online knowledge distillation between peer networks."""

from typing import TYPE_CHECKING, Any

from mclfast._version import __version__
from mclfast.aggregation import LogitAggregator
from mclfast.cohort import Cohort, PeerOutputs
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
    InfoNCELoss,
    LayerwiseMCLLoss,
    MCLLoss,
    SimilarityKLLoss,
    SupConLoss,
)
from mclfast.matching import LayerMatcher
from mclfast.meta import BilevelResult, bilevel_gradient
from mclfast.models.staged import staged
from mclfast.types import MCLObjective, MCLRows, MCLTerms

if TYPE_CHECKING:
    from mclfast.train import Trainer

__all__ = [
    "BilevelResult",
    "Cohort",
    "InfoNCELoss",
    "LayerMatcher",
    "LayerwiseMCLLoss",
    "LogitAggregator",
    "MCLLoss",
    "MCLObjective",
    "MCLRows",
    "MCLTerms",
    "PeerOutputs",
    "ProjectionHead",
    "SimilarityKLLoss",
    "SupConLoss",
    "Trainer",
    "__version__",
    "bilevel_gradient",
    "info_nce_loss",
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
