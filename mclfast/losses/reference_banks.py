"""The memory-bank losses as plain PyTorch: the definition the faster backends are compared with.

Notation (MCL, arXiv 2104.12565, section 3; layer-wise form, arXiv 2207.11518, section 3; NCE form,
MCL-OKD, arXiv 2006.04093): node e is one stage of one network, ``nodes[e]`` its embeddings ``E_e``
[B, D]. Network m keeps one embedding of every sample of the data set in ``banks[m]`` [n, D]. Anchor
r is compared with its key samples only: its own entry, P positives, K negatives. With
``keys[r] = [own index, positives, negatives]``:

    z[m, e][r, k] = banks[m][keys[r, k]] . E_e[r] / temperature        [B, 1 + P + K] logits

Intra logits of node a are ``z[network of a, a]`` without column 0: an anchor is not compared with
its own past. Inter logits of (a, b) are ``z[network of a, b]`` with all columns; the anchor's entry
in the bank of a peer is a positive. (The published layer-wise code reads the bank of the first
network of a pair for the intra logits of both; here every network reads its own.)

Each bank is gathered once, [B, 1 + P + K, D]: this form is meant for checking, not to save memory.
Banks get no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mclfast._base.tensors import statistics_dtype, unit_norm, wide
from mclfast.losses.reference import distribution_kl_rows
from mclfast.losses.results import BankMCLRows, Temperature


def bank_logits(embeddings: Tensor, bank: Tensor, keys: Tensor, temperature: Temperature) -> Tensor:
    """z[r, k] = bank[keys[r, k]] . embeddings[r] / temperature; [B, D], [n, D], [B, J] -> [B, J].

    The rows of a bank in host memory are gathered there.
    """
    rows = bank[keys.to(bank.device)].to(embeddings.device, statistics_dtype(embeddings))
    return torch.einsum("bkd,bd->bk", rows, wide(embeddings)) / temperature


def first_columns_rows(logits: Tensor, positives: int) -> Tensor:
    """Row loss logsumexp(z) - mean of the first ``positives`` columns, 0 where there are none."""
    if positives == 0:
        return logits.new_zeros(logits.shape[0])
    return logits.logsumexp(-1) - logits[:, :positives].mean(-1)


def bank_mcl_rows(
    nodes: Tensor,
    networks: Sequence[int],
    banks: Tensor,
    pos_idx: Tensor,
    neg_idx: Tensor,
    *,
    temperature: Temperature,
    kl_temperature: Temperature,
) -> BankMCLRows:
    """All rows of all nodes.

    Args:
        nodes: unit-norm embeddings [N, B, D].
        networks: number of the network, and so of the bank, of each of the N nodes.
        banks: stored embeddings [M, n, D], one bank per network.
        pos_idx: sample numbers of the positives [B, 1 + P], the anchor's own number first.
        neg_idx: sample numbers of the negatives [B, K].
        temperature: divisor of the similarities.
        kl_temperature: divisor of the logits in the soft terms.
    """
    keys = torch.cat([pos_idx, neg_idx], dim=1)
    count, positives = len(networks), pos_idx.shape[1] - 1
    z = [[bank_logits(e, bank, keys, temperature) for e in nodes] for bank in banks]
    intra = [z[networks[a]][a][:, 1:] for a in range(count)]
    zero = z[0][0].new_zeros(nodes.shape[1])
    soft_vcl = [[zero] * count for _ in range(count)]
    soft_icl = [[zero] * count for _ in range(count)]
    for a, network_a in enumerate(networks):
        for b, network_b in enumerate(networks):
            if network_a != network_b:
                soft_vcl[a][b] = distribution_kl_rows(intra[a], intra[b], kl_temperature)
                soft_icl[a][b] = distribution_kl_rows(
                    z[network_a][b], z[network_b][a], kl_temperature
                )
    return BankMCLRows(
        vcl=torch.stack([first_columns_rows(logits, positives) for logits in intra]),
        soft_vcl=torch.stack([torch.stack(row) for row in soft_vcl]),
        icl=torch.stack(
            [
                torch.stack(
                    [
                        zero if m == networks[e] else first_columns_rows(z[m][e], positives + 1)
                        for e in range(count)
                    ]
                )
                for m in range(len(banks))
            ]
        ),
        soft_icl=torch.stack([torch.stack(row) for row in soft_icl]),
    )


def bank_nce_log_normalizer(
    nodes: Tensor, banks: Tensor, contrast_idx: Tensor, *, temperature: Temperature
) -> Tensor:
    """log(n * mean over the batch and its keys of exp z[i, j]) [M, M]; no gradient.

    It estimates the partition function over the data set, which noise-contrastive estimation
    divides by. The diagonal is 0 and not used.
    """
    count = len(banks)
    with torch.no_grad():
        log_z = nodes.new_zeros(count, count, dtype=statistics_dtype(nodes))
        for i, bank in enumerate(banks):
            for j, e in enumerate(nodes):
                if i != j:
                    z = bank_logits(e, bank, contrast_idx, temperature)
                    log_z[i, j] = z.logsumexp((0, 1)) + math.log(banks.shape[1] / z.numel())
    return log_z


def bank_nce_loss(
    nodes: Tensor,
    banks: Tensor,
    contrast_idx: Tensor,
    log_normalizer: Tensor,
    *,
    temperature: Temperature,
    eps: float,
) -> Tensor:
    """Noise-contrastive estimation of all anchors j against all banks i of other networks.

    With p = exp(z[i, j]) / Z[i, j] of the own entry (column 0) and of K noise samples, drawn with
    probability 1 / n each, and c = K / n:

        -log(p_0 / (p_0 + c + eps)) - sum_k log(c / (p_k + c + eps))

    averaged over the batch and summed over the M (M - 1) ordered pairs. Written with logsigmoid,
    which does not underflow: p / (p + c') = sigmoid(log p - log c').
    """
    noise = (contrast_idx.shape[1] - 1) / banks.shape[1]
    log_noise = math.log(noise + eps)
    total = nodes.new_zeros((), dtype=statistics_dtype(nodes))
    for i, bank in enumerate(banks):
        for j, e in enumerate(nodes):
            if i != j:
                log_p = bank_logits(e, bank, contrast_idx, temperature) - log_normalizer[i, j]
                from_data = logsigmoid(log_p[:, 0] - log_noise)
                from_noise = math.log(noise) - log_noise + logsigmoid(log_noise - log_p[:, 1:])
                total = total - (from_data + from_noise.sum(-1)).mean()
    return total


def bank_update_(banks: Tensor, index: Tensor, embeddings: Tensor, momentum: float) -> None:
    """``banks[m, i] <- unit_norm(momentum * banks[m, i] + (1 - momentum) * embeddings[m, r])``.

    If a sample occurs more than once in the batch, its last occurrence counts.

    Args:
        banks: stored embeddings [M, n, D], changed in place.
        index: number i of each sample r, [B].
        embeddings: new embeddings [M, B, D].
        momentum: share of the old entry.
    """
    same = index[:, None] == index[None, :]
    # All rows of a sample write the values of its last one: to drop rows, the host would have to
    # wait for the device.
    last = torch.where(same, torch.arange(len(index), device=index.device), -1).amax(1)
    where = index.to(banks.device)
    old, new = wide(banks[:, where]), wide(embeddings[:, last]).to(banks.device)
    banks[:, where] = unit_norm(momentum * old + (1 - momentum) * new).to(banks.dtype)
