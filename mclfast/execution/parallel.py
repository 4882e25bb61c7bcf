"""Ways to run the peers of a cohort in training: one after another, stacked, or on CUDA streams.

A network of small images leaves most of a GPU idle. Equal networks can then run as one, with their
parameters stacked (each convolution becomes a grouped one), or all at once on streams of their own.
Parameters, buffers and gradients stay those of the separate networks in every way of running them.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from mclfast._base.checks import shortened
from mclfast._base.modules import buffers_kept
from mclfast.cohort.outputs import RunPeers
from mclfast.models.auxiliary import PeerNetwork, StageOutputs

Way = Literal["off", "auto", "stack", "streams"]

# Timed calls of each way in "auto", after one that is not timed.
_TRIALS = 3


def separate(peers: Sequence[PeerNetwork], views: Sequence[Tensor]) -> list[StageOutputs]:
    """One network after another."""
    return [peer(view) for peer, view in zip(peers, views, strict=True)]


def way_to_run(
    way: Way, peers: Sequence[PeerNetwork], device: torch.device, *, report: Callable[[str], None]
) -> RunPeers | None:
    """A way to run peers, by name.

    Args:
        way: "off": one after another; "stack": equal networks as one; "streams": each on a CUDA
            stream of its own; "auto": each way is timed on the first training batch, and the
            fastest of those that work is kept.
        peers: the networks that will run; they share no modules.
        device: the device that their parameters lie on.
        report: called with a sentence about the choice of "auto".

    Raises:
        ValueError: "stack" without two equal networks, "streams" without a CUDA device.
    """
    groups = equal_groups(peers)
    equal = any(len(group) > 1 for group in groups)
    on_gpu = device.type == "cuda"
    if way == "stack" and not equal:
        raise ValueError(
            "peers_parallel: expected at least two equal networks for stack, got "
            f"{len(peers)} that all differ"
        )
    if way == "streams" and not on_gpu:
        raise ValueError(f"peers_parallel: expected a CUDA device for streams, got {device.type}")
    stack = functools.partial(stacked, groups=groups)
    ways: dict[str, RunPeers] = {"off": separate, "stack": stack, "streams": on_streams}
    if way == "off":
        return None
    if way != "auto":
        return ways[way]
    works = {"off": True, "stack": equal, "streams": on_gpu}
    return _Fastest({name: run for name, run in ways.items() if works[name]}, report)


def stacked(
    peers: Sequence[PeerNetwork],
    views: Sequence[Tensor],
    groups: Sequence[Sequence[int]] | None = None,
) -> list[StageOutputs]:
    """Equal networks as one of stacked parameters; the others by themselves.

    Dropout draws other numbers than in separate networks, from the same distribution.

    Args:
        peers: the networks.
        views: images [B, C, H, W] of each.
        groups: numbers of the networks that are equal; None to find out.
    """
    outputs: dict[int, StageOutputs] = {}
    for group in groups or equal_groups(peers):
        own, images = [peers[i] for i in group], [views[i] for i in group]
        results = _run_stack(own, images) if len(own) > 1 else separate(own, images)
        outputs |= zip(group, results, strict=True)
    return [outputs[i] for i in range(len(peers))]


def equal_groups(peers: Sequence[PeerNetwork]) -> list[list[int]]:
    """Numbers of the networks that are equal but for the values in them."""
    groups: dict[object, list[int]] = {}
    for i, peer in enumerate(peers):
        groups.setdefault(_structure(peer), []).append(i)
    return list(groups.values())


def _structure(peer: PeerNetwork) -> object:
    """The structure that networks must have in common to run as one."""
    modules = tuple(
        (name, _kind(m), m.training, m.extra_repr(), *_plain_values(m))
        for name, m in peer.named_modules(remove_duplicate=False)
    )
    tensors = tuple(
        (name, t.shape, t.dtype, t.device)
        for name, t in (*peer.named_parameters(), *peer.named_buffers())
    )
    return modules, tensors


def _kind(module: nn.Module) -> type:
    """The class of a module; a traced one has a class of its own, and its code as a plain value."""
    return fx.GraphModule if isinstance(module, fx.GraphModule) else type(module)


def _plain_values(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Settings of a module that it may not print."""
    for name, value in sorted(vars(module).items()):
        if isinstance(value, (bool, int, float, str, tuple)) and not name.startswith("__"):
            yield name, repr(value)


def _run_stack(peers: Sequence[PeerNetwork], views: Sequence[Tensor]) -> list[StageOutputs]:
    first = peers[0]
    # Stacked in every step: gradients flow through the stack to the networks' own parameters.
    params = _stack(peers, nn.Module.named_parameters)
    buffers = _stack(peers, nn.Module.named_buffers)
    alike = all(view is views[0] for view in views)

    def one(
        own_params: dict[str, Tensor], own_buffers: dict[str, Tensor], images: Tensor
    ) -> StageOutputs:
        result: StageOutputs = functional_call(first, (own_params, own_buffers), (images,))
        return result

    together: StageOutputs = torch.vmap(
        one, in_dims=(0, 0, None if alike else 0), randomness="different"
    )(params, buffers, views[0] if alike else torch.stack(list(views)))
    # Batch norm has updated the stacked statistics in place.
    values = {name: stack.unbind(0) for name, stack in buffers.items()}
    with torch.no_grad():
        for i, peer in enumerate(peers):
            _copy_all(dict(peer.named_buffers()), {name: own[i] for name, own in values.items()})
    return [
        StageOutputs(
            tuple(f[i] for f in together.features),
            tuple(z[i] for z in together.logits),
            together.final_map[i],
        )
        for i in range(len(peers))
    ]


def _copy_all(targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Writes values to the tensors of their names; on a GPU a kernel for each dtype."""
    for dtype in {t.dtype for t in targets.values()}:
        names = [name for name, t in targets.items() if t.dtype == dtype]
        torch._foreach_copy_([targets[n] for n in names], [values[n] for n in names])


def _stack(
    peers: Sequence[PeerNetwork], named: Callable[[nn.Module], Iterator[tuple[str, Tensor]]]
) -> dict[str, Tensor]:
    columns = zip(*(named(peer) for peer in peers), strict=True)
    return {column[0][0]: torch.stack([value for _, value in column]) for column in columns}


def on_streams(peers: Sequence[PeerNetwork], views: Sequence[Tensor]) -> list[StageOutputs]:
    """Each network on a CUDA stream of its own; autograd runs its backward pass there too."""
    device = views[0].device
    current = torch.cuda.current_stream(device)
    streams = _streams(device, len(peers))
    outputs = []
    for peer, view, stream in zip(peers, views, streams, strict=True):
        stream.wait_stream(current)
        # Memory must not be used anew on the stream it is from while another one still reads it.
        view.record_stream(stream)
        with torch.cuda.stream(stream):
            outputs.append(peer(view))
    for stream, out in zip(streams, outputs, strict=True):
        current.wait_stream(stream)
        for tensor in (*out.features, *out.logits, out.final_map):
            tensor.record_stream(current)
    return outputs


@functools.cache
def _streams(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    # Kept: the allocator holds memory for each stream.
    return tuple(torch.cuda.Stream(device) for _ in range(count))


class _Fastest:
    """The fastest of several ways, timed on the first batch that asks for gradients."""

    def __init__(self, ways: dict[str, RunPeers], report: Callable[[str], None]) -> None:
        self.ways, self.report = ways, report
        self.chosen: str | None = None

    def __call__(self, peers: Sequence[PeerNetwork], views: Sequence[Tensor]) -> list[StageOutputs]:
        if not torch.is_grad_enabled():
            return separate(peers, views)
        if self.chosen is None:
            device = views[0].device
            rng = torch.random.fork_rng([device] if device.type == "cuda" else [])
            with buffers_kept(peers), rng:
                times, failed = self._times(peers, views)
            self.chosen = min(times, key=times.__getitem__)
            found = [f"{name} {1e3 * t:.1f} ms" for name, t in times.items()]
            found += [f"{name} fails: {reason}" for name, reason in failed.items()]
            self.report(f"peers_parallel: auto chose {self.chosen} ({', '.join(found)})")
        return self.ways[self.chosen](peers, views)

    def _times(
        self, peers: Sequence[PeerNetwork], views: Sequence[Tensor]
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Seconds of forward and backward, medians of interleaved calls; what fails, and why."""
        seconds: dict[str, list[float]] = {name: [] for name in self.ways}
        failed: dict[str, str] = {}
        for trial in range(_TRIALS + 1):
            for name, way in self.ways.items():
                if name in failed:
                    continue
                try:
                    spent = _timed(way, peers, views)
                # Not all that a network may do can be stacked, nor does every way fit in memory.
                except RuntimeError as error:
                    if way is separate:
                        raise
                    failed[name] = shortened(" ".join(str(error).split()), 80)
                    continue
                if trial:
                    seconds[name].append(spent)
        times = {name: statistics.median(s) for name, s in seconds.items() if name not in failed}
        return times, failed


def _timed(way: RunPeers, peers: Sequence[PeerNetwork], views: Sequence[Tensor]) -> float:
    device = views[0].device
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    # A way must not find the casts that another one has made.
    torch.clear_autocast_cache()
    wait(device)
    begin = time.perf_counter()
    total = torch.stack([z.float().sum() for out in way(peers, views) for z in out.logits]).sum()
    wanted = [p for peer in peers for p in peer.parameters() if p.requires_grad]
    torch.autograd.grad(total, wanted, allow_unused=True)
    wait(device)
    return time.perf_counter() - begin
