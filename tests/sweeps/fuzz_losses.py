"""Random calls of every loss against the plain form, up to the second derivative.

A result must be finite exactly where the plain form is finite in the same dtype. Its error,
measured against the plain form in float64, may exceed the plain form's own by a stated amount.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from helpers.not_finite import Loss, bank_losses, derivatives, in_batch_losses
from mclfast import unit_norm

_LAYOUTS = ("contiguous", "transposed", "strided", "offset", "one row", "one network")
_VALUES = (
    *("unit",) * 8,
    *("zeros", "huge", "tiny", "large", "equal", "one zero", "nan", "inf", "-inf", "all nan"),
)


class Call(NamedTuple):
    """One call: a loss, the embeddings [M, B, D] that it takes, and what they are."""

    name: str
    loss: Loss
    embeddings: Tensor
    temperatures: tuple[float, float]
    values: str
    layout: str


def _fill(rng: random.Random, g: torch.Generator, shape: tuple[int, ...], values: str) -> Tensor:
    x = unit_norm(torch.randn(shape, generator=g, dtype=torch.float64))
    where = tuple(rng.randrange(size) for size in shape)
    if values == "zeros":
        x.zero_()
    elif values == "huge":
        x *= 1e15
    elif values == "large":
        x *= 30
    elif values == "tiny":
        x *= 1e-25
    elif values == "equal":
        x[:] = x[0, 0].clone()
    elif values == "one zero":
        x[where[:2]] = 0
    elif values == "all nan":
        x.fill_(math.nan)
    elif values != "unit":
        x[where] = float(values)
    return x


def _lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` in another layout; "one ..." takes the first for all by a stride of 0."""
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        return torch.stack([x, x], -1)[..., 0]
    if layout == "offset":
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    if layout == "one row":
        return x[:, :1].expand(x.shape)
    if layout == "one network":
        return x[:1].expand(x.shape)
    return x


def draw(seed: int) -> Call:
    """The call of a seed."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    count, batch = rng.choice([2, 2, 3]), rng.choice([1, 2, 3, 5, 8, 17, 33])
    width = rng.choice([1, 2, 3, 8, 16, 17, 65])
    dtype = rng.choice([torch.float32] * 4 + [torch.float64, torch.float16, torch.bfloat16])
    values, layout = rng.choice(_VALUES), rng.choice(_LAYOUTS)
    embeddings = _lay_out(_fill(rng, g, (count, batch, width), values).to(dtype), layout)
    temperatures = rng.choice([0.02, 0.07, 0.1, 1.0, 10.0]), rng.choice([0.5, 1.0, 2.5, 3.0, 4.0])
    labels = torch.randint(rng.choice([1, 2, max(2, batch // 3), 999]), (batch,), generator=g)
    samples, negatives = rng.choice([1, 7, 50]), rng.choice([1, 3, 16, 70])
    bank_dtype = rng.choice([torch.float32] * 3 + [torch.float64, torch.float16, torch.bfloat16])
    bank_values = rng.choice(["unit"] * 8 + ["zeros", "equal", "nan", "inf"])
    banks = _fill(rng, g, (count, samples, width), bank_values).to(bank_dtype)
    pos_idx = torch.randint(samples, (batch, rng.choice([1, 2, 4])), generator=g)
    neg_idx = torch.randint(samples, (batch, negatives), generator=g)
    tau, kl = temperatures
    name, loss = rng.choice(
        [
            *in_batch_losses(labels, temperature=tau, kl_temperature=kl),
            *bank_losses(banks, pos_idx, neg_idx, temperature=tau, kl_temperature=kl),
        ]
    )
    return Call(name, loss, embeddings, temperatures, f"{values}, banks {bank_values}", layout)


def fault(call: Call) -> str | None:
    """Where a result of the CPU backend is wrong, or None."""
    e = call.embeddings
    ours = derivatives(call.loss, e, "cpu", 2)
    plain = derivatives(call.loss, e, "reference", 2)
    exact = plain
    if e.dtype != torch.float64:
        exact = derivatives(call.loss, e.double(), "reference", 2)
    finite = e.double()[e.isfinite()]
    # How far a change of an embedding moves a logit.
    sharp = max(1.0, finite.abs().max().item() if finite.numel() else 1.0) ** 2
    sharp /= min(*call.temperatures, 1.0)
    # A gradient that only one of them has is one of zeros.
    for order, (x, p, y) in enumerate(zip(ours, plain, exact, strict=False)):
        x, p, y = x.double(), p.double(), y.double()
        if not torch.equal(x.isfinite(), p.isfinite()):
            return (
                f"derivative {order}: finite {int(x.isfinite().sum())} of {x.numel()}, plain "
                + str(int(p.isfinite().sum()))
            )
        both = x.isfinite() & y.isfinite()
        error, own = ((a - y)[both].norm() for a in (x, p))
        statistics = torch.float64 if e.dtype == torch.float64 else torch.float32
        rounding = torch.finfo(statistics).eps * sharp * sharp**order
        if order:  # results in the dtype of the embeddings
            rounding += torch.finfo(e.dtype).eps
        size = y[both].norm() + finite.norm() + 1
        if not error <= 10 * own + 200 * rounding * size:
            return f"derivative {order}: error {error:.3g}, plain form's {own:.3g}, size {size:.3g}"
    return None


def sweep(count: int, seed: int) -> dict[str, int]:
    """Tries ``count`` calls, the first of them that of ``seed``, and prints what is wrong.

    Returns:
        The number of calls ``tried`` and of those ``survived``, ``refused`` by both backends and
        ``lost``: wrong, or refused by one backend only.
    """
    counts = Counter(tried=count, survived=0, refused=0, lost=0)
    for number in range(seed, seed + count):
        call = draw(number)
        try:
            found = fault(call)
        except Exception as error:  # a refusal is counted and shown, never raised
            found = f"{type(error).__name__}: {error}"
        counts["lost" if found else "survived"] += 1
        if found:
            print(
                f"seed {number}: {call.name}, {list(call.embeddings.shape)} "
                f"{call.embeddings.dtype}, {call.values}, {call.layout}, "
                f"temperatures {call.temperatures}: {found}"
            )
    return dict(counts)
