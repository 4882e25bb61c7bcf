"""MoCo-MCL: mutual contrastive learning without labels, between momentum-contrast networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mclfast._base.checks import check_keys, check_temperature
from mclfast._base.settings import setting
from mclfast._base.tensors import wide
from mclfast.banks.key_queue import KeyQueue, check_queue_size
from mclfast.cohort.outputs import Batch, PeerOutputs, Setup
from mclfast.data.augment_contrastive import CONTRASTIVE, ContrastiveAugmentation
from mclfast.losses.reference import distribution_kl_rows
from mclfast.losses.results import MCLTerms
from mclfast.methods._options import check_term_weights, term_weights
from mclfast.methods.base import Method

# Number of queries whose similarities to all keys are held at a time.
_ROWS = 64


class MomentumMCL(Method):
    """The self-supervised form of arXiv 2104.12565 (MoCo-MCL), for any number of networks.

    Each network embeds one view of an image (the query q_a); a moving average of its parameters
    embeds another view (the key k_a), which joins the queue Q_a after the step. With
    ``G_ab = q_a . [k_b, Q_b] / temperature`` over 1 + K columns, column 0 the positive:

    ``sum_a CE(G_aa) + sum_{a != b} KD(G_aa <- G_bb) + sum_{a != b} CE(G_ab) +
    sum_{a != b} KD(G_ab <- G_ba)``: the terms vcl, soft_vcl, icl and soft_icl, with constant
    teachers. One network alone is MoCo (arXiv 1911.05722).

    Batch norm takes its statistics from ``norm_parts`` parts of a batch, which is shuffled for the
    keys, as on the GPUs of the published runs. With one part, as in those runs on one GPU,
    shuffling has no effect. The published queue holds 65536 keys; the default is for small data.

    Labels are not used in training. In evaluation the classifiers hold the class means of training
    features; ``mclfast transfer --published`` trains a classifier on a finished network.
    """

    views = "query_key"
    teacher = True
    teacher_mode = "train"
    supervised = False
    projections = True
    uses_maps = False

    @dataclass
    class Options(Method.Options):
        temperature: float = setting(0.07, "divides the cosine similarities")
        kl_temperature: float = setting(3.0, "softens the similarity distributions compared")
        vcl_weight: float = setting(1.0, "weight of the term inside networks")
        soft_vcl_weight: float = setting(1.0, "weight of the KL between intra-network similarities")
        icl_weight: float = setting(1.0, "weight of the term between networks")
        soft_icl_weight: float = setting(1.0, "weight of the KL between inter-network similarities")
        queue_size: int = setting(3840, "keys kept of each network, a multiple of batch_size")
        key_momentum: float = setting(0.999, "share of the old parameters of the key networks")
        norm_parts: int = setting(4, "parts of a batch, each with batch-norm statistics of its own")
        head: Literal["linear", "mlp"] = setting(
            "linear", "projection heads: linear, or a layer more (mlp)"
        )
        augmentation: Literal["moco-v1", "moco-v2"] = setting(
            "moco-v1", "crops and colours as in MoCo; v2 blurs and shifts hues less"
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("temperature", "kl_temperature"):
                check_temperature(name, getattr(self, name))
            check_term_weights(self)
            for name in ("queue_size", "norm_parts"):
                check_keys(name, getattr(self, name))
            if not 0 <= self.key_momentum < 1:
                raise ValueError(
                    f"key_momentum: expected a value in [0, 1), got {self.key_momentum}"
                )

    def __init__(
        self, feature_dims: Sequence[Sequence[int]], options: Options | None = None
    ) -> None:
        super().__init__(feature_dims, options)
        self.num_networks = len(feature_dims)
        self.queue: KeyQueue | None = None

    @classmethod
    def projection_kind(cls, options: Any) -> Literal["mlp", "linear"]:
        head: Literal["mlp", "linear"] = options.head
        return head

    def augmentation(self) -> ContrastiveAugmentation:
        return CONTRASTIVE[self.options.augmentation]

    def batch_parts(self) -> int:
        parts: int = self.options.norm_parts
        return parts

    def teacher_decay(self, step: int) -> float:
        decay: float = self.options.key_momentum
        return decay

    def prepare(self, setup: Setup) -> None:
        o = self.options
        if setup.projection_dim is None:
            raise ValueError("projection_dim: expected a width for a method with keys, got None")
        check_queue_size(o.queue_size, setup.batch_size)
        if setup.batch_size % o.norm_parts:
            raise ValueError(
                f"norm_parts: expected a divisor of batch_size {setup.batch_size}, "
                f"got {o.norm_parts}"
            )
        self.queue = KeyQueue(
            self.num_networks, o.queue_size, setup.projection_dim, seed=setup.seed
        )

    def loss(self, outputs: PeerOutputs, batch: Batch) -> dict[str, Tensor]:
        o = self.options
        if self.queue is None or outputs.teacher is None:
            raise RuntimeError(
                "loss: expected prepare() to be called before and outputs of key networks, "
                "got a method or outputs without"
            )
        queries, keys = _stacked(outputs), _stacked(outputs.teacher)
        sums = momentum_mcl_sums(queries, keys, self.queue.keys, o.temperature, o.kl_temperature)
        terms = MCLTerms(*(sums / queries.shape[1]))
        return {"loss": terms.weighted_sum(*term_weights(o)), **terms._asdict()}

    def after_step(self, outputs: PeerOutputs, batch: Batch) -> None:
        assert self.queue is not None and outputs.teacher is not None
        self.queue.update(_stacked(outputs.teacher))


def _stacked(outputs: PeerOutputs) -> Tensor:
    """The embeddings of the networks themselves, [M, B, D]."""
    return torch.stack([stages[-1] for stages in outputs.embeddings])


def momentum_mcl_sums(
    queries: Tensor, keys: Tensor, queue: Tensor, temperature: float, kl_temperature: float
) -> Tensor:
    """The four terms of :class:`MomentumMCL`, summed over the batch.

    Nothing of size [B, 1 + K] is kept for the backward pass, which computes the similarities of 64
    queries at a time again. It then holds some 5 M^2 matrices [64, 1 + K]; at M = 2, B = 256,
    K = 65536 this is a third of the memory of keeping all similarities.

    Args:
        queries: embeddings of the networks [M, B, D], unit-norm.
        keys: embeddings of the key networks [M, B, D], unit-norm; they get no gradient.
        queue: older keys [M, K, D], unit-norm; they get no gradient.
        temperature: divisor of the similarities.
        kl_temperature: divisor of the logits in the KL terms.

    Returns:
        The sums of vcl, soft_vcl, icl and soft_icl, [4], in float32 or wider.
    """
    # Matrix products in half precision would lose what a temperature this low brings out.
    with torch.autocast(queries.device.type, enabled=False):
        queries = wide(queries)
        keys, queue = keys.detach().to(queries.dtype), queue.detach().to(queries.dtype)
        parts = [
            checkpoint(
                sums_of_rows,
                q,
                k,
                queue,
                temperature,
                kl_temperature,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for q, k in zip(queries.split(_ROWS, dim=1), keys.split(_ROWS, dim=1), strict=True)
        ]
        return torch.stack(parts).sum(0)


def sums_of_rows(
    queries: Tensor, keys: Tensor, queue: Tensor, temperature: float, kl_temperature: float
) -> Tensor:
    """:func:`momentum_mcl_sums` in one piece, with all similarities kept for the backward pass."""
    networks = range(len(queries))

    def logits(a: int, b: int) -> Tensor:
        positive = (queries[a] * keys[b]).sum(-1, keepdim=True)
        return torch.cat([positive, queries[a] @ queue[b].T], dim=1) / temperature

    def contrast(g: Tensor) -> Tensor:
        return (g.logsumexp(1) - g[:, 0]).sum()

    def distil(student: Tensor, teacher: Tensor) -> Tensor:
        return distribution_kl_rows(student, teacher, kl_temperature).sum()

    g = [[logits(a, b) for b in networks] for a in networks]
    pairs = [(a, b) for a in networks for b in networks if a != b]
    zero = queries.new_zeros(())
    terms = MCLTerms(
        vcl=sum((contrast(g[a][a]) for a in networks), start=zero),
        soft_vcl=sum((distil(g[a][a], g[b][b]) for a, b in pairs), start=zero),
        icl=sum((contrast(g[a][b]) for a, b in pairs), start=zero),
        soft_icl=sum((distil(g[a][b], g[b][a]) for a, b in pairs), start=zero),
    )
    return torch.stack(terms)
