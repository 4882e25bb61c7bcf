"""The in-batch rows as literal double loops over the formulas, in Python floats (float64).

Slow on purpose: nothing here is shared with the package.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _logits(a: Tensor, b: Tensor, temperature: float) -> list[list[float]]:
    return [
        [sum(x * y for x, y in zip(u, v, strict=True)) / temperature for v in b.tolist()]
        for u in a.tolist()
    ]


def _log_sum_exp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def _contrastive(logits: list[list[float]], labels: list[int]) -> list[float]:
    rows = []
    for r, row in enumerate(logits):
        positives = [c for c, label in enumerate(labels) if c != r and label == labels[r]]
        if not positives:
            rows.append(0.0)
            continue
        partition = _log_sum_exp([s for c, s in enumerate(row) if c != r])
        rows.append(-sum(row[p] - partition for p in positives) / len(positives))
    return rows


def _kl(student: list[list[float]], teacher: list[list[float]], t: float) -> list[float]:
    rows = []
    for s_row, t_row in zip(student, teacher, strict=True):
        s, q = [x / t for x in s_row], [x / t for x in t_row]
        s_log, q_log = _log_sum_exp(s), _log_sum_exp(q)
        rows.append(
            t
            * t
            * sum(
                math.exp(b - q_log) * ((b - q_log) - (a - s_log)) for a, b in zip(s, q, strict=True)
            )
        )
    return rows


def mcl_rows(
    nodes: Tensor, networks: list[int], labels: Tensor, temperature: float, kl_temperature: float
) -> dict[str, Tensor]:
    """vcl [N, B]; soft_vcl, icl, soft_icl [N, N, B]; float64."""
    count, batch = nodes.shape[:2]
    y = labels.tolist()
    s = [[_logits(nodes[a], nodes[b], temperature) for b in range(count)] for a in range(count)]
    out = {
        "vcl": torch.tensor([_contrastive(s[a][a], y) for a in range(count)], dtype=torch.float64)
    }
    for name in ("soft_vcl", "icl", "soft_icl"):
        out[name] = torch.zeros(count, count, batch, dtype=torch.float64)
    for a in range(count):
        for b in range(count):
            if networks[a] != networks[b]:
                for name, rows in (
                    ("soft_vcl", _kl(s[a][a], s[b][b], kl_temperature)),
                    ("icl", _contrastive(s[a][b], y)),
                    ("soft_icl", _kl(s[a][b], s[b][a], kl_temperature)),
                ):
                    out[name][a, b] = torch.tensor(rows, dtype=torch.float64)
    return out
