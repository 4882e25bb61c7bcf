"""The parts of a measurement: case, inputs, providers, and the check of a result.

A provider is an implementation of an operation: it builds a function from leaf tensors to a scalar
loss. If it cannot run here, it raises :class:`Unavailable` with a reason, which the report lists.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mclfast.ops import backends

FORWARD = "forward"
BOTH = "forward_backward"
WEIGHTS = "forward_backward_weights"
SECOND = "second_order"
MODES = (FORWARD, BOTH, WEIGHTS, SECOND)

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
#: Largest relative difference from the reference in float64 that counts as right, by dtype. The
#: gradient has the dtype of the embeddings, so in half precision its rounding sets the limit.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
#: The same for float32 inputs that the Triton kernels round to tf32 (10 bits of mantissa).
TF32_TOLERANCE = 2e-3

Loss = Callable[[Sequence[Tensor]], Tensor]


class Unavailable(Exception):
    """Raised if a provider cannot measure a case here; the text says why."""


@dataclass(frozen=True)
class Case:
    """One point: an operation, what is differentiated, a shape, a dtype and a device.

    Attributes:
        op: operation, a key of ``PROVIDERS`` in ``cases.py``.
        mode: forward (the graph is built but not used); forward_backward; forward_backward_weights
            (the pair weights get a gradient too); second_order (a product with the gradient is
            differentiated once more).
        m: number of networks, or of views.
        l: number of stages of each network.
        b: batch size.
        d: dimension of the embeddings.
        dtype: dtype of the embeddings, a key of :data:`DTYPES`.
        device: "cpu" or "cuda".
        k: number of negatives of each anchor in the memory banks; 0 for in-batch operations.
        n: number of rows of each memory bank; 0 for in-batch operations.
        bank_dtype: dtype of the memory banks, a key of :data:`DTYPES`.
        shared_negatives: whether all anchors have the same negatives.
    """

    op: str
    mode: str
    m: int
    l: int  # noqa: E741 - the L of (M, L, B, D)
    b: int
    d: int = 128
    dtype: str = "float32"
    device: str = "cpu"
    k: int = 0
    n: int = 0
    bank_dtype: str = "float32"
    shared_negatives: bool = False

    @property
    def positives(self) -> int:
        """Number P of positives of each anchor in the memory banks, without its own entry."""
        return int(self.op == "bank_layerwise_mcl")

    @property
    def keys(self) -> int:
        """Number of rows of a bank that an anchor is compared with, 1 + P + K; 0 without banks."""
        return 1 + self.positives + self.k if self.k else 0

    @property
    def nodes(self) -> int:
        """Number N of stages of all networks."""
        return self.m * self.l

    @property
    def unordered_pairs(self) -> int:
        """Number |X| of unordered pairs of nodes of different networks."""
        return self.m * (self.m - 1) // 2 * self.l**2

    @property
    def name(self) -> str:
        shape = f"{self.m},{self.l},{self.b},{self.d}"
        if self.k:
            shape += f",K={self.k}"
        return f"{self.op}[{','.join([self.mode, shape, *self.kind])}]"

    @property
    def kind(self) -> list[str]:
        """Words that describe a case in a table, besides operation, mode and shape."""
        words = [self.dtype, self.device]
        if self.k:
            words += [f"n={self.n}", f"{self.bank_dtype} bank"]
        if self.shared_negatives:
            words.append("shared negatives")
        return words


@dataclass(frozen=True)
class Keys:
    """Memory banks, and the rows of them that each anchor is compared with.

    Attributes:
        banks: memory banks [M, n, D].
        pos_idx: rows of positives [B, 1 + P], with the anchor's own row first.
        neg_idx: rows of negatives [B, K], or [K] if all anchors share them.
        rows: rows of positives and negatives in one table [B, 1 + P + K].
    """

    banks: Tensor
    pos_idx: Tensor
    neg_idx: Tensor
    rows: Tensor

    def block(self, start: int, count: int) -> Keys:
        """The keys of at most ``count`` anchors from number ``start`` on."""
        chosen = slice(start, start + count)
        shared = self.neg_idx.dim() == 1
        negatives = self.neg_idx if shared else self.neg_idx[chosen]
        return Keys(self.banks, self.pos_idx[chosen], negatives, self.rows[chosen])


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case.

    Attributes:
        leaves: tensors that are differentiated: nodes [N, B, D], with the pair weights [N, N, B] in
            some modes, or views [B, D].
        networks: index of the network of each node.
        labels: labels [B]; with memory banks, the numbers of the samples.
        pair_weights: weights [N, N, B]; None for operations without them.
        direction: tensors shaped like the first leaves, by which the gradient is multiplied for
            the second order.
        keys: memory banks and rows; None for in-batch operations.
    """

    leaves: tuple[Tensor, ...]
    networks: tuple[int, ...]
    labels: Tensor
    pair_weights: Tensor | None
    direction: tuple[Tensor, ...]
    keys: Keys | None = None

    @property
    def stages(self) -> tuple[int, ...]:
        """Number of nodes of each network."""
        return tuple(Counter(self.networks).values())

    def held(self) -> tuple[Tensor, ...]:
        """Leaves, banks and tables of keys: tensors that exist even if no graph keeps them."""
        keys = self.keys
        if keys is None:
            return self.leaves
        return *self.leaves, keys.banks, keys.pos_idx, keys.neg_idx, keys.rows

    def double(self) -> Inputs:
        """The same inputs in float64, as new leaves; banks keep their dtype."""
        weights = self.pair_weights
        return Inputs(
            tuple(x.detach().double().requires_grad_() for x in self.leaves),
            self.networks,
            self.labels,
            None if weights is None else weights.detach().double(),
            tuple(x.double() for x in self.direction),
            self.keys,
        )


@dataclass(frozen=True)
class Provider:
    """An implementation of an operation.

    Attributes:
        name: name in the report.
        build: makes the loss from a case and its inputs; may raise :class:`Unavailable`.
        kept: number of bytes that a case is expected to need; a case that does not fit into memory
            is skipped.
        ours: whether the goals apply to it.
        tangent: whether it normalises its inputs itself. The part of its gradient along an
            embedding is then zero, and gradients are compared without that part.
        rounding: relative error of its formula in float32, if that exceeds :data:`TOLERANCE`.
    """

    name: str
    build: Callable[[Case, Inputs], Loss]
    kept: Callable[[Case], float] = lambda case: 0.0
    ours: bool = False
    tangent: bool = False
    rounding: float = 0.0


def step(case: Case, inputs: Inputs, loss: Loss) -> Callable[[], tuple[Tensor, ...]]:
    """The measured call: computes the loss and the derivatives of the mode."""
    leaves = inputs.leaves

    def forward() -> tuple[Tensor, ...]:
        return (loss(leaves),)

    def both() -> tuple[Tensor, ...]:
        value = loss(leaves)
        return (value.detach(), *torch.autograd.grad(value, leaves))

    def second() -> tuple[Tensor, ...]:
        value = loss(leaves)
        first = torch.autograd.grad(value, leaves, create_graph=True)
        pairs = zip(first, inputs.direction, strict=True)
        product = torch.stack([(g * v).sum() for g, v in pairs]).sum()
        found = torch.autograd.grad(product, leaves)
        return (value.detach(), *(g.detach() for g in first), *found)

    return {FORWARD: forward, BOTH: both, WEIGHTS: both, SECOND: second}[case.mode]


def tolerance(case: Case, provider: Provider) -> float:
    """Largest relative difference from the reference up to which a result counts as right."""
    rounds = os.environ.get("MCLFAST_FP32_PRECISION", "tf32") == "tf32"
    if rounds and case.dtype == "float32" and provider.name.startswith("triton"):
        return TF32_TOLERANCE
    if case.dtype == "float32":
        return max(TOLERANCE["float32"], provider.rounding)
    return TOLERANCE[case.dtype]


def difference(
    case: Case,
    provider: Provider,
    inputs: Inputs,
    found: Sequence[Tensor],
    expected: Sequence[Tensor],
) -> float:
    """Largest relative difference between a result and the reference; NaN if the result has one.

    Args:
        case: case that was computed.
        provider: provider that computed the result.
        inputs: inputs of the case.
        found: value and derivatives of the provider.
        expected: value and derivatives of the reference, in float64.

    Returns:
        The largest of the differences of value and derivatives, each by its norm.
    """
    worst = 0.0
    leaves = [x.detach().double() for x in inputs.leaves]
    for i, (ours, exact) in enumerate(zip(found, expected, strict=True)):
        ours = ours.detach().double()
        if provider.tangent and i > 0:
            e = leaves[(i - 1) % len(leaves)]
            ours, exact = (x - (x * e).sum(-1, keepdim=True) * e for x in (ours, exact))
        scale = float(exact.norm()) or 1.0
        error = float((ours - exact).norm()) / scale
        worst = error if math.isnan(error) else max(worst, error)
        if math.isnan(worst):
            break
    return worst


#: Device that each backend is measured on.
_DEVICES = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}


def check_backend(backend: str, case: Case) -> None:
    """Raises :class:`Unavailable` if a backend cannot run a case or is not measured there."""
    device = _DEVICES.get(backend, case.device)
    if case.device != device:
        raise Unavailable(f"measured on {device} only")
    status = backends.backend_report()[backend]
    if not status.available:
        raise Unavailable(status.reason)
