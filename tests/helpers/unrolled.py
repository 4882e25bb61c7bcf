"""The bilevel gradient by autograd through unrolled steps."""

from __future__ import annotations

import torch


def unrolled(params, hyper, inner, outer, inner_steps, outer_steps, lr, momentum, weight_decay):
    """The same gradient with the whole graph kept."""
    theta = {k: v.clone().requires_grad_() for k, v in params.items()}
    velocity = {k: torch.zeros_like(v) for k, v in theta.items()}
    for objective in [inner] * inner_steps + [outer] * outer_steps:
        grads = torch.autograd.grad(
            objective(theta), list(theta.values()), create_graph=True, allow_unused=True
        )
        for (name, t), grad in zip(theta.items(), grads, strict=True):
            grad = torch.zeros_like(t) if grad is None else grad
            velocity[name] = momentum * velocity[name] + grad + weight_decay * t
        theta = {k: t - lr * velocity[k] for k, t in theta.items()}
    loss = outer(theta)
    return loss, torch.autograd.grad(loss, hyper)
