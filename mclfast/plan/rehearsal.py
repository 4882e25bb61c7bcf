"""The true training step on tensors without values: what it needs, without needing it.

A rehearsal runs a copy of a :class:`mclfast.TrainStep` whose tensors are fake (they have a shape, a
dtype and a device, and no memory) and follows the birth and death of every storage. Whatever a step
keeps or gives back in any memory mode is seen, as it is the same code. It is a copy because a step
changes its method (queues, draws), and because networks of your own cannot be built anew.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeCopyMode, FakeTensorMode

from mclfast._base.modules import evaluation_mode
from mclfast._base.random import rng_restored
from mclfast.cohort.outputs import Batch, PeerOutputs
from mclfast.execution import layout
from mclfast.execution.non_finite import Blind
from mclfast.execution.offload import PeerOffload
from mclfast.execution.step import TrainStep
from mclfast.methods._banked import BankMethod
from mclfast.methods.baseline import sum_cross_entropy
from mclfast.plan.live_bytes import HOST_MEMORY, LiveBytes

ACTIVATIONS, GRADIENTS, OPTIMIZER, LOSS = "activations", "gradients", "optimiser", "loss"


class Rehearsed(NamedTuple):
    """Bytes that come and go; parameters, banks and data are not among them.

    Attributes:
        step: bytes of each kind at the peak of an ordinary step, gradients and optimiser state too.
            :data:`mclfast.plan.live_bytes.HOST` stands for what lies in host memory.
        evaluation: bytes in all on the device at the peak of an evaluation batch.
        whole_loss: False where the method's loss looks at values, of which there are none here:
            counted is a cross entropy in its place.
    """

    step: dict[str, int]
    evaluation: int
    whole_loss: bool = True


def rehearse(
    step: TrainStep, *, memory: str, offload: str, amp: str, batch_size: int, foreach: bool = False
) -> Rehearsed:
    """Bytes that an ordinary step and an evaluation batch need.

    Args:
        step: stays as it is.
        memory, offload, amp: values of the settings of these names in ``TrainConfig``.
        batch_size: images per step.
        foreach: count the optimiser's step in its form for GPUs, all parameters at a time.

    Raises:
        ValueError: settings that do not go together.
    """
    settings = {"memory": memory, "offload": offload, "amp": amp}
    with rng_restored():
        try:
            return _rehearsed(step, settings, batch_size, foreach, whole_loss=True)
        except DataDependentOutputException:
            return _rehearsed(step, settings, batch_size, foreach, whole_loss=False)


def rehearse_bilevel(
    step: TrainStep, *, one_at_a_time: bool, amp: str, batch_size: int, offload: str = "none"
) -> int:
    """Bytes at the peak of a bilevel step, gradients and optimiser state included; 0 without one.

    Parameters and momentum in host memory (with offload) are not among them.

    Args:
        step: stays as it is.
        one_at_a_time: the activations of one peer live at a time, as in each memory mode but the
            ordinary one.
        amp: value of the setting of this name in ``TrainConfig``.
        batch_size: images per step.
        offload: value of the setting of this name; needs peers that run one at a time.
    """
    if not step.has_bilevel:
        return 0
    memory = "sequential" if one_at_a_time else "ordinary"
    with rng_restored():
        twin, batch, mode, live = _prepared(
            step, {"memory": memory, "offload": offload, "amp": amp}, batch_size
        )
        c = twin.config
        # The peak is that of the last of two SGD steps; a step more keeps a copy of the parameters
        # besides. Rehearsed are no more than two, as each takes seconds.
        asked = c.inner_steps + c.outer_steps
        c.outer_steps = min(c.outer_steps, 1)
        c.inner_steps = min(c.inner_steps, 2 - c.outer_steps)
        more = asked - c.inner_steps - c.outer_steps
        with mode, live:
            images = _images(twin, batch_size, live)
            _settle(twin, images, batch)
            _name_state(twin, live)
            if offload == "peers":
                # Setting ``data`` leaves a fake parameter on the device that it was made for.
                for parameter in twin.cohort.parameters():
                    parameter.fake_device = HOST_MEMORY  # type: ignore[attr-defined]
                more = 0
            live.reset()
            twin.bilevel(images, batch, c.lr)
    return live.total() + more * sum(p.nbytes for p in step.cohort.parameters())


def _rehearsed(
    step: TrainStep, settings: dict[str, Any], batch_size: int, foreach: bool, *, whole_loss: bool
) -> Rehearsed:
    twin, batch, mode, live = _prepared(step, settings, batch_size)
    if foreach:
        for group in twin.optimizer.param_groups:
            group["foreach"] = True
    if not whole_loss:
        twin.method.loss = _cross_entropy  # type: ignore[method-assign]
    _mark(twin, live)
    with mode, live:
        images = _images(twin, batch_size, live)
        _settle(twin, images, batch)
        _name_state(twin, live)
        live.reset()
        twin(images, batch)
        peak = {kind: size for kind, size in live.peak.items() if size}
        evaluation = _evaluation(twin, live)
    return Rehearsed(peak, evaluation, whole_loss)


def _prepared(
    step: TrainStep, settings: dict[str, Any], batch_size: int
) -> tuple[TrainStep, Batch, FakeTensorMode, LiveBytes]:
    """A fake copy of a step and a batch for it; what a run keeps is left out of the count."""
    labels = torch.zeros(batch_size, dtype=torch.int64, device=step.device)
    batch = Batch(labels, torch.zeros_like(labels), 0, 0)
    if isinstance(step.method, BankMethod) and step.method.uses_banks:
        # Drawn here, as draws depend on values. They are counted with the banks.
        step.method.contrast(batch)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin = _fake_copy(step, mode, batch, settings)
    live = LiveBytes()
    for module in _modules(twin):
        live.leave_out((*module.parameters(), *module.buffers()))
    return twin, batch, mode, live


def _modules(twin: TrainStep) -> list[nn.Module]:
    return [twin.cohort, twin.method, *([twin.average] if twin.average else ())]


def _fake_copy(
    step: TrainStep, mode: FakeTensorMode, batch: Batch, settings: dict[str, Any]
) -> TrainStep:
    """A copy with fake parameters, buffers and optimiser state, under other settings."""
    # Neither compiled calls nor a graph of kernels are rehearsed.
    with FakeCopyMode(mode), layout.plain_calls(step.cohort):
        twin = copy.deepcopy(step, {id(batch): batch})
    twin.config = dataclasses.replace(step.config, cuda_graphs=False, **settings)
    if twin.config.amp == "fp16":
        # bf16 has the same sizes, and the scaler of fp16 looks at values.
        twin.config.amp = "bf16"
    twin.scaler = torch.amp.GradScaler(twin.device.type, enabled=False)
    twin.watch = Blind()
    if twin.config.offload == "peers":
        with mode:
            PeerOffload(twin.cohort, twin.device, HOST_MEMORY)
    twin.set_memory(twin.config.memory)
    twin.cohort.train()
    twin.method.train()
    return twin


def _cross_entropy(outputs: PeerOutputs, batch: Batch) -> dict[str, Tensor]:
    return {"loss": sum_cross_entropy(outputs, batch.labels)}


def _mark(twin: TrainStep, live: LiveBytes) -> None:
    """Tells activations, loss and gradients apart."""
    live.watch(twin.cohort, ACTIVATIONS)
    if twin.average is not None:
        live.watch(twin.average, ACTIVATIONS)
    loss = twin.method.loss

    def counted(outputs: PeerOutputs, batch: Batch) -> dict[str, Tensor]:
        with live.kind(LOSS):
            return loss(outputs, batch)

    twin.method.loss = counted  # type: ignore[method-assign]

    def arrived(parameter: Tensor) -> None:
        if parameter.grad is not None:
            live.call(parameter.grad, GRADIENTS)

    for parameter in (*twin.cohort.parameters(), *twin.method.parameters()):
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(arrived)


def _settle(twin: TrainStep, images: Tensor | list[Tensor], batch: Batch) -> None:
    """Gives optimisers the state, and parameters the gradients, that all but a first step find."""
    if twin.config.offload == "peers":
        twin(images, batch)
        return
    for optimizer in _optimizers(twin):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    if twin.meta_optimizer is not None:
        twin.meta_optimizer.zero_grad(set_to_none=True)


def _optimizers(twin: TrainStep) -> list[torch.optim.Optimizer]:
    own = twin.method.own_optimizers().values()
    return [twin.optimizer, *([twin.meta_optimizer] if twin.meta_optimizer else ()), *own]


def _name_state(twin: TrainStep, live: LiveBytes) -> None:
    """The state of all optimisers that lies on the device."""
    for optimizer in _optimizers(twin):
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor) and value.device != HOST_MEMORY:
                    live.call(value, OPTIMIZER)


def _images(twin: TrainStep, batch_size: int, live: LiveBytes) -> Tensor | list[Tensor]:
    """A batch, in as many views as the method wants."""
    views = twin.method.view_count(len(twin.cohort.peers))
    shape = batch_size, *twin.image_shape
    with live.kind(ACTIVATIONS):
        images = [torch.empty(shape, device=twin.device) for _ in range(views)]
    return images[0] if views == 1 else images


def _evaluation(twin: TrainStep, live: LiveBytes) -> int:
    """The peak of a forward run on a batch of evaluation."""
    live.reset()
    shape = twin.config.eval_batch_size, *twin.image_shape
    with torch.no_grad(), evaluation_mode(twin.cohort):
        twin.cohort(torch.empty(shape, device=twin.device))
    return live.total()
