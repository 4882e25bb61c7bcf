"""Numbers that are not finite: found at the step that makes them, and named.

A step is bad if its loss, or a gradient that it is about to use, is infinite or NaN. Outputs that
take no part in the loss may be anything; they only help to say where the bad number came from.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mclfast._base.random import rng_state, set_rng_state
from mclfast.cohort.outputs import Batch, PeerOutputs

_KINDS = ("finite", "nan", "inf")


class Named(NamedTuple):
    """A tensor of a step under the name that an error gives it.

    Attributes:
        name: what the tensor is, such as "logits of stage 2 of peer 0".
        tensor: its values; None for a tensor that is not there.
        peer: number of the peer that it belongs to; None for a tensor of all.
        term: name of the loss term that it is; None for other tensors.
        decides: whether it makes the step bad.
    """

    name: str
    tensor: Tensor | None
    peer: int | None = None
    term: str | None = None
    decides: bool = False


@dataclass(frozen=True)
class Finding:
    """Which step was bad, and the first number in it that is not finite.

    Attributes:
        step: number of the step, counted from 0 over the whole run.
        epoch: number of its epoch, from 0.
        kind: "nan" or "inf".
        first: name of the first such tensor, in the order in which a step computes them.
        peer: number of the peer that the tensor belongs to; None if it belongs to no single one.
        term: name of the first loss term that is not finite; None if all are finite.
    """

    step: int
    epoch: int
    kind: str
    first: str
    peer: int | None = None
    term: str | None = None

    def __str__(self) -> str:
        where = f"{self.kind} in {self.first}"
        if self.term is not None and self.first != f"term {self.term}":
            where += f", then in term {self.term}"
        return f"step {self.step} (epoch {self.epoch + 1}): {where}"


class NonFiniteError(FloatingPointError):
    """A step made numbers that are not finite.

    Args:
        finding: which step, and the first such number.
        images: images of the step, or views of them; None if a step has been made since, so that
            no memory is held for them.
        batch: the step's batch.
        before_update: whether parameters, buffers and generators are those from before the step.
        advice: what a user can do, added to the text.
    """

    def __init__(
        self,
        finding: Finding,
        images: Tensor | list[Tensor] | None,
        batch: Batch,
        *,
        before_update: bool,
        advice: str = "",
    ) -> None:
        super().__init__(
            f"non_finite: expected finite numbers, got {finding}; try a smaller learning rate, "
            f"clip_grad_norm, or non_finite skip or rollback{advice}"
        )
        self.finding = finding
        self.images, self.batch = images, batch
        self.before_update = before_update
        self._advice = advice

    def with_advice(self, advice: str) -> NonFiniteError:
        """The same error with more advice at its end."""
        return NonFiniteError(
            self.finding,
            self.images,
            self.batch,
            before_update=self.before_update,
            advice=self._advice + advice,
        )


class Watch:
    """Looks at every step for numbers that are not finite.

    Args:
        at_once: read the result of a look there and then, which waits for a GPU. If not, it is
            read when the next step is looked at, by when the device has long had it, and the
            update of the bad step has been made.
    """

    def __init__(self, *, at_once: bool) -> None:
        self.at_once = at_once
        self._pending: list[_Look] = []

    def look(
        self,
        deciding: Sequence[Named],
        others: Callable[[], list[Named]],
        images: Tensor | list[Tensor],
        batch: Batch,
        *,
        before_update: bool = True,
    ) -> None:
        """Looks at a step.

        Args:
            deciding: loss and gradients, in the order in which they are computed.
            others: gives what is computed before them, in that order.
            images, batch: arguments of the step.
            before_update: whether the caller can still go back to the state before the step.

        Raises:
            NonFiniteError: this step is bad, or, unless ``at_once``, an earlier one was.
        """
        if self.at_once:
            if _plainly_finite(deciding):
                return
            look = _Look.at(deciding, images, batch, before_update)
            if look.bad():
                look = _Look.at([*others(), *deciding], images, batch, before_update)
                raise look.error()
            return
        earlier = [look for look in self._pending if look.batch.step < batch.step]
        self._pending = [look for look in self._pending if look.batch.step >= batch.step]
        self._pending.append(_Look.at([*others(), *deciding], None, batch, False))
        for look in earlier:
            look.raise_if_bad()

    def read(self) -> None:
        """Reads what was not read yet; waits for the device.

        Raises:
            NonFiniteError: the last step was bad.
        """
        pending, self._pending = self._pending, []
        for look in pending:
            look.raise_if_bad()

    def forget(self) -> None:
        """Drops what was not read yet, as another state has taken the place of what it saw."""
        self._pending = []


class Blind(Watch):
    """Looks at nothing, for steps whose tensors have no values."""

    def __init__(self) -> None:
        super().__init__(at_once=False)

    def look(self, *_: object, **__: object) -> None:
        """Does nothing."""


@dataclass(frozen=True)
class _Look:
    """One look at a step: the kind of number in each tensor, possibly still on its way.

    Attributes:
        named: the tensors by place in the order of computation, without their values.
        kinds: index into ``_KINDS`` for each of them, int8, in host memory.
        ready: recorded on the device after the copy to host memory; None if it is there.
    """

    named: list[tuple[int, Named]]
    kinds: Tensor
    ready: torch.cuda.Event | None
    images: Tensor | list[Tensor] | None
    batch: Batch
    before_update: bool

    @classmethod
    def at(
        cls,
        named: Sequence[Named],
        images: Tensor | list[Tensor] | None,
        batch: Batch,
        before_update: bool,
    ) -> _Look:
        kinds, places = _kinds(named)
        names = [(place, named[place]._replace(tensor=None)) for place in places]
        ready = None
        if kinds.is_cuda:
            host = torch.empty(kinds.shape, dtype=kinds.dtype, pin_memory=True)
            host.copy_(kinds, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(kinds.device))
            kinds = host
        return cls(names, kinds, ready, images, batch, before_update)

    def _read(self) -> list[tuple[Named, int]]:
        if self.ready is not None:
            self.ready.synchronize()
        pairs = zip(self.named, self.kinds.numpy().tolist(), strict=True)
        return [(named, kind) for (_, named), kind in sorted(pairs, key=lambda pair: pair[0][0])]

    def bad(self) -> bool:
        return any(kind for named, kind in self._read() if named.decides)

    def raise_if_bad(self) -> None:
        if self.bad():
            raise self.error()

    def error(self) -> NonFiniteError:
        found = [(named, kind) for named, kind in self._read() if kind]
        first, kind = found[0]
        term = next((named.term for named, _ in found if named.term is not None), None)
        finding = Finding(
            self.batch.step, self.batch.epoch, _KINDS[kind], first.name, first.peer, term
        )
        return NonFiniteError(finding, self.images, self.batch, before_update=self.before_update)


def _kinds(named: Sequence[Named]) -> tuple[Tensor, list[int]]:
    """The kind of number in each tensor that has any, int8 on its device, and which these are.

    The largest absolute value of a tensor is read, which no finite tensor can make infinite.
    """
    places, parts = [], []
    for members, values in _by_dtype(named):
        largest = torch.stack(torch._foreach_norm(values, torch.inf))
        parts.append(largest.isnan().to(torch.int8) + 2 * largest.isinf().to(torch.int8))
        places += members
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int8), places


def _plainly_finite(named: Sequence[Named]) -> bool:
    """Whether the norms of all tensors are finite, which those of finite tensors may not be.

    On a CPU they take a tenth of the time of the largest values.
    """
    norms = [torch.stack(torch._foreach_norm(values, 2)) for _, values in _by_dtype(named)]
    return all(bool(one.isfinite().all()) for one in norms)


def _by_dtype(named: Sequence[Named]) -> list[tuple[list[int], list[Tensor]]]:
    """Places and values of the tensors that have any, those of one dtype together."""
    # Peers that wait in host memory have no gradients to look at.
    device = next((n.tensor.device for n in named if n.decides and n.tensor is not None), None)
    groups: dict[torch.dtype, tuple[list[int], list[Tensor]]] = {}
    for i, one in enumerate(named):
        tensor = one.tensor
        if tensor is not None and tensor.device == device and tensor.numel():
            places, values = groups.setdefault(tensor.dtype, ([], []))
            places.append(i)
            values.append(tensor.detach())
    return list(groups.values())


def of_images(images: Tensor | list[Tensor]) -> list[Named]:
    """The images of a step, or each view of them."""
    if isinstance(images, Tensor):
        return [Named("images", images)]
    return [Named(f"view {i} of the images", view) for i, view in enumerate(images)]


def of_parameters(kind: str, modules: Iterable[tuple[str, nn.Module]]) -> list[Named]:
    """Parameters, or their gradients, by the names that they have in the cohort and the method.

    Args:
        kind: "weight" or "gradient"; gradients decide, and come last first, as backward goes.
        modules: the cohort and the method, each with its name.
    """
    found = [
        Named(
            f"{kind} of {owner} {name}",
            parameter if kind == "weight" else parameter.grad,
            _peer_of(name) if owner == "cohort" else None,
            decides=kind == "gradient",
        )
        for owner, module in modules
        for name, parameter in module.named_parameters()
    ]
    return found if kind == "weight" else found[::-1]


@functools.cache
def _peer_of(name: str) -> int | None:
    """Number of the peer that a parameter of a cohort belongs to; the first of those sharing it."""
    match = re.match(r"(?:networks|projections)\.(\d+)\.", name)
    return int(match[1]) if match else None


def of_outputs(outputs: PeerOutputs, who: str = "peer") -> Iterator[Named]:
    """What the peers give, in the order in which it is computed.

    The last of its stages is a peer's own output, and needs no number.
    """
    for j in range(len(outputs.features)):
        given = (
            ("features", outputs.features[j]),
            ("logits", outputs.logits[j]),
            ("embeddings", outputs.embeddings[j] if outputs.embeddings else ()),
        )
        for what, stages in given:
            for s, tensor in enumerate(stages, start=1):
                stage = f" of stage {s - 1}" if s < len(stages) else ""
                yield Named(f"{what}{stage} of {who} {j}", tensor, j)
        for last_map in outputs.maps[j : j + 1]:
            yield Named(f"map of {who} {j}", last_map, j)
    if outputs.teacher is not None:
        yield from of_outputs(outputs.teacher, "teacher")


def of_terms(parts: dict[str, Tensor]) -> list[Named]:
    """The terms of the loss, and last the loss itself, which decides."""
    terms = [
        Named(f"term {name}", value, term=name) for name, value in parts.items() if name != "loss"
    ]
    return [*terms, Named("the loss", parts["loss"], decides=True)]


class Before:
    """What a forward run changes, as it was before: buffers and random generators.

    Banks are left out: they change after the update of a step only, and may be large.

    Args:
        whole: modules all of whose buffers are kept.
        norms_only: modules of which the statistics of normalisations are kept.
    """

    def __init__(self, whole: Iterable[nn.Module], norms_only: Iterable[nn.Module]) -> None:
        buffers = [buffer for module in whole for buffer in module.buffers()]
        buffers += [
            buffer
            for module in norms_only
            for part in module.modules()
            if isinstance(part, nn.modules.batchnorm._NormBase)
            for buffer in part.buffers(recurse=False)
        ]
        self._buffers = [(buffer, buffer.clone()) for buffer in buffers]
        self._random = rng_state()

    @torch.no_grad()
    def restore(self) -> None:
        """Brings all of it back, in the same memory."""
        for buffer, value in self._buffers:
            buffer.copy_(value)
        set_rng_state(self._random)
