"""The memory-bank operators in plain torch, pair of nodes by pair; derivatives by autograd."""

from __future__ import annotations

import math
from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mclfast.kernels.families import ALL, ICL, SOFT_ICL, SOFT_VCL, VCL

Rows = namedtuple("Rows", "vcl soft_vcl icl soft_icl lse kl_lse")


def bank_rows(
    nodes: Tensor,  # [N, B, D]
    banks: Tensor,  # [M, n, D]
    pos_idx: Tensor,  # [B, 1 + P]
    neg_idx: Tensor,  # [B, K]
    networks: list[int],
    tau: float,
    t: float,
    families: int = ALL,
) -> Rows:
    n_nodes, batch, _ = nodes.shape
    n_banks, positives = banks.shape[0], pos_idx.shape[1] - 1
    keys = torch.cat([pos_idx, neg_idx], 1)
    z = {
        (m, e): torch.einsum("bkd,bd->bk", banks[m][keys], nodes[e]) / tau
        for m in range(n_banks)
        for e in range(n_nodes)
    }
    for m, e in z:
        if networks[e] == m:
            z[m, e] = z[m, e][:, 1:]
    zero = nodes.new_zeros(batch)

    def teach(student: Tensor, teacher: Tensor) -> Tensor:
        log_student, log_teacher = (F.log_softmax(x / t, 1) for x in (student, teacher.detach()))
        return t * t * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)

    vcl, icl, soft_vcl, soft_icl, lse, kl_lse = {}, {}, {}, {}, {}, {}
    for e, own in enumerate(networks):
        for m in range(n_banks):
            intra = m == own
            needed = families & (VCL | SOFT_VCL if intra else ICL | SOFT_ICL)
            lse[m, e] = z[m, e].logsumexp(1) if needed else zero
            kl_lse[m, e] = (z[m, e] / t).logsumexp(1) if needed else zero
            count = positives + (not intra)
            hard = lse[m, e] - z[m, e][:, :count].mean(1) if count else zero
            if intra:
                vcl[e] = hard if families & VCL else zero
            icl[m, e] = hard if families & ICL and not intra else zero
    for a, net_a in enumerate(networks):
        for b, net_b in enumerate(networks):
            cross = net_a != net_b
            soft_vcl[a, b] = (
                teach(z[net_a, a], z[net_b, b]) if cross and families & SOFT_VCL else zero
            )
            soft_icl[a, b] = (
                teach(z[net_a, b], z[net_b, a]) if cross and families & SOFT_ICL else zero
            )

    def stack(parts: dict, *shape: int) -> Tensor:
        keys = [()]
        for size in shape:
            keys = [(*key, i) for key in keys for i in range(size)]
        rows = [parts[key if len(key) > 1 else key[0]] for key in keys]
        return torch.stack(rows).reshape(*shape, batch)

    return Rows(
        stack(vcl, n_nodes),
        stack(soft_vcl, n_nodes, n_nodes),
        stack(icl, n_banks, n_nodes),
        stack(soft_icl, n_nodes, n_nodes),
        stack(lse, n_banks, n_nodes),
        stack(kl_lse, n_banks, n_nodes),
    )


def bank_gradients(
    nodes: Tensor, cotangents: list[Tensor], tangent: Tensor, *args, **options
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradient of sum(cotangents * rows), and the gradients of <tangent, that gradient>."""
    nodes = nodes.clone().requires_grad_()
    cotangents = [g.clone().requires_grad_() for g in cotangents]
    rows = bank_rows(nodes, *args, **options)[:4]
    total = sum((g * row).sum() for g, row in zip(cotangents, rows, strict=True))
    (grad,) = torch.autograd.grad(total, nodes, create_graph=True)
    second = torch.autograd.grad(
        (grad * tangent).sum(), [nodes, *cotangents], materialize_grads=True
    )
    return grad.detach(), second[0], list(second[1:])


def nce_rows(
    nodes: Tensor,  # [M, B, D]
    banks: Tensor,  # [M, n, D]
    pos_idx: Tensor,  # [B, 1]
    neg_idx: Tensor,  # [B, K]
    log_normalizer: Tensor,  # [M, M]
    tau: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Rows and log sum exp, [M, M, B] each, zero on the diagonal."""
    keys = torch.cat([pos_idx, neg_idx], 1)
    c = neg_idx.shape[1] / banks.shape[1]
    rows, lse = [], []
    for i, bank in enumerate(banks):
        for j, anchor in enumerate(nodes):
            z = torch.einsum("bkd,bd->bk", bank[keys], anchor) / tau
            odds = (z - log_normalizer[i, j]).exp()
            data = (odds[:, 0] / (odds[:, 0] + c + eps)).log()
            noise = (c / (odds[:, 1:] + c + eps)).log().sum(1)
            rows.append(-(data + noise) * (i != j))
            lse.append(z.logsumexp(1) * (i != j))
    shape = (len(banks), len(nodes), -1)
    return torch.stack(rows).reshape(shape), torch.stack(lse).reshape(shape)


def nce_gradients(nodes: Tensor, tangent: Tensor, *args) -> tuple[Tensor, Tensor]:
    """Gradient of rows.sum() / B, and the gradient of <tangent, that gradient>."""
    nodes = nodes.clone().requires_grad_()
    total = nce_rows(nodes, *args)[0].sum() / nodes.shape[1]
    (grad,) = torch.autograd.grad(total, nodes, create_graph=True)
    (second,) = torch.autograd.grad((grad * tangent).sum(), nodes)
    return grad.detach(), second


def updated(banks: Tensor, index: Tensor, embeddings: Tensor, momentum: float) -> Tensor:
    out = banks.clone()
    last = {int(i): r for r, i in enumerate(index)}
    for i, r in last.items():
        x = momentum * banks[:, i] + (1 - momentum) * embeddings[:, r]
        out[:, i] = x / x.norm(dim=1, keepdim=True).clamp_min(1e-6)
    return out


_MASK = 0xFFFFFFFF


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _MASK, (a >> 32) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def sample(
    anchors: list[int], labels: list[int], positives: int, negatives: int, seed: int, step: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Positives and negatives as lists; the tables are those of `class_tables`."""
    order, position, starts = class_tables(labels)

    def uniform(anchor: int, stream: int, draw: int, count: int) -> int:
        w = philox((draw // 2, anchor, step & _MASK, stream), (seed & _MASK, seed >> 32))
        u = w[0] | w[1] << 32 if draw % 2 == 0 else w[2] | w[3] << 32
        return u * count >> 64

    pos, neg = [], []
    for i in anchors:
        start, end = starts[labels[i]], starts[labels[i] + 1]
        others = [x for x in order[start:end] if x != i] or [i]
        rest = order[:start] + order[end:]
        pos.append([i] + [others[uniform(i, 0, j, len(others))] for j in range(positives)])
        neg.append([rest[uniform(i, 1, k, len(rest))] for k in range(negatives)])
    return pos, neg


def class_tables(labels: list[int]) -> tuple[list[int], list[int], list[int]]:
    """order, position and starts of `sample_contrast`."""
    order = sorted(range(len(labels)), key=lambda i: labels[i])
    position = [0] * len(labels)
    for place, i in enumerate(order):
        position[i] = place
    starts = [sum(x < c for x in labels) for c in range(max(labels) + 2)]
    return order, position, starts


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; absolute where that is zero."""
    difference = (got.double() - want.double()).norm().item()
    size = want.double().norm().item()
    return difference / size if size > 0 else difference if math.isfinite(difference) else math.inf
