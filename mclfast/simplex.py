"""The convex combination of several networks' logits with the least cross entropy."""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_STEPS = 200
_SHRINK = 0.1
_SMALLEST_STEP = 2.0**-40


@torch.no_grad()
def best_mixture(logits: Tensor, labels: Tensor, *, tolerance: float = 1e-4) -> Tensor:
    """Weights a on the simplex that minimise ``CE(sum_i a_i logits_i, labels)``, batch mean.

    A convex problem in M numbers, solved in float64 by Newton steps along the central path of a
    logarithmic barrier, until ``max_i gradient . (a - e_i)``, which bounds the distance to the
    minimum, is at most the tolerance.

    Args:
        logits: [M, B, C].
        labels: [B].
        tolerance: largest excess over the least cross entropy, in nats.

    Returns:
        [M], not negative, sum one, in float64 and without gradient. Each Newton step waits for the
        device.
    """
    # With the true class at 0 the cross entropy is the log-sum-exp alone.
    margins = relative_to_label(logits.double(), labels)
    count, batch = margins.shape[:2]
    weights = margins.new_full((count,), 1 / count)
    barrier: float | None = None
    for _ in range(_MAX_STEPS):
        p = torch.softmax(torch.tensordot(weights, margins, 1), dim=-1)  # [B, C]
        means = (p * margins).sum(-1)  # [M, B]
        gradient = means.mean(1)
        gap = float(weights @ gradient - gradient.min())
        # Not "<=": logits that are not finite end the search as well.
        if not gap > tolerance:
            break
        barrier = gap / count if barrier is None else barrier
        second = torch.einsum("bc,mbc,kbc->mk", p, margins, margins)
        hessian = (second - means @ means.T) / batch
        # In units of the weights themselves, which keeps the system well conditioned at the edge.
        slope = weights * gradient - barrier
        curvature = weights[:, None] * hessian * weights
        curvature.diagonal().add_(barrier)
        toward, along = torch.linalg.solve(curvature, torch.stack((slope, weights), 1)).unbind(1)
        direction = (weights @ toward) / (weights @ along) * along - toward
        descent = float(slope @ direction)
        weights = _step(weights, direction, descent, barrier, margins)
        if -descent <= barrier:
            barrier *= _SHRINK
    return weights


def relative_to_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Every network's logits [M, B, C] less the one of the true class."""
    index = labels[None, :, None].expand(len(logits), -1, 1)
    return logits - logits.gather(2, index)


def _step(
    weights: Tensor, direction: Tensor, descent: float, barrier: float, margins: Tensor
) -> Tensor:
    """The weights after a step that lowers the barrier objective enough (Armijo)."""

    def objective(w: Tensor) -> float:
        cross_entropy = torch.tensordot(w, margins, 1).logsumexp(-1).mean()
        return float(cross_entropy - barrier * w.log().sum())

    # Weights are to stay above zero.
    size = min(1.0, 0.99 / max(-float(direction.min()), 1e-300))
    before = objective(weights)
    while size > _SMALLEST_STEP:
        after = weights * (1 + size * direction)
        if objective(after) <= before + 0.25 * size * descent:
            return after / after.sum()
        size /= 2
    return weights
