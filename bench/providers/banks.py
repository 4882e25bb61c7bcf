"""Benchmark of the memory-bank losses: inputs, the right result, and the providers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mclfast.bench.problem import (
    DTYPES,
    SECOND,
    WEIGHTS,
    Case,
    Inputs,
    Keys,
    Loss,
    Provider,
    Unavailable,
    check_backend,
    step,
)
from mclfast.bench.published_forms import banks as published_bank
from mclfast.losses import reference_banks, weighting
from mclfast.losses.banks import (
    bank_nce_loss,
    layerwise_bank_mcl_objective,
    layerwise_bank_mcl_terms,
)

#: Temperatures of the published runs, by operation.
TEMPERATURE = {"bank_layerwise_mcl": 0.07, "bank_nce": 0.1}
KL_TEMPERATURE = 3.0
#: Published weights of vcl, soft_vcl, icl and soft_icl for ImageNet.
COEFFICIENTS = (0.01, 1.0, 0.01, 1.0)
#: Added to the denominators of noise-contrastive estimation.
EPS = 1e-7

#: Bytes of gathered rows that the result in float64 may keep at a time.
_TRUTH_BYTES = 2**30


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random unit-norm embeddings and bank rows, and the rows that each anchor is compared with.

    The embeddings of a sample in all networks, its own rows of the banks and the rows of its
    positives share a component, like embeddings of networks that learn one task. Negatives are
    drawn with replacement from all other rows.
    """
    device, dtype = torch.device(case.device), DTYPES[case.dtype]
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "device": device}
    own = 1 + case.positives
    order = torch.randperm(case.n, **options)
    pos_idx, rest = order[: case.b * own].view(case.b, own), order[case.b * own :]
    drawn = (case.k,) if case.shared_negatives else (case.b, case.k)
    neg_idx = rest[torch.randint(len(rest), drawn, **options)]

    rows = torch.cat([pos_idx, neg_idx.expand(case.b, -1)], dim=1)

    common = torch.randn(case.b, case.d, **options)

    def related(*shape: int) -> Tensor:
        return normalize(common + torch.randn(*shape, case.b, case.d, **options), dim=-1)

    banks = torch.empty(case.m, case.n, case.d, dtype=DTYPES[case.bank_dtype], device=device)
    for bank in banks:
        bank.copy_(normalize(torch.randn(case.n, case.d, **options), dim=-1))
    banks[:, pos_idx] = related(case.m, own).transpose(1, 2).to(banks.dtype)
    leaves = [related(case.nodes).to(dtype)]
    direction = torch.randn(leaves[0].shape, **options).to(dtype)
    weights = None
    if case.op == "bank_layerwise_mcl":
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weights = torch.rand(case.nodes, case.nodes, case.b, **options).to(wide)
        if case.mode == WEIGHTS:
            leaves.append(weights)
    return Inputs(
        tuple(x.requires_grad_() for x in leaves),
        tuple(a // case.l for a in range(case.nodes)),
        pos_idx[:, 0],
        weights,
        (direction,),
        Keys(banks, pos_idx, neg_idx, rows),
    )


def _keys(inputs: Inputs) -> Keys:
    assert inputs.keys is not None
    return inputs.keys


def _pair_weights(case: Case, inputs: Inputs, leaves: Sequence[Tensor]) -> Tensor:
    weights = leaves[1] if case.mode == WEIGHTS else inputs.pair_weights
    assert weights is not None
    return weights


def truth(case: Case, inputs: Inputs, rows: int | None = None) -> tuple[Tensor, ...]:
    """Value and derivatives that the measured call must give, from the reference in float64.

    The losses and their derivatives are means over anchors, and are added up over blocks of
    anchors. Only the normalising constants of noise-contrastive estimation are no such means; they
    get no gradient.

    Args:
        case: case to compute.
        inputs: inputs of the case.
        rows: number of anchors in a block; None for as many as fit into about 1 GiB.
    """
    exact = inputs.double()
    keys = _keys(inputs)
    if rows is None:
        rows = max(1, int(_TRUTH_BYTES / (case.m * case.nodes * case.keys * case.d * 8)))
    starts = range(0, case.b, rows)
    blocks = [keys.block(start, rows) for start in starts]
    loss = _mcl_block
    if case.op == "bank_nce":
        loss = functools.partial(_nce_block, log_normalizer=_log_normalizer(case, exact, blocks))
    total: tuple[Tensor, ...] | None = None
    for start, block in zip(starts, blocks, strict=True):
        part = step(case, exact, functools.partial(loss, case, exact, block, start))()
        total = part if total is None else tuple(x + y for x, y in zip(total, part, strict=True))
    assert total is not None
    return tuple(x.detach() for x in total)


def _mcl_block(
    case: Case, inputs: Inputs, keys: Keys, start: int, leaves: Sequence[Tensor]
) -> Tensor:
    count = len(keys.pos_idx)
    block = slice(start, start + count)
    found = reference_banks.bank_mcl_rows(
        leaves[0][:, block],
        inputs.networks,
        keys.banks,
        keys.pos_idx,
        keys.neg_idx.expand(count, -1),
        temperature=TEMPERATURE[case.op],
        kl_temperature=KL_TEMPERATURE,
    )
    weights = _pair_weights(case, inputs, leaves)[..., block]
    terms = weighting.layerwise_bank_mcl_terms(found, inputs.stages, weights)
    return terms.weighted_sum(*COEFFICIENTS) * (count / case.b)


def _log_normalizer(case: Case, inputs: Inputs, blocks: Sequence[Keys]) -> Tensor:
    """Logarithm of the batch's normalising constant, the weighted mean of those of the blocks."""
    found, start = [], 0
    for keys in blocks:
        count = len(keys.pos_idx)
        log_z = reference_banks.bank_nce_log_normalizer(
            inputs.leaves[0][:, start : start + count],
            keys.banks,
            keys.rows,
            temperature=TEMPERATURE[case.op],
        )
        found.append(log_z + math.log(count / case.b))
        start += count
    return torch.stack(found).logsumexp(0)


def _nce_block(
    case: Case,
    inputs: Inputs,
    keys: Keys,
    start: int,
    leaves: Sequence[Tensor],
    *,
    log_normalizer: Tensor,
) -> Tensor:
    count = len(keys.pos_idx)
    value = reference_banks.bank_nce_loss(
        leaves[0][:, start : start + count],
        keys.banks,
        keys.rows,
        log_normalizer,
        temperature=TEMPERATURE[case.op],
        eps=EPS,
    )
    return value * (count / case.b)


@functools.cache
def _compiled_pair() -> published_bank.PairFunction:
    compiled: published_bank.PairFunction = torch.compile(published_bank.pair_terms, dynamic=False)
    return compiled


@functools.cache
def _compiled_nce() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(published_bank.nce_term, dynamic=False)
    return compiled


def _published(case: Case, inputs: Inputs, compiled: bool) -> Loss:
    if case.bank_dtype != case.dtype:
        raise Unavailable("the published form keeps its banks in the dtype of the embeddings")
    if compiled and case.mode == SECOND:
        raise Unavailable("torch.compile does not support double backward")
    torch._dynamo.config.recompile_limit = 64
    keys = _keys(inputs)
    # The published loader gives every anchor its own negatives, even if all share the same ones.
    rows, temperature = keys.rows, TEMPERATURE[case.op]
    if case.op == "bank_nce":
        term = _compiled_nce() if compiled else published_bank.nce_term
        return lambda leaves: published_bank.bank_nce_loss(
            leaves[0], keys.banks, rows, temperature=temperature, eps=EPS, term=term
        )
    pair = _compiled_pair() if compiled else published_bank.pair_terms

    def loss(leaves: Sequence[Tensor]) -> Tensor:
        terms = published_bank.layerwise_bank_mcl_loss(
            leaves[0],
            inputs.networks,
            keys.banks,
            rows,
            case.positives,
            _pair_weights(case, inputs, leaves),
            temperature=temperature,
            kl_temperature=KL_TEMPERATURE,
            pair=pair,
        )
        return terms.weighted_sum(*COEFFICIENTS)

    return loss


def _check_operators(backend: str, case: Case) -> None:
    """Raises Unavailable if a backend cannot run here, or its extension lacks these losses."""
    check_backend(backend, case)
    compiled = getattr(torch.ops, f"mclfast_{backend}")
    if backend != "reference" and not hasattr(compiled, "bank_mcl_forward"):
        raise Unavailable("the extension has no memory-bank operators")


def _layerwise(backend: str, fused: bool, case: Case, inputs: Inputs) -> Loss:
    _check_operators(backend, case)
    if fused and case.mode == WEIGHTS:
        raise Unavailable("the one-call path gives the pair weights no gradient")
    keys = _keys(inputs)
    settings: dict[str, Any] = {
        "temperature": TEMPERATURE[case.op],
        "kl_temperature": KL_TEMPERATURE,
        "backend": backend,
    }

    def loss(leaves: Sequence[Tensor]) -> Tensor:
        nodes = leaves[0].unflatten(0, (case.m, case.l))
        weights = _pair_weights(case, inputs, leaves)
        arguments = nodes, keys.banks, keys.pos_idx, keys.neg_idx, weights
        if fused:
            return layerwise_bank_mcl_objective(*arguments, weights=COEFFICIENTS, **settings).loss
        return layerwise_bank_mcl_terms(*arguments, **settings).weighted_sum(*COEFFICIENTS)

    return loss


def _nce(backend: str, case: Case, inputs: Inputs) -> Loss:
    _check_operators(backend, case)
    keys = _keys(inputs)
    options: dict[str, Any] = {"temperature": TEMPERATURE[case.op], "eps": EPS, "backend": backend}
    return lambda leaves: bank_nce_loss(leaves[0], keys.banks, keys.rows, **options)


def _gathers(per_ordered_pair: float, per_matrix: float = 0.0) -> Callable[[Case], float]:
    """A function that gives the bytes kept in a case.

    These are tensors of gathered rows [B, 1 + P + K, D], and the matrices [B, 1 + P + K] computed
    from them.

    Args:
        per_ordered_pair: number of gathered tensors for each ordered pair of nodes.
        per_matrix: number of gathered tensors for each bank and node.
    """

    def kept(case: Case) -> float:
        count = per_ordered_pair * 2 * case.unordered_pairs + per_matrix * case.m * case.nodes
        # Numbers for each gathered row: the row itself, and the matrices of the loss and, for the
        # second order, of its first derivative.
        numbers = case.d + (40 if case.mode == SECOND else 24)
        return count * case.b * case.keys * numbers * DTYPES[case.dtype].itemsize

    return kept


#: Relative rounding of the published form, about 1e-4 in float32 at 16384 negatives: it adds up
#: thousands of logarithms of numbers close to 1 for each anchor, and the second derivative of
#: ``logsigmoid`` cancels.
_NCE_ROUNDING = 5e-4

#: Providers of each operation. Layer-wise MCL has two paths of ours: "rows" computes the four
#: terms, which are weighted afterwards; "fused" knows the coefficients and computes the sum.
PROVIDERS: dict[str, list[Provider]] = {
    "bank_layerwise_mcl": [
        Provider("eager", functools.partial(_published, compiled=False), _gathers(4)),
        Provider("compiled", functools.partial(_published, compiled=True), _gathers(4)),
        Provider("reference", functools.partial(_layerwise, "reference", False), _gathers(0, 1)),
        *(
            Provider(
                f"{backend}-{path}",
                functools.partial(_layerwise, backend, path == "fused"),
                ours=True,
            )
            for backend in ("cpu", "cuda")
            for path in ("rows", "fused")
        ),
    ],
    "bank_nce": [
        Provider(
            "eager",
            functools.partial(_published, compiled=False),
            _gathers(1),
            rounding=_NCE_ROUNDING,
        ),
        Provider(
            "compiled",
            functools.partial(_published, compiled=True),
            _gathers(1),
            rounding=_NCE_ROUNDING,
        ),
        Provider(
            "reference", functools.partial(_nce, "reference"), _gathers(1), rounding=_NCE_ROUNDING
        ),
        *(
            Provider(backend, functools.partial(_nce, backend), ours=True)
            for backend in ("cpu", "cuda")
        ),
    ],
}
