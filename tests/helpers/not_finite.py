"""Losses with NaN or an infinity among their inputs, in two backends: which results are finite.

``python not_finite.py BACKEND COUNT`` is a process of its own for Triton, which decides when it is
imported whether it interprets.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import mclfast
from mclfast import unit_norm

Loss = Callable[[Tensor, str], Tensor]
TERMS = ("vcl", "soft_vcl", "icl", "soft_icl")


def in_batch_losses(
    labels: Tensor, *, temperature: float = 0.1, kl_temperature: float = 3.0
) -> Iterator[tuple[str, Loss]]:
    """Name and call of every loss inside the batch; a call takes [M, B, D] and the backend."""
    lone = {"temperature": temperature}
    both = {**lone, "kl_temperature": kl_temperature}
    yield "mcl_loss", lambda e, b: mclfast.mcl_loss(e, labels, backend=b, **both)
    yield (
        "layerwise_mcl_loss, weights of zero",
        lambda e, b: mclfast.layerwise_mcl_loss(
            e[:, None], labels, weights=(1.0, 0.0, 0.0, 1.0), backend=b, **both
        ),
    )
    for term in TERMS:
        yield (
            f"mcl_terms {term}",
            lambda e, b, term=term: getattr(mclfast.mcl_terms(e, labels, backend=b, **both), term),
        )
    yield "supcon_loss", lambda e, b: mclfast.supcon_loss(e[0], labels, backend=b, **lone)
    yield (
        "similarity_kl_loss",
        lambda e, b: mclfast.similarity_kl_loss(e[0], e[1], backend=b, **both),
    )
    yield "info_nce_loss", lambda e, b: mclfast.info_nce_loss(e[0], e[1], backend=b, **lone)


def bank_losses(
    banks: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    temperature: float = 0.1,
    kl_temperature: float = 3.0,
) -> Iterator[tuple[str, Loss]]:
    """Name and call of every loss against memory banks, as :func:`in_batch_losses`."""
    keys = banks, positives, negatives
    lone = {"temperature": temperature}
    both = {**lone, "kl_temperature": kl_temperature}
    yield "bank_mcl_loss", lambda e, b: mclfast.bank_mcl_loss(e, *keys, backend=b, **both)
    for term in TERMS:
        yield (
            f"bank_mcl_terms {term}",
            lambda e, b, term=term: getattr(
                mclfast.bank_mcl_terms(e, *keys, backend=b, **both), term
            ),
        )
    contrast = torch.cat([positives[:, :1], negatives], 1)
    yield (
        "bank_nce_loss",
        lambda e, b: mclfast.bank_nce_loss(e, banks, contrast, backend=b, **lone),
    )


def derivatives(loss: Loss, embeddings: Tensor, backend: str, order: int) -> list[Tensor]:
    """The loss, its gradient and the gradient of a product with that, up to ``order``."""
    e = embeddings.clone().requires_grad_()
    found = [loss(e, backend)]
    for _ in range(order):
        last = found[-1]
        if not last.requires_grad:
            break
        direction = torch.linspace(-1, 1, last.numel(), dtype=last.dtype).reshape(last.shape)
        (next_,) = torch.autograd.grad(
            (last * (direction if last.dim() else 1)).sum(), e, create_graph=True
        )
        found.append(next_)
    return [x.detach() for x in found]


def cases(seed: int, value: float) -> Iterator[tuple[str, Loss, Tensor]]:
    """Losses and embeddings [M, B, D] with one ``value`` among the embeddings or in a bank row."""
    g = torch.Generator().manual_seed(seed)

    def pick(choices: list[int]) -> int:
        return choices[int(torch.randint(len(choices), (1,), generator=g))]

    count, batch, width = pick([2, 3]), pick([1, 2, 3, 7, 17]), pick([1, 3, 8, 17])
    samples, negatives = 30, pick([1, 5, 70])
    e = unit_norm(torch.randn(count, batch, width, generator=g))
    banks = unit_norm(torch.randn(count, samples, width, generator=g))
    labels = torch.randint(pick([2, 4, 99]), (batch,), generator=g)
    pos_idx = torch.randint(samples, (batch, pick([1, 2, 3])), generator=g)
    neg_idx = torch.randint(samples, (batch, negatives), generator=g)
    everyone = list(range(batch))
    if pick([0, 1]):
        e[pick(list(range(count))), pick(everyone), pick(list(range(width)))] = value
        yield from ((name, loss, e) for name, loss in in_batch_losses(labels))
    else:
        row = neg_idx[pick(everyone), pick(list(range(negatives)))]
        banks[pick(list(range(count))), row, pick(list(range(width)))] = value
    yield from ((name, loss, e) for name, loss in bank_losses(banks, pos_idx, neg_idx))


def differences(backend: str, seed: int, value: float, *, order: int = 2) -> list[str]:
    """Where a result is finite in one of ``backend`` and the plain form, but not in the other.

    Args:
        backend: "cpu" or "triton"; the latter has no losses against banks.
        seed: seed of the case.
        value: NaN or an infinity.
        order: highest derivative that is compared.
    """
    found = []
    for name, loss, e in cases(seed, value):
        if backend == "triton" and "bank" in name:
            continue
        ours = derivatives(loss, e, backend, order)
        plain = derivatives(loss, e, "reference", order)
        # A gradient that ours has and the plain form does not have is one of zeros.
        for k, (x, y) in enumerate(zip(ours, plain, strict=False)):
            if not torch.equal(x.isfinite(), y.isfinite()):
                found.append(f"{name}, seed {seed}, {value}, derivative {k}: {x} for {y}")
    return found


if __name__ == "__main__":
    # The second derivative of the kernels may hold NaN in a few elements more than the plain form.
    lost = [
        text
        for seed in range(int(sys.argv[2]))
        for text in differences(sys.argv[1], seed, math.nan, order=1)
    ]
    sys.exit("\n".join(lost) or None)
