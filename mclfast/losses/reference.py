"""The in-batch losses as plain PyTorch: the definition every faster backend is compared with.

Notation (MCL, arXiv 2104.12565, section 3; layer-wise form, arXiv 2207.11518, section 3):
a node is one stage of one network, ``nodes[a]`` are its unit-norm embeddings ``E_a`` [B, D], and

    S_ab = E_a E_b^T / temperature                  [B, B] similarity logits, anchors in rows
    P(r) = {c != r : labels[c] == labels[r]}        positives of anchor r

An anchor never counts itself as positive or in the partition function of ``vcl`` and ``icl``; the
distributions compared by the soft terms run over all columns, the anchor's own included.
Anchors without a positive contribute 0 to ``vcl`` and ``icl``.

Half precision is computed in float32. Nothing here needs a compiler, a GPU or Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mclfast._base.tensors import wide
from mclfast.losses.results import MCLRows, Temperature


def similarity_logits(anchors: Tensor, contrast: Tensor, temperature: Temperature) -> Tensor:
    """S = anchors contrast^T / temperature, [R, D] and [B, D] -> [R, B]."""
    return anchors @ contrast.T / temperature


def batch_masks(labels: Tensor, row_start: int, row_count: int) -> tuple[Tensor, Tensor]:
    """Self mask and positive mask of the anchors ``row_start .. row_start + row_count``.

    Returns:
        (is_self, positives), both [R, B] bool.
    """
    columns = torch.arange(labels.shape[0], device=labels.device)
    anchors = columns[row_start : row_start + row_count]
    is_self = anchors[:, None] == columns[None, :]
    same_class = labels[row_start : row_start + row_count, None] == labels[None, :]
    return is_self, same_class & ~is_self


def contrastive_rows(logits: Tensor, is_self: Tensor, positives: Tensor) -> Tensor:
    """Row loss -1/|P(r)| sum_{p in P(r)} (S_rp - log sum_{c != r} exp S_rc), 0 where P(r) is empty.

    The supervised contrastive loss of arXiv 2004.11362, equation 2 (L_out), one value per anchor.
    """
    count = positives.sum(-1)
    has_positive = count > 0
    # Rows without a positive keep their own column. They are dropped below, but a row that is
    # masked as a whole (in a batch of one) would put NaN into the gradient.
    others = logits.masked_fill(is_self & has_positive[:, None], float("-inf"))
    positive_mean = (logits * positives).sum(-1) / count.clamp_min(1)
    return torch.where(has_positive, others.logsumexp(-1) - positive_mean, 0.0)


def distribution_kl_rows(student: Tensor, teacher: Tensor, kl_temperature: Temperature) -> Tensor:
    """Row loss T^2 KL(softmax(teacher / T) || softmax(student / T)); no gradient to the teacher."""
    log_p = torch.log_softmax(teacher.detach() / kl_temperature, dim=-1)
    log_q = torch.log_softmax(student / kl_temperature, dim=-1)
    return kl_temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def mcl_rows(
    nodes: Tensor,
    networks: Sequence[int],
    labels: Tensor,
    *,
    temperature: Temperature,
    kl_temperature: Temperature,
    row_start: int = 0,
    row_count: int | None = None,
) -> MCLRows:
    """All rows of all nodes, one similarity matrix at a time.

    Args:
        nodes: unit-norm embeddings [N, B, D].
        networks: number of the network that each of the N nodes belongs to.
        labels: class of each sample, [B].
        temperature: divisor of the similarities.
        kl_temperature: divisor of the logits in the soft terms, T.
        row_start, row_count: first anchor and number of anchors R; all B anchors by default.
    """
    num_nodes, batch = nodes.shape[:2]
    count = batch - row_start if row_count is None else row_count
    embeddings = [wide(node) for node in nodes.unbind(0)]
    anchors = [e[row_start : row_start + count] for e in embeddings]
    is_self, positives = batch_masks(labels, row_start, count)

    intra = [similarity_logits(anchors[a], embeddings[a], temperature) for a in range(num_nodes)]
    zero = embeddings[0].new_zeros(count)
    soft_vcl = [[zero] * num_nodes for _ in range(num_nodes)]
    icl = [[zero] * num_nodes for _ in range(num_nodes)]
    soft_icl = [[zero] * num_nodes for _ in range(num_nodes)]
    for a in range(num_nodes):
        for b in range(num_nodes):
            if networks[a] == networks[b]:
                continue
            a_to_b = similarity_logits(anchors[a], embeddings[b], temperature)
            b_to_a = similarity_logits(anchors[b], embeddings[a], temperature)
            soft_vcl[a][b] = distribution_kl_rows(intra[a], intra[b], kl_temperature)
            icl[a][b] = contrastive_rows(a_to_b, is_self, positives)
            soft_icl[a][b] = distribution_kl_rows(a_to_b, b_to_a, kl_temperature)
    return MCLRows(
        vcl=torch.stack([contrastive_rows(s, is_self, positives) for s in intra]),
        soft_vcl=torch.stack([torch.stack(row) for row in soft_vcl]),
        icl=torch.stack([torch.stack(row) for row in icl]),
        soft_icl=torch.stack([torch.stack(row) for row in soft_icl]),
        valid=positives.any(-1),
    )


def supcon_loss(embeddings: Tensor, labels: Tensor, *, temperature: Temperature) -> Tensor:
    """Supervised contrastive loss (arXiv 2004.11362, equation 2), mean over the batch."""
    is_self, positives = batch_masks(labels, 0, labels.shape[0])
    e = wide(embeddings)
    return contrastive_rows(similarity_logits(e, e, temperature), is_self, positives).mean()


def info_nce_loss(a: Tensor, b: Tensor, *, temperature: Temperature) -> Tensor:
    """Symmetric InfoNCE: a[r] against all of b with b[r] positive, and back; the mean of both."""
    logits = similarity_logits(wide(a), wide(b), temperature)
    partitions = logits.logsumexp(1) + logits.logsumexp(0)
    return (partitions / 2 - logits.diagonal()).mean()


def similarity_kl_loss(
    student: Tensor, teacher: Tensor, *, temperature: Temperature, kl_temperature: Temperature
) -> Tensor:
    """Batch mean of T^2 KL between the similarity distributions of teacher and student."""
    s, t = wide(student), wide(teacher)
    return distribution_kl_rows(
        similarity_logits(s, s, temperature), similarity_logits(t, t, temperature), kl_temperature
    ).mean()
