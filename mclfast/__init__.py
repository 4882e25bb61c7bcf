"""Fast, memory-lean losses and training for online knowledge distillation between peer networks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mclfast._base.tensors import unit_norm
from mclfast._version import __version__
from mclfast.losses.banks import (
    bank_mcl_loss,
    bank_mcl_objective,
    bank_mcl_rows,
    bank_mcl_terms,
    bank_nce_log_normalizer,
    bank_nce_loss,
    layerwise_bank_mcl_loss,
    layerwise_bank_mcl_objective,
    layerwise_bank_mcl_terms,
)
from mclfast.losses.in_batch import (
    info_nce_loss,
    layerwise_mcl_loss,
    layerwise_mcl_objective,
    layerwise_mcl_terms,
    mcl_loss,
    mcl_objective,
    mcl_rows,
    mcl_terms,
    similarity_kl_loss,
    supcon_loss,
)
from mclfast.losses.inputs import check_inputs
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
from mclfast.ops.backends import use_backend

# A program that imports a loss should not load networks, data sets and the training loop. A name in
# the table below is therefore imported when it is first used; type checkers, which do not run this
# file, read these imports in its place.
if TYPE_CHECKING:
    from mclfast.banks.memory_bank import MemoryBank
    from mclfast.banks.sampler import ContrastIndices, ContrastSampler
    from mclfast.bilevel.gradient import BilevelResult, bilevel_gradient
    from mclfast.cohort.cohort import Cohort
    from mclfast.cohort.heads import LayerMatcher, LogitAggregator, ProjectionHead
    from mclfast.cohort.outputs import Batch, PeerOutputs
    from mclfast.execution.step import TrainStep
    from mclfast.models.staged import staged
    from mclfast.train.trainer import Trainer

_MODULE_OF = {
    "Batch": "mclfast.cohort.outputs",
    "BilevelResult": "mclfast.bilevel.gradient",
    "Cohort": "mclfast.cohort.cohort",
    "ContrastIndices": "mclfast.banks.sampler",
    "ContrastSampler": "mclfast.banks.sampler",
    "LayerMatcher": "mclfast.cohort.heads",
    "LogitAggregator": "mclfast.cohort.heads",
    "MemoryBank": "mclfast.banks.memory_bank",
    "PeerOutputs": "mclfast.cohort.outputs",
    "ProjectionHead": "mclfast.cohort.heads",
    "TrainStep": "mclfast.execution.step",
    "Trainer": "mclfast.train.trainer",
    "bilevel_gradient": "mclfast.bilevel.gradient",
    "staged": "mclfast.models.staged",
}

# Packages that are attributes of this one without an import of their own: ``mclfast.models``.
_PACKAGES = frozenset(
    "banks bench bilevel cohort compare config data env execution kernels methods models plan "
    "recipe train".split()
)

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
    "bank_mcl_objective",
    "bank_mcl_rows",
    "bank_mcl_terms",
    "bank_nce_log_normalizer",
    "bank_nce_loss",
    "bilevel_gradient",
    "check_inputs",
    "info_nce_loss",
    "layerwise_bank_mcl_loss",
    "layerwise_bank_mcl_objective",
    "layerwise_bank_mcl_terms",
    "layerwise_mcl_loss",
    "layerwise_mcl_objective",
    "layerwise_mcl_terms",
    "mcl_loss",
    "mcl_objective",
    "mcl_rows",
    "mcl_terms",
    "similarity_kl_loss",
    "staged",
    "supcon_loss",
    "unit_norm",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"mclfast.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mclfast' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    # The next use finds it without a call.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_PACKAGES})
