"""The memory-bank losses and the sampler as loops over the formulas: slow, plain, shared with
nothing.

The losses are written in torch operations of the inputs' precision, so that autograd gives their
derivatives; teachers are detached.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mclfast.kernels.families import ALL, ICL, SOFT_ICL, SOFT_VCL, VCL


def logits(vector: Tensor, bank: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """[K1]: similarities of one embedding to the keys of one sample."""
    return bank[keys].to(vector.dtype) @ vector / temperature


def _soft(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    s, q = torch.log_softmax(student / t, 0), torch.log_softmax(teacher.detach() / t, 0)
    return t * t * (q.exp() * (q - s)).sum()


def mcl_rows(
    nodes: Tensor,  # [N, B, D]
    banks: Tensor,  # [M, n, D]
    pos_idx: Tensor,  # [B, 1 + P]
    neg_idx: Tensor,  # [B, K]
    networks: list[int],
    temperature: float,
    kl_temperature: float,
    families: int = ALL,
) -> dict[str, Tensor]:
    """vcl [N, B], soft_vcl [N, N, B], icl [M, N, B], soft_icl [N, N, B], lse and kl_lse."""
    count, batch = nodes.shape[:2]
    members, positives = len(banks), pos_idx.shape[1] - 1
    cells: dict[str, dict[tuple[int, ...], Tensor]] = {
        name: {} for name in ("vcl", "soft_vcl", "icl", "soft_icl", "lse", "kl_lse")
    }
    for r in range(batch):
        keys = torch.cat([pos_idx[r], neg_idx[r]])
        z = {}
        for m in range(members):
            for e in range(count):
                full = logits(nodes[e, r], banks[m], keys, temperature)
                z[m, e] = full[1:] if networks[e] == m else full
        for (m, e), row in z.items():
            own = networks[e] == m
            hard, soft = (families & bit for bit in ((VCL, SOFT_VCL) if own else (ICL, SOFT_ICL)))
            if hard:
                cells["lse"][m, e, r] = row.logsumexp(0)
                n_pos = positives if own else positives + 1
                if n_pos > 0:
                    where = ("vcl", (e, r)) if own else ("icl", (m, e, r))
                    cells[where[0]][where[1]] = row.logsumexp(0) - row[:n_pos].mean()
            if soft:
                cells["kl_lse"][m, e, r] = (row / kl_temperature).logsumexp(0)
        for a in range(count):
            for b in range(count):
                na, nb = networks[a], networks[b]
                if na == nb:
                    continue
                if families & SOFT_VCL:
                    cells["soft_vcl"][a, b, r] = _soft(z[na, a], z[nb, b], kl_temperature)
                if families & SOFT_ICL:
                    cells["soft_icl"][a, b, r] = _soft(z[na, b], z[nb, a], kl_temperature)
    shapes = {
        "vcl": (count, batch),
        "soft_vcl": (count, count, batch),
        "icl": (members, count, batch),
        "soft_icl": (count, count, batch),
        "lse": (members, count, batch),
        "kl_lse": (members, count, batch),
    }
    return {name: _assemble(cells[name], shape, nodes) for name, shape in shapes.items()}


def _assemble(cells: dict[tuple[int, ...], Tensor], shape: tuple[int, ...], like: Tensor) -> Tensor:
    zero = like.new_zeros(())
    values = [
        cells.get(tuple(place), zero)
        for place in torch.cartesian_prod(*(torch.arange(s) for s in shape)).tolist()
    ]
    return torch.stack(values).reshape(shape)


@dataclass
class Nce:
    """Rows and log-sum-exps [M, M, B]."""

    rows: Tensor
    lse: Tensor


def nce_rows(
    nodes: Tensor,  # [M, B, D]
    banks: Tensor,  # [M, n, D]
    pos_idx: Tensor,  # [B, 1]
    neg_idx: Tensor,  # [B, K]
    log_normalizer: Tensor,  # [M, M]
    temperature: float,
    eps: float,
) -> Nce:
    members, batch = nodes.shape[:2]
    noise = neg_idx.shape[1] / banks.shape[1]
    rows: dict[tuple[int, ...], Tensor] = {}
    lse: dict[tuple[int, ...], Tensor] = {}
    for i in range(members):
        for j in range(members):
            for r in range(batch if i != j else 0):
                keys = torch.cat([pos_idx[r], neg_idx[r]])
                z = logits(nodes[j, r], banks[i], keys, temperature)
                density = (z - log_normalizer[i, j]).exp()
                positive = density[0] / (density[0] + noise + eps)
                negative = noise / (density[1:] + noise + eps)
                rows[i, j, r] = -(positive.log() + negative.log().sum())
                lse[i, j, r] = z.logsumexp(0)
    shape = (members, members, batch)
    return Nce(_assemble(rows, shape, nodes), _assemble(lse, shape, nodes))


def update(banks: Tensor, index: Tensor, embeddings: Tensor, momentum: float) -> Tensor:
    """The banks in float64 after the update; the last sample of a place wins."""
    old, new = banks.double(), banks.double().clone()
    for m in range(len(banks)):
        for r, i in enumerate(index.tolist()):
            x = momentum * old[m, i] + (1 - momentum) * embeddings[m, r].double()
            new[m, i] = x / max(math.sqrt((x * x).sum().item()), 1e-12)
    return new


WORD = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right >> 32) ^ b ^ k0, right & WORD, (left >> 32) ^ d ^ k1, left & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return a, b, c, d


def draw(seed: int, step: int, stream: int, anchor: int, d: int) -> int:
    """The 64 bits of draw d."""
    words = philox((d // 2, anchor, step, stream), (seed & WORD, seed >> 32 & WORD))
    low, high = words[d % 2 * 2], words[d % 2 * 2 + 1]
    return low | high << 32


def sample(
    index: list[int],
    labels: list[int],
    num_positives: int,
    num_negatives: int,
    seed: int,
    step: int,
) -> tuple[list[list[int]], list[list[int]]]:
    """Keys of every anchor, by lists of the samples inside and outside its class."""
    pos_idx, neg_idx = [], []
    for i in index:
        same = [s for s, y in enumerate(labels) if y == labels[i] and s != i]
        # Samples of the other classes, classes in ascending order.
        others = sorted((y, s) for s, y in enumerate(labels) if y != labels[i])
        draws = [draw(seed, step, 0, i, d) for d in range(num_positives)]
        pos_idx.append([i, *(same[u * len(same) >> 64] if same else i for u in draws)])
        draws = [draw(seed, step, 1, i, d) for d in range(num_negatives)]
        neg_idx.append([others[u * len(others) >> 64][1] for u in draws])
    return pos_idx, neg_idx
