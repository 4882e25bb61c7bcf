"""The ordinary step as one CUDA graph: forward, loss and backward, recorded once and replayed.

Small networks on a GPU wait for the host, which launches a thousand kernels a step. A replay
launches them all at once. A graph holds fixed things: memory, shapes and every number that the
host computed, so the loss must be the same function in every step. Clipping and SGD stay outside,
for the learning rate changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mclfast._base.modules import buffers_kept
from mclfast.cohort.outputs import Batch, PeerOutputs
from mclfast.config import TrainConfig
from mclfast.methods import Method

#: Outputs and loss parts of a batch; leaves new gradients in ``.grad``.
Gradients = Callable[[Tensor | list[Tensor], Batch], tuple[PeerOutputs, dict[str, Tensor]]]
#: Records the kernels of a call without running them; gives the call that runs them.
Record = Callable[[Callable[[], None]], Callable[[], None]]

# Runs before recording, for libraries that choose kernels or allocate in their first runs.
_WARM_UP = 3


def check_graphs(config: TrainConfig, method: Method, memory: str, device: torch.device) -> None:
    """Raises ValueError where the ordinary step cannot be recorded."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graphs: expected a CUDA device, got {device.type}")
    if memory != "ordinary":
        raise ValueError(f"memory: expected ordinary with cuda_graphs, got {memory}")
    if not method.repeatable:
        raise ValueError(
            "cuda_graphs: expected a method whose loss is the same in every step, got "
            f"{config.method} with these options, whose loss depends on the step or on numbers "
            "drawn on the host"
        )


class GraphedStep:
    """Forward, loss and backward of the ordinary step as one graph.

    Args:
        gradients: the step without the optimiser; begins with gradients of None.
        parameters: the parameters that get gradients.
        modules: the modules whose buffers a forward run changes.
        device: a CUDA device.
        record: records the kernels of a call; CUDA graphs if None.
    """

    def __init__(
        self,
        gradients: Gradients,
        parameters: Sequence[nn.Parameter],
        modules: Sequence[nn.Module],
        device: torch.device,
        record: Record | None = None,
    ) -> None:
        self._gradients, self._modules = gradients, list(modules)
        self._parameters = list(parameters)
        self._record = CudaRecorder(device) if record is None else record
        self._replay: Callable[[], None] | None = None

    def __call__(
        self, images: Tensor | list[Tensor], batch: Batch
    ) -> tuple[PeerOutputs, dict[str, Tensor]]:
        """Outputs and loss parts, and the gradients in ``.grad``.

        The outputs and the gradients are overwritten by the next call.

        Raises:
            ValueError: a batch of another shape than the first.
        """
        given = [*([images] if isinstance(images, Tensor) else images), batch.labels, batch.index]
        if self._replay is None:
            self._prepare(given, batch, single=isinstance(images, Tensor))
        shapes = [[list(t.shape) for t in tensors] for tensors in (self._inputs, given)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"images: expected shapes {shapes[0]} as recorded, got {shapes[1]}")
        torch._foreach_copy_(self._inputs, given)
        assert self._replay is not None
        self._replay()
        for parameter, grad in zip(self._parameters, self._grads, strict=True):
            parameter.grad = grad
        return self._outputs, {name: value.clone() for name, value in self._parts.items()}

    def _prepare(self, given: Sequence[Tensor], batch: Batch, *, single: bool) -> None:
        self._inputs = [tensor.clone() for tensor in given]
        *views, labels, index = self._inputs
        fixed = Batch(labels, index, batch.step, batch.epoch)

        def run() -> None:
            self._outputs, parts = self._gradients(views[0] if single else views, fixed)
            self._parts = {name: value.detach() for name, value in parts.items()}

        with buffers_kept(self._modules):
            self._replay = self._record(run)
        self._grads = [parameter.grad for parameter in self._parameters]


class CudaRecorder:
    """Records a call as :class:`torch.cuda.CUDAGraph`, after runs on a stream of its own.

    Source: the whole-network capture of the PyTorch notes on CUDA graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, call: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.random.fork_rng([self.device]), torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    call()
            current.wait_stream(side)
            # On a stream of this device, as PyTorch's own for captures is of the first device that
            # asked for it. Threads that pin streamed images meanwhile do not disturb it.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                call()
        return graph.replay
