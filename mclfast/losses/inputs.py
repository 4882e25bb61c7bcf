"""What a loss does with its embeddings and temperatures before an operator gets them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from mclfast._base.checks import check_temperature, describe
from mclfast._base.tensors import unit_norm, wide
from mclfast._base.transforms import has_values, in_forward_mode, takes_plain_form, under_transform
from mclfast.losses.results import Temperature
from mclfast.ops import backends

_checking: ContextVar[bool] = ContextVar(
    "checking", default=os.environ.get("MCLFAST_CHECK_INPUTS", "0") not in ("", "0")
)
# How far a norm may be from 1: rounding of all values in one direction, in each dtype.
_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 3e-2, torch.float32: 1e-3, torch.float64: 1e-3}


@contextmanager
def check_inputs(enabled: bool = True) -> Iterator[None]:
    """Makes the losses in the block refuse embeddings that are not finite or have no unit norm.

    A loss takes its embeddings as they are, and for embeddings of another norm it is a number
    without meaning. The check waits for the device, so it is for finding a fault and not for every
    step; ``MCLFAST_CHECK_INPUTS=1`` in the environment turns it on everywhere. Calls in a compiled
    graph and under a transform of ``torch.func`` are not checked.

    Args:
        enabled: False for a block without the check.

    Raises:
        ValueError: by a loss in the block, naming the argument, the row and its norm.

    Examples:
        >>> import torch
        >>> from mclfast import check_inputs, supcon_loss, unit_norm
        >>> _ = torch.manual_seed(0)
        >>> features, labels = torch.randn(8, 16), torch.arange(8) % 4
        >>> with check_inputs():
        ...     loss = supcon_loss(unit_norm(features), labels)
        ...     supcon_loss(torch.full((8, 16), 2.0), labels)
        Traceback (most recent call last):
        ...
        ValueError: embeddings: expected rows of norm 1, got norm 8 in row 0; normalize=True ...
    """
    token = _checking.set(enabled)
    try:
        yield
    finally:
        _checking.reset(token)


def prepared(argument: str, embeddings: Tensor, normalize: bool) -> Tensor:
    """Embeddings of unit norm: divided by their norm, or checked if that is asked for.

    Args:
        argument: name of the argument in the message.
        embeddings: [..., D].
        normalize: whether to divide by the norm.
    """
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize: expected True or False, got {describe(normalize)}")
    if normalize:
        # The square of a large value is infinite; a constant divisor changes no direction.
        wide_values = wide(embeddings)
        largest = wide_values.detach().abs().amax(-1, keepdim=True).clamp_min(1.0)
        return unit_norm(wide_values / largest)
    if not torch.compiler.is_compiling() and _checking.get() and not under_transform():
        _check_unit_norm(argument, embeddings)
    return embeddings


def _check_unit_norm(argument: str, embeddings: Tensor) -> None:
    if not has_values(embeddings) and not embeddings.is_cuda:
        return
    norms = wide(embeddings.detach()).norm(dim=-1)
    wrong = ~((norms - 1).abs() <= _TOLERANCE[embeddings.dtype])
    if not wrong.any():
        return
    first = wrong.nonzero()[0].tolist()
    norm = float(norms[tuple(first)])
    row = str(first[0]) if len(first) == 1 else str(first)
    raise ValueError(
        f"{argument}: expected rows of norm 1, got norm {norm:.6g} in row {row}; normalize=True "
        "divides by the norm"
    )


def choose(
    backend: str, temperature: Any, kl_temperature: Any, *tensors: Tensor, banks: bool = False
) -> tuple[str, Temperature, Temperature]:
    """The backend, and both temperatures after their checks.

    The operators take the ``kl_temperature`` as a number. One whose value cannot be read, or whose
    gradient is asked for, goes to the plain form, and so do derivatives that no operator has.

    Args:
        backend: argument of the loss.
        temperature, kl_temperature: arguments of the loss.
        tensors: embeddings first; their device and dtypes rule out backends.
        banks: whether the loss is a memory-bank loss.

    Raises:
        TypeError, ValueError: a temperature does not fit, or the backend asked for takes no tensor
            as ``kl_temperature``.
        RuntimeError: the backend asked for is not available here.
    """
    temperature = check_temperature("temperature", temperature)
    kl_temperature = check_temperature("kl_temperature", kl_temperature)
    found = backends.resolve_for(backend, *tensors, banks=banks)
    if found == "reference":
        return found, temperature, kl_temperature
    automatic = backend == "auto" and backends.chosen() == "auto"
    if isinstance(kl_temperature, Tensor):
        if has_values(kl_temperature) and not _may_want_gradient(kl_temperature):
            kl_temperature = float(kl_temperature.detach())
        elif automatic:
            return "reference", temperature, kl_temperature
        else:
            raise ValueError(
                f"kl_temperature: expected a number for backend {found!r}, got "
                f"{describe(kl_temperature)}; backend='auto' takes the plain form"
            )
    # A transform inside a compiled function is traced through plain operators only.
    if automatic and (takes_plain_form() or torch.compiler.is_compiling() and under_transform()):
        return "reference", temperature, kl_temperature
    return found, temperature, kl_temperature


def _may_want_gradient(x: Tensor) -> bool:
    return x.requires_grad or in_forward_mode()


def absorbed(embeddings: Tensor, temperature: Temperature, factors: int) -> tuple[Tensor, float]:
    """Embeddings and a number that give the logits of other embeddings and a tensor.

    The operators take a number as temperature. A tensor is multiplied into the embeddings, which
    gives it its derivatives. So is a number in a compiled graph, which would be compiled again for
    every new number.

    Args:
        embeddings: [..., D].
        temperature: divisor of the logits.
        factors: how often the embeddings are a factor of a logit: 2 where it is the product of two
            of them, 1 where the other factor is not one of them.

    Returns:
        The embeddings, and 1.0 as the temperature that is left.
    """
    scale: Temperature
    if isinstance(temperature, Tensor):
        scale = temperature.to(embeddings.device, wide(embeddings).dtype)
    elif torch.compiler.is_compiling():
        scale = temperature
    else:
        return embeddings, float(temperature)
    return wide(embeddings) * scale ** (-1.0 / factors), 1.0
