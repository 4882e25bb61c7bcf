"""Argument checks: each raises one line with the argument, what was expected and what came."""

from __future__ import annotations

import difflib
import numbers
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mclfast._base.transforms import has_values, in_forward_mode, under_transform

# Sizes in a graph of torch.compile or torch.export may stand for any number.
_INTEGERS = (int, torch.SymInt)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe(value: Any) -> str:
    """A short description of a wrong value for an error message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    if isinstance(value, (str, int, float, bool, type(None))):
        return repr(value)
    return type(value).__name__


def shortened(text: str, limit: int) -> str:
    """``text``, cut to ``limit`` characters with an ellipsis."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def unknown_name(argument: str, got: object, known: Iterable[str]) -> ValueError:
    """The error for a name that is not in a registry, with the closest known name."""
    names = sorted(known)
    close = difflib.get_close_matches(str(got).lower(), names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    # After a typing error the closest name helps, and a long list does not.
    expected = "a known name" if close and len(names) > 12 else f"one of {', '.join(names)}"
    return ValueError(f"{argument}: expected {expected}; got {shortened(repr(got), 200)}{hint}")


def _check_number(argument: str, value: float, kind: str, wanted: str, fits: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{argument}: expected a number {wanted}, got {describe(value)}")
    if not fits:
        raise ValueError(f"{argument}: expected {kind} {wanted}, got {value!r}")
    return value if torch.compiler.is_compiling() else float(value)


def _is_between(value: Any, least: float, most: float) -> bool:
    """Whether a value is a number in [least, most]; the type has a check of its own."""
    return isinstance(value, numbers.Real) and least <= value <= most  # type: ignore[operator]


def check_positive(argument: str, value: float) -> float:
    """Accepts a finite number above zero."""
    fits = _is_between(value, 0, sys.float_info.max) and value != 0
    return _check_number(argument, value, "a finite number", "> 0", fits)


def check_not_negative(argument: str, value: float) -> float:
    """Accepts a finite number, zero or above."""
    fits = _is_between(value, 0, sys.float_info.max)
    return _check_number(argument, value, "a finite number", ">= 0", fits)


def check_temperature(argument: str, value: Any) -> float | Tensor:
    """Accepts a divisor of similarities or logits that keeps them within the range of float32.

    It is a number or a 0-dim tensor, whose value is looked at where that waits for no device.
    """
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.is_floating_point():
            raise ValueError(
                f"{argument}: expected a number or a 0-dim floating-point tensor in [1e-6, 1e6], "
                f"got {describe(value)}"
            )
        if not has_values(value):
            return value
        number = float(value.detach())
        if not _is_between(number, 1e-6, 1e6):
            raise ValueError(f"{argument}: expected a number in [1e-6, 1e6], got {number!r}")
        return value
    fits = _is_between(value, 1e-6, 1e6)
    return _check_number(argument, value, "a number", "in [1e-6, 1e6]", fits)


# A number in a file from elsewhere would otherwise decide how much memory is asked for.
_MOST_WIDTH, _MOST_KEYS = 2**16, 2**24


def check_width(argument: str, value: Any) -> int:
    """Accepts an integer width of an embedding or a layer, in [1, 65536]."""
    return _check_at_most(argument, check_integer(argument, value, 1), _MOST_WIDTH)


def check_keys(argument: str, value: Any) -> int:
    """Accepts a number of keys that an anchor is compared with, in [1, 2**24]."""
    return _check_at_most(argument, check_integer(argument, value, 1), _MOST_KEYS)


def _check_at_most(argument: str, value: int, most: int) -> int:
    if value > most:
        raise ValueError(f"{argument}: expected an integer <= {most}, got {value}")
    return value


def check_integer(argument: str, value: Any, least: int) -> int:
    """Accepts an integer that is not below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{argument}: expected an integer >= {least}, got {describe(value)}")
    return value


def check_embeddings(argument: str, value: Any, shape: Sequence[int | str]) -> Tensor:
    """Accepts a floating-point tensor of a shape in which letters stand for any size >= 1."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a tensor {_letters(shape)}, got {describe(value)}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{argument}: expected a float16, bfloat16, float32 or float64 tensor, "
            f"got {describe(value)}"
        )
    if not _has_shape(value, shape):
        raise ValueError(f"{argument}: expected shape {_letters(shape)}, got {list(value.shape)}")
    return value


def _letters(shape: Sequence[int | str]) -> str:
    """A shape in words. It is written for errors only: sizes in a graph have no text."""
    return "[" + ", ".join(map(str, shape)) + "]"


def _has_shape(value: Tensor, shape: Sequence[int | str]) -> bool:
    return value.dim() == len(shape) and all(
        size >= 1 if isinstance(want, str) else size == want
        for size, want in zip(value.shape, shape, strict=True)
    )


def check_stages(
    argument: str, value: Any, widths: Sequence[Sequence[int | str]]
) -> list[list[Tensor]]:
    """Accepts networks of stages of [B, width] tensors, with one B for all of them."""
    try:
        networks = [list(stages) for stages in value]
    except TypeError:
        raise TypeError(
            f"{argument}: expected networks of stages of [B, D] tensors, got {describe(value)}"
        ) from None
    got, want = [len(stages) for stages in networks], [len(stages) for stages in widths]
    if got != want:
        raise ValueError(f"{argument}: expected {want} stages per network, got {got}")
    batch: int | str = "B"
    for m, stages in enumerate(networks):
        for k, stage in enumerate(stages):
            check_embeddings(f"{argument}[{m}][{k}]", stage, [batch, widths[m][k]])
            batch = stage.shape[0]
    return networks


def check_same(argument: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Accepts a tensor with the device and dtype of another argument."""
    for attribute in ("device", "dtype"):
        got, want = getattr(value, attribute), getattr(like, attribute)
        if got != want:
            raise ValueError(
                f"{argument}: expected {attribute} {want} as {like_name} has, got {got}"
            )


def check_labels(labels: Any, batch: int, device: torch.device) -> Tensor:
    """Accepts integer class labels [B] on the embeddings' device."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected an integer tensor [{batch}], got {describe(labels)}")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected an integer tensor [{batch}], got {describe(labels)}")
    if labels.shape != (batch,):
        raise ValueError(f"labels: expected shape [{batch}], got {list(labels.shape)}")
    if labels.device != device:
        raise ValueError(f"labels: expected device {device} as embeddings has, got {labels.device}")
    return labels


def stack_nodes(embeddings: Any, *, stages: bool) -> tuple[Tensor, tuple[int, ...]]:
    """Brings a public ``embeddings`` argument into one tensor, network-major.

    Args:
        embeddings: a tensor [M, B, D], or one [B, D] for each network; with ``stages``, a tensor
            [M, L, B, D], or a list of [B, D] for each network.
        stages: whether a network has an embedding for each of its stages, or a single one.

    Returns:
        ([N, B, D], the number of nodes of each network)
    """
    if isinstance(embeddings, Tensor):
        letters = ["M", "L", "B", "D"] if stages else ["M", "B", "D"]
        check_embeddings("embeddings", embeddings, letters)
        per_network = embeddings.shape[1] if stages else 1
        flat = embeddings.flatten(0, 1) if stages else embeddings
        return flat, (per_network,) * embeddings.shape[0]

    kind = "networks of stages of [B, D] tensors" if stages else "[B, D] tensors, one per network"
    if not isinstance(embeddings, (list, tuple)) or not embeddings:
        raise TypeError(
            f"embeddings: expected a tensor or a sequence of {kind}, got {describe(embeddings)}"
            + (" of length 0" if isinstance(embeddings, (list, tuple)) else "")
        )
    nodes: list[Tensor] = []
    counts: list[int] = []
    for m, network in enumerate(embeddings):
        if stages and (not isinstance(network, (list, tuple)) or not network):
            raise TypeError(
                f"embeddings[{m}]: expected a non-empty sequence of [B, D] tensors, one per "
                f"stage, got {describe(network)}"
            )
        for k, node in enumerate(network if stages else [network]):
            name = f"embeddings[{m}][{k}]" if stages else f"embeddings[{m}]"
            check_embeddings(name, node, list(nodes[0].shape) if nodes else ["B", "D"])
            if nodes:
                check_same(name, node, "the first node", nodes[0])
            nodes.append(node)
        counts.append(len(network) if stages else 1)
    return torch.stack(nodes), tuple(counts)


def check_rows(row_start: int, row_count: int | None, batch: int) -> tuple[int, int]:
    """Accepts a slice of the anchors that lies inside the batch; returns its start and length."""
    if not isinstance(row_start, _INTEGERS) or not 0 <= row_start < batch:
        raise ValueError(f"row_start: expected an integer in [0, {batch}), got {row_start!r}")
    count = batch - row_start if row_count is None else row_count
    if not isinstance(count, _INTEGERS) or not 1 <= count <= batch - row_start:
        raise ValueError(
            f"row_count: expected an integer in [1, {batch - row_start}], got {row_count!r}"
        )
    return row_start, count


def check_pair_weights(weights: Any, nodes: Tensor) -> Tensor | None:
    """Accepts pair weights [N, N, B] on the embeddings' device, or None."""
    if weights is None:
        return None
    count, batch = nodes.shape[:2]
    check_embeddings("pair_weights", weights, [count, count, batch])
    if weights.device != nodes.device:
        raise ValueError(
            f"pair_weights: expected device {nodes.device} as embeddings has, got {weights.device}"
        )
    return weights


def check_banks(banks: Any, nodes: Tensor, networks: int) -> Tensor:
    """Accepts memory banks [M, n, D], one per network, that the embeddings' device can read."""
    check_embeddings("banks", banks, [networks, "n", nodes.shape[-1]])
    if not banks.is_contiguous():
        raise ValueError(f"banks: expected a contiguous tensor, got strides {banks.stride()}")
    if banks.requires_grad:
        raise ValueError(
            "banks: expected a tensor without requires_grad, got one with it; banks are constants"
        )
    # A GPU reads pinned host memory in place.
    if banks.device != nodes.device and not (nodes.is_cuda and banks.is_pinned()):
        raise ValueError(
            f"banks: expected device {nodes.device} as embeddings has, or pinned host memory for "
            f"embeddings on a GPU, got {banks.device}"
        )
    return banks


def check_indices(
    argument: str, value: Any, shape: Sequence[int | str], device: torch.device
) -> Tensor:
    """Accepts sample numbers, int64, of a shape in which letters stand for any size >= 1."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        wanted = _letters(shape)
        raise TypeError(f"{argument}: expected an int64 tensor {wanted}, got {describe(value)}")
    if not _has_shape(value, shape):
        raise ValueError(f"{argument}: expected shape {_letters(shape)}, got {list(value.shape)}")
    if value.device != device:
        raise ValueError(
            f"{argument}: expected device {device} as embeddings has, got {value.device}"
        )
    return value


def check_range(argument: str, index: Tensor, samples: int) -> None:
    """Accepts sample numbers in [0, samples): plain indexing would take -1 for the last sample.

    Numbers are not checked where Python cannot look at them without waiting: on a GPU, in a
    compiled graph and under a transform of ``torch.func``.
    """
    if not has_values(index):
        return
    low, high = (int(x) for x in index.aminmax())
    if low < 0 or high >= samples:
        got = low if low < 0 else high
        raise RuntimeError(f"{argument} must be in 0 .. {samples - 1}, got {got}")


def check_weights(weights: Any) -> tuple[float | Tensor, ...]:
    """Accepts the weights of vcl, soft_vcl, icl and soft_icl, as numbers or 0-dim tensors.

    Args:
        weights: four numbers, four 0-dim tensors or a mixture of both, or one tensor [4].

    Raises:
        TypeError: the weights are no sequence, or an entry is neither a number nor a tensor.
        ValueError: there are not four, or a tensor has another shape or no floating-point dtype.
    """
    if isinstance(weights, Tensor):
        if weights.shape != (4,):
            raise ValueError(f"weights: expected shape [4], got {list(weights.shape)}")
        weights = weights.unbind()
    elif not isinstance(weights, Sequence) or isinstance(weights, str):
        raise TypeError(
            f"weights: expected 4 (vcl, soft_vcl, icl, soft_icl), got {describe(weights)}"
        )
    if len(weights) != 4:
        raise ValueError(f"weights: expected 4 (vcl, soft_vcl, icl, soft_icl), got {len(weights)}")
    return tuple(_check_weight(f"weights[{i}]", weight) for i, weight in enumerate(weights))


def _check_weight(name: str, weight: Any) -> float | Tensor:
    if isinstance(weight, Tensor):
        if weight.dim() != 0 or not weight.is_floating_point():
            raise ValueError(
                f"{name}: expected a 0-dim floating-point tensor, got {describe(weight)}"
            )
        return weight
    if isinstance(weight, bool) or not isinstance(weight, (int, float, numbers.Real)):
        raise TypeError(f"{name}: expected a number or a 0-dim tensor, got {describe(weight)}")
    return float(weight)


def wants_gradient(*values: object) -> bool:
    """Whether a derivative for one of the values may be asked for; they may be numbers or None.

    Under a transform of ``torch.func``, which may be a batch of calls too, and where forward-mode
    derivatives are taken, every tensor may be differentiated.
    """
    tensors = [value for value in values if isinstance(value, Tensor)]
    if tensors and (under_transform() or in_forward_mode()):
        return True
    return torch.is_grad_enabled() and any(value.requires_grad for value in tensors)
