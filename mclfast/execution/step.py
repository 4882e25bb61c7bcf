"""One training step of a cohort: outputs of the peers, loss, backward, optimiser, bilevel step.

No data set, file or clock is needed here: :class:`mclfast.Trainer` is one loop around it, and a
loop of your own is another.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mclfast._base.checks import describe
from mclfast._base.machine import select_device
from mclfast._base.modules import evaluation_mode
from mclfast.bilevel.gradient import bilevel_gradient
from mclfast.cohort.average import frozen_copy, update_average
from mclfast.cohort.cohort import Cohort
from mclfast.cohort.functions import networks_for
from mclfast.cohort.outputs import Batch, PeerOutputs, Setup, detached
from mclfast.config import TrainConfig, learning_rate
from mclfast.data.dataset import check_labels
from mclfast.execution import layout, modes
from mclfast.execution.batch_parts import forward_in_parts, shuffled_order
from mclfast.execution.bilevel_trial import check_networks, refused_by_setting
from mclfast.execution.non_finite import (
    Before,
    Named,
    NonFiniteError,
    Watch,
    of_images,
    of_outputs,
    of_parameters,
    of_terms,
)
from mclfast.execution.parts import make_sgd
from mclfast.methods.base import Method


class TrainStep:
    """Everything that one step changes: networks, method, moving average, optimisers, scaler.

    Args:
        cohort: the peers; moved to the device of the run, or to host memory with ``offload``.
        method: defines the loss; moved to the device.
        config: settings of the step. Read are the optimiser's and the bilevel step's settings,
            ``schedule`` and ``epochs`` (for the learning rate), ``amp``, ``clip_grad_norm``,
            ``memory``, ``offload``, ``channels_last``, ``compile_peers``, ``peers_parallel``,
            ``cuda_graphs``, ``non_finite``, ``device``, ``seed`` and ``batch_size``.
        labels: [n] int64, class of every training image; memory banks and samplers are made for
            them.
        image_shape: channels, height and width of an image.
        memory: memory mode in place of the config's.

    Attributes:
        config: settings of the step.
        device: the device that the step computes on.
        cohort: the peers.
        method: the method, with what it built for these peers and labels.
        average: moving average of the cohort, None for a method without a teacher.
        parameters: all parameters that ``optimizer`` trains.
        optimizer: SGD on the networks and on the method's own parameters.
        meta_optimizer: SGD on the parameters that the bilevel step trains, None without any.
        scaler: gradient scaler, enabled in fp16.
        num_samples: number n of training images.
        image_shape: channels, height and width of an image.
        memory: name of the memory mode.
        runner: runs the peers in that mode.
        compute: forward, loss and backward, as they are or as a CUDA graph.
        watch: looks for numbers that are not finite.
        skipped: error of the last step, if ``non_finite`` is "skip" and its update was left out;
            else None.

    Raises:
        ValueError: settings that do not go with these networks, this method or this device; among
            them bilevel steps for networks that cannot be differentiated twice.

    Examples:
        >>> import torch
        >>> from mclfast import Batch, Cohort, TrainStep, models
        >>> from mclfast.config import TrainConfig
        >>> from mclfast.methods import LayerwiseMCL
        >>> labels = torch.arange(20) % 10
        >>> cohort = Cohort([models.resnet8(num_classes=10) for _ in range(2)])
        >>> config = TrainConfig(batch_size=20, images_per_class=2, device="cpu")
        >>> step = TrainStep(cohort, LayerwiseMCL(cohort.feature_dims), config,
        ...                  labels=labels, image_shape=(3, 32, 32))
        >>> _ = step.begin_epoch(0)
        >>> parts = step(torch.randn(20, 3, 32, 32), Batch(labels, torch.arange(20), 0, 0))
        >>> parts["loss"].shape
        torch.Size([])
    """

    def __init__(
        self,
        cohort: Cohort,
        method: Method,
        config: TrainConfig,
        *,
        labels: Tensor,
        image_shape: tuple[int, int, int],
        memory: str | None = None,
    ) -> None:
        _check_arguments(cohort, method, config, labels, image_shape)
        self.config, self.cohort, self.method = config, cohort, method
        self.num_samples, self.image_shape = len(labels), image_shape
        self.device = select_device(config.device)

        # The peers go to their place first: the method asks for the shapes of their outputs.
        modes.place(cohort, method, config, self.device)

        # The method builds its own modules from these shapes, so it is moved after that.
        method.check_device(self.device)
        method.prepare(
            Setup(
                labels.to(self.device, torch.int64),
                cohort.num_classes,
                cohort.projection_dim,
                self._example(),
                config.seed,
                config.batch_size,
            )
        )
        method.to(self.device)

        # The average starts as a copy of the peers where they are, in the layout that they have.
        self.average = frozen_copy(cohort) if method.teacher else None
        if self.average is not None:
            self.average.train(method.teacher_mode == "train")

        # The optimisers hold parameters by identity: all moves are over.
        groups = [{"params": list(cohort.parameters())}, *method.parameter_groups()]
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self.optimizer = make_sgd(config, groups)
        meta = method.meta_parameters()
        self.meta_optimizer = make_sgd(config, meta) if meta else None
        # Only fp16 underflows: with the scaler off, its methods do nothing.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")

        # With offload the peers have made their updates by the end of the backward pass. On a GPU
        # only a step that may have to be left out is worth waiting for.
        self.watch = Watch(
            at_once=config.offload == "none"
            and (self.device.type == "cpu" or config.non_finite == "skip")
        )
        self.skipped: NonFiniteError | None = None

        # The runner comes last: with offload it takes the optimiser's steps, and a graph records
        # all of the above.
        self.set_memory(config.memory if memory is None else memory)

        # Then all is in place for a trial of what a run may fail at later.
        if self.has_bilevel:
            check_networks(cohort, self._blank_images(), config, self.memory != "ordinary")

    def set_memory(self, memory: str) -> None:
        """Decides how the peers run from now on, see :mod:`mclfast.execution.modes`.

        Args:
            memory: "ordinary", "checkpoint" or "sequential".

        Raises:
            ValueError: another mode, or one that does not go with the other settings.
        """
        modes.check(memory, self.config, self.method, self.device)
        self.memory = memory
        self.runner = modes.make_runner(
            memory, self.config, self.cohort, self.method, self.autocast, self.optimizer
        )
        modules = [self.cohort, self.method]
        self.compute = modes.recorded(
            self._gradients, self.config, self.parameters, modules, self.device
        )

    @torch.no_grad()
    def _example(self) -> PeerOutputs:
        """Outputs for two blank images."""
        with evaluation_mode(self.cohort):
            outputs: PeerOutputs = self.cohort(self._blank_images())
        return outputs

    def _blank_images(self) -> Tensor:
        return torch.zeros(2, *self.image_shape, device=self.device)

    @property
    def has_bilevel(self) -> bool:
        """Whether a run takes bilevel steps: the method has something to train by them."""
        return self.meta_optimizer is not None and self.config.bilevel_every > 0

    def begin_epoch(self, epoch: int) -> float:
        """Sets the learning rate of an epoch, counted from 0, and training mode; returns the rate.

        Methods that use held-out images want :meth:`mclfast.methods.base.Method.before_epoch` too.

        Raises:
            ValueError: an epoch outside [0, ``config.epochs``), for which no rate is set.
        """
        if not 0 <= epoch < self.config.epochs:
            raise ValueError(
                f"epoch: expected an integer in [0, {self.config.epochs}), got {epoch}"
            )
        lr = learning_rate(self.config, epoch)
        for optimizer in (self.optimizer, self.meta_optimizer):
            for group in optimizer.param_groups if optimizer else ():
                group["lr"] = lr
        self.cohort.train()
        self.method.train()
        return lr

    def __call__(self, images: Tensor | list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """One ordinary step: outputs of the peers, loss, backward, SGD.

        Args:
            images: [B, C, H, W] on the device, or a list of such views where the method wants
                several, see :attr:`mclfast.methods.base.Method.views`.
            batch: labels and sample numbers on the device; number of the step and epoch.

        Returns:
            "loss", 0-dim, and its parts by name. Nothing here waits for a GPU, unless
            ``non_finite`` is "skip".

        Raises:
            NonFiniteError: the loss or a gradient is infinite or NaN, and ``non_finite`` is not
                "skip". On a CPU nothing of the step remains; on a GPU the error comes with the
                next step, or with :meth:`check`, after the update.
        """
        before = self._before() if self.watch.at_once else None
        self.skipped = None
        outputs, parts = self.compute(images, batch)
        try:
            self._look(images, batch, outputs, parts)
        except NonFiniteError as error:
            if before is not None:
                before.restore()
                self.optimizer.zero_grad(set_to_none=True)
            if self.config.non_finite != "skip":
                raise
            self.skipped = error
            return parts
        if self.config.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None and self.method.teacher_mode == "eval":
            update_average(self.average, self.cohort, self.method.teacher_decay(batch.step))
        self.method.after_step(outputs, batch)
        return parts

    def check(self) -> None:
        """Waits for the device, and looks at the last step if that is still to be done.

        Raises:
            NonFiniteError: the last step made numbers that are not finite.
        """
        self.wait()
        self.watch.read()

    def _before(self) -> Before:
        whole = [self.cohort] if self.average is None else [self.cohort, self.average]
        return Before(whole, [self.method])

    def _weights(self) -> list[Named]:
        """Weights that may be the cause; none where they show what a bad step has made of them."""
        modules = (("cohort", self.cohort), ("method", self.method))
        return of_parameters("weight", modules) if self.watch.at_once else []

    def _look(
        self,
        images: Tensor | list[Tensor],
        batch: Batch,
        outputs: PeerOutputs,
        parts: dict[str, Tensor],
    ) -> None:
        """Raises NonFiniteError where the loss or a gradient is not finite."""
        modules = (("cohort", self.cohort), ("method", self.method))
        # The scaler finds and skips gradients that overflow in fp16 by itself.
        gradients = [] if self.scaler.is_enabled() else of_parameters("gradient", modules)

        def others() -> list[Named]:
            return [*of_images(images), *self._weights(), *of_outputs(outputs), *terms]

        *terms, loss = of_terms(parts)
        # An average that moves in the forward pass is not as it was before the step.
        moved = self.average is not None and self.method.teacher_mode == "train"
        self.watch.look([loss, *gradients], others, images, batch, before_update=not moved)

    def _gradients(
        self, images: Tensor | list[Tensor], batch: Batch
    ) -> tuple[PeerOutputs, dict[str, Tensor]]:
        """Outputs and loss parts; the gradients are in ``.grad`` afterwards."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            outputs = self.outputs(images, batch)
            parts = self.method.loss(outputs, batch)
        self.scaler.scale(parts["loss"]).backward()
        self.runner.backward(outputs)
        return detached(outputs), parts

    def outputs(self, images: Tensor | list[Tensor], batch: Batch) -> PeerOutputs:
        """Outputs of the peers and, if the method uses a teacher, of their moving average."""
        method = self.method
        own, others = images if method.views == "query_key" else (images, images)
        outputs = self.runner.forward(own)
        if self.average is None:
            return outputs
        order = None
        if method.teacher_mode == "train":
            decay = method.teacher_decay(batch.step)
            update_average(self.average, self.cohort, decay, buffers=False)
            order = shuffled_order(
                len(batch.index), seed=self.config.seed, step=batch.step, device=self.device
            )
        with torch.no_grad():
            teacher = forward_in_parts(self.average, others, method.batch_parts(), order)
        return outputs._replace(teacher=teacher)

    def bilevel(self, images: Tensor | list[Tensor], batch: Batch, lr: float | None = None) -> None:
        """One SGD step of the method's meta parameters along the exact bilevel gradient.

        Networks, their buffers and the ordinary optimiser stay as they are. In fp16 it runs in
        fp32: its second-order gradients are not scaled against underflow. Where the memory mode is
        not the ordinary one, activations of one peer live at a time.

        Args:
            images, batch: arguments of an ordinary step.
            lr: learning rate of the unrolled steps; the one set for the epoch if None.

        Raises:
            ValueError: a method without meta parameters, or an operation of the networks or of the
                method's objectives that cannot be differentiated twice.
            NonFiniteError: the gradient is infinite or NaN, see :meth:`__call__`.
        """
        if self.meta_optimizer is None:
            raise ValueError(
                "method: expected one with parameters that a bilevel step trains, got "
                f"{type(self.method).__name__}"
            )
        c = self.config
        inner, outer = self.method.inner_loss, self.method.outer_loss
        meta = self.method.meta_parameters()
        # Checkpointing would not reach into forward mode: one peer at a time saves as much.
        alone = self.memory != "ordinary"
        network, whole = networks_for(self.cohort, images, one_at_a_time=alone)
        autocast = nullcontext() if c.amp == "fp16" else self.autocast()
        with layout.plain_calls(self.cohort), autocast, refused_by_setting(c):
            result = bilevel_gradient(
                lambda outputs: inner(whole(outputs), batch),
                lambda outputs: outer(whole(outputs), batch),
                dict(self.cohort.named_parameters()),
                meta,
                network=network,
                inner_steps=c.inner_steps,
                outer_steps=c.outer_steps,
                lr=self.optimizer.param_groups[0]["lr"] if lr is None else lr,
                momentum=c.momentum,
                weight_decay=c.weight_decay,
            )
        gradients = [
            Named(f"bilevel gradient {i} of method", grad, term="bilevel", decides=True)
            for i, grad in enumerate(result.grads)
        ]
        try:
            self.watch.look(gradients, self._weights, images, batch, before_update=False)
        except NonFiniteError as error:
            if self.config.non_finite != "skip":
                raise
            self.skipped = error
            return
        for parameter, grad in zip(meta, result.grads, strict=True):
            parameter.grad = grad
        self.meta_optimizer.step()
        self.meta_optimizer.zero_grad(set_to_none=True)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context that forward runs and losses are computed in: mixed precision if set."""
        if self.config.amp == "off":
            return nullcontext()
        dtype = torch.bfloat16 if self.config.amp == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype)

    def wait(self) -> None:
        """Returns when the device has written what it writes to host memory."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def state_dict(self) -> dict[str, Any]:
        """All that steps change, as tensors and plain values by part; waits for the device."""
        self.wait()
        own = self.method.own_optimizers()
        return {
            **{name: part and part.state_dict() for name, part in self._parts().items()},
            "own_optimizers": {name: optimizer.state_dict() for name, optimizer in own.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` gave.

        Raises:
            KeyError, RuntimeError: the state of other networks or another method. Missing and
                surplus names are found before anything is changed.
        """
        self.wait()
        self.watch.forget()
        parts = self._parts()
        for name, part in parts.items():
            _check_names(name, part, state[name])
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(state[name])
        for name, optimizer in self.method.own_optimizers().items():
            optimizer.load_state_dict(state["own_optimizers"][name])

    def _parts(self) -> dict[str, Any]:
        """Modules and optimisers by their name in the state, None where the step has none."""
        return {
            "cohort": self.cohort,
            "method": self.method,
            "optimizer": self.optimizer,
            "meta_optimizer": self.meta_optimizer,
            "average": self.average,
            "scaler": self.scaler,
        }


def _check_arguments(cohort: Any, method: Any, config: Any, labels: Any, image_shape: Any) -> None:
    """Raises TypeError or ValueError, naming the argument that a step cannot be made of."""
    wanted = {
        "cohort": (cohort, Cohort),
        "method": (method, Method),
        "config": (config, TrainConfig),
    }
    for name, (value, kind) in wanted.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected a {kind.__name__}, got {describe(value)}")
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
        or labels.dim() != 1
    ):
        raise TypeError(f"labels: expected an integer tensor [n], got {describe(labels)}")
    if method.supervised:
        check_labels("labels", labels.to(torch.int64), cohort.num_classes)
    sizes = image_shape if isinstance(image_shape, Sequence) else ()
    if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(
            f"image_shape: expected three sizes (channels, height, width), got {image_shape!r}"
        )
    bare = [i for i, peer in enumerate(cohort.peers) if not peer.backbone.stages]
    if method.auxiliary_heads and bare:
        raise ValueError(
            f"cohort: expected networks with stages for {type(method).__name__}, which reads them, "
            f"got peer {bare[0]} without; name them with mclfast.staged(module, stages)"
        )


def _check_names(name: str, part: Any, state: Any) -> None:
    """Raises RuntimeError where a state is not that of a part, before the part is changed."""
    if (part is None) != (state is None):
        found, wanted = ("none" if x is None else "one" for x in (state, part))
        raise RuntimeError(f"{name}: expected {wanted}, got {found}")
    if isinstance(part, nn.Module) and (other := part.state_dict().keys() ^ state.keys()):
        raise RuntimeError(f"{name}: expected the same names of tensors, got others ({min(other)})")
