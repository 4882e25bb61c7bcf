"""Search for the convex combination of several networks' logits with the least cross entropy."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest number of Newton steps; a search on a GPU always takes all of them.
_STEPS = 60
# Factor on the weight of the barrier once the search has come close to its path.
_SHRINK = 0.1
# Number of lengths tried in a Newton step: 1, 1/2, 1/4, ...
_LENGTHS = 16


@torch.no_grad()
def best_mixture(logits: Tensor, labels: Tensor, *, tolerance: float = 1e-4) -> Tensor:
    """Weights a on the simplex that minimise ``CE(sum_i a_i logits_i, labels)``, batch mean.

    A convex problem in M numbers, solved in float64 by Newton steps along the central path of a
    logarithmic barrier, until ``max_i gradient . (a - e_i)``, which bounds the distance to the
    minimum, is at most the tolerance. The host waits for none of its numbers.

    Args:
        logits: logits [M, B, C] of the networks.
        labels: class of each sample, [B].
        tolerance: largest excess over the least cross entropy, in nats.

    Returns:
        Weights [M] >= 0 with sum one, in float64 and without gradient.
    """
    # With the true class at 0 the cross entropy is the log-sum-exp alone.
    margins = relative_to_label(logits.double(), labels)
    count, batch = margins.shape[:2]
    weights = margins.new_full((count,), 1 / count)
    barrier = margins.new_zeros(())
    for step in range(_STEPS):
        p = torch.softmax(torch.tensordot(weights, margins, 1), dim=-1)  # [B, C]
        means = (p * margins).sum(-1)  # [M, B]
        gradient = means.mean(1)
        gap = weights @ gradient - gradient.min()
        # Logits that are not finite end the search as well.
        searching = gap > tolerance
        if known_to_be_over(searching):
            break
        if step == 0:
            barrier = gap / count
        second = torch.einsum("bc,mbc,kbc->mk", p, margins, margins)
        hessian = (second - means @ means.T) / batch
        # Directions are relative to the weights, which keeps the system well conditioned at the
        # edge of the simplex.
        slope = weights * gradient - barrier
        curvature = weights[:, None] * hessian * weights
        curvature.diagonal().add_(barrier)
        # solve() would ask the device whether it succeeded.
        solved, _ = torch.linalg.solve_ex(curvature, torch.stack((slope, weights), 1))
        toward, along = solved.unbind(1)
        direction = (weights @ toward) / (weights @ along) * along - toward
        descent = slope @ direction
        after = _step(weights, direction, descent, barrier, margins)
        weights = torch.where(searching, after, weights)
        barrier = torch.where(-descent <= barrier, barrier * _SHRINK, barrier)
    return weights


def relative_to_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Every network's logits [M, B, C] less the logit of the true class."""
    index = labels[None, :, None].expand(len(logits), -1, 1)
    return logits - logits.gather(2, index)


def known_to_be_over(searching: Tensor) -> bool:
    """Whether a search can end early; always False on a GPU, where to ask would mean to wait."""
    return searching.device.type == "cpu" and not bool(searching)


def _step(
    weights: Tensor, direction: Tensor, descent: Tensor, barrier: Tensor, margins: Tensor
) -> Tensor:
    """The weights after the longest step tried that lowers the objective enough (Armijo)."""

    def objectives(w: Tensor) -> Tensor:
        """Objective [S] of weights [S, M]."""
        cross_entropy = torch.tensordot(w, margins, 1).logsumexp(-1).mean(-1)
        return cross_entropy - barrier * w.log().sum(-1)

    # The longest step keeps all weights above zero.
    longest = (0.99 / (-direction.min()).clamp_min(1e-300)).clamp_max(1.0)
    powers = torch.arange(_LENGTHS, device=weights.device, dtype=weights.dtype)
    lengths = torch.cat((longest * 0.5**powers, powers.new_zeros(1)))  # the last is no step at all
    tried = weights * (1 + lengths[:, None] * direction)
    found = objectives(tried)
    enough = found <= found[-1] + 0.25 * lengths * descent
    # The longest step that lowers it enough: argmax takes the first of equal values.
    chosen = tried.index_select(0, enough.int().argmax().reshape(1)).squeeze(0)
    return chosen / chosen.sum()
