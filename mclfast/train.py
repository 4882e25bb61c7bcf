"""The training loop, in the order things happen.

    config = TrainConfig.from_values({"method": "lmcl", "data": "digits"})
    result = train(config, "runs/mine")          # build, train, evaluate, checkpoint, export

or with your own parts: ``Trainer(cohort, method, data, config, run_dir).fit()``.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mclfast import checkpoint, env, memory_modes, metrics, models, plots, throughput
from mclfast._checks import shortened
from mclfast._files import write_json, write_text
from mclfast.batch_parts import forward_in_parts, shuffled_order
from mclfast.class_means import class_mean_images, set_class_means
from mclfast.cohort import Cohort, PeerOutputs, detached
from mclfast.cohort_functions import networks_for
from mclfast.config import TrainConfig
from mclfast.cuda_graphs import Gradients, GraphedStep, check_graphs
from mclfast.data import load as load_data
from mclfast.data.dataset import Dataset, class_ranks, select
from mclfast.data.feed import TrainingFeed
from mclfast.data.sampler import BalancedSampler, ShuffleSampler
from mclfast.data.source import ImageSource
from mclfast.evaluate import cohort_accuracy, evaluation_mode, peer_logits
from mclfast.export import export_backbone
from mclfast.meta import bilevel_gradient
from mclfast.methods import Method, method_class
from mclfast.models.staged import StagedNetwork
from mclfast.moving_average import frozen_copy, update_average
from mclfast.offload import PeerOffload, check_method
from mclfast.schedule import learning_rate
from mclfast.topology import topology
from mclfast.types import Batch, Setup

CHECKPOINT, CONFIG, METRICS = "checkpoint.pt", "config.yaml", "metrics.csv"
RESULT, CURVES, ENVIRONMENT = "result.json", "curves.png", "environment.json"
#: Where a run computes, and where its data lie, may change; what it computes may not.
FREE_SETTINGS = frozenset(
    {
        "device", "memory", "offload", "checkpoint_every", "eval_batch_size", "data_root",
        "workers", "channels_last", "compile_peers", "cuda_graphs", "peers_parallel",
    }  # fmt: skip
)

# Values of a part of _finite_sum.
_SUM_AT_A_TIME = 2**22


@dataclass(frozen=True)
class RunResult:
    """What a finished run reached.

    Attributes:
        peers: final test accuracy in percent of each peer's own classifier, at the last epoch.
        ensemble: of the mean of the peers' logits, at the last epoch.
        published_protocol: best accuracy of any classifier of any peer at any epoch on the test
            set, as the published code reports it. It selects on the test set: for comparison only.
        seconds: training and evaluation time, over all resumed parts.
        history: one record per epoch.
    """

    peers: tuple[float, ...]
    ensemble: float
    published_protocol: float
    seconds: float
    history: list[dict[str, float]]


@dataclass
class EpochSoFar:
    """What a checkpoint within an epoch keeps of it; empty between epochs.

    Attributes:
        totals: sums of the loss and its parts over the steps done, each 0-dim.
        seconds: time taken.
    """

    totals: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0


def train(
    config: TrainConfig, run_dir: Path | str | None = None, *, progress: bool = True
) -> RunResult:
    """Builds everything that a config names and trains it, from the last checkpoint if any."""
    return build(config, run_dir).fit(progress=progress)


def load_images(config: TrainConfig) -> Dataset:
    """The data set that a config names."""
    return load_data(
        config.data,
        root=config.data_root,
        train_per_class=config.train_per_class,
        image_size=config.image_size,
        workers=config.workers,
    )


def build(config: TrainConfig, run_dir: Path | str | None = None) -> Trainer:
    """The trainer of a config; the seed fixes every initial weight."""
    return assemble(load_images(config), config, run_dir)


def assemble(data: Dataset, config: TrainConfig, run_dir: Path | str | None = None) -> Trainer:
    """The trainer of a config on data that is there; ``config.data`` is not read."""
    torch.manual_seed(config.seed)
    cohort, method = make_parts(config, data)
    return Trainer(cohort, method, data, config, run_dir, network_names=config.cohort)


def make_parts(config: TrainConfig, data: Dataset) -> tuple[Cohort, Method]:
    """The cohort and the method of a config, for the classes and channels of a data set."""
    cls = method_class(config.method)
    networks = [
        models.create(name, num_classes=data.num_classes, in_channels=data.in_channels)
        for name in config.cohort
    ]
    cohort = Cohort(
        networks,
        auxiliary_heads=cls.auxiliary_heads,
        projection_dim=config.projection_dim if cls.projections else None,
        projection=cls.projection_kind(config.options),
        topology=topology(
            config.topology,
            len(networks),
            len(networks[0].stages),
            split_stage=config.split_stage,
            rescale_gradients=cls.rescale_gradients,
        ),
    )
    return cohort, cls(cohort.feature_dims, config.options)


class Trainer:
    """Trains a cohort with a method; knows neither networks nor methods by name.

    Args:
        cohort: the peers.
        method: says the loss; moved to the device with the cohort.
        data: images and labels.
        config: settings of the loop; its ``cohort`` and ``data`` are names that :func:`build`
            reads, and are not used here.
        run_dir: folder for checkpoint, metrics, curves, result and exported backbones; a
            checkpoint found in it is resumed. None writes nothing.
        network_names: names in ``mclfast.models`` that the networks were built from. None for
            networks and data of your own: the command line cannot build those again, so their
            exports are for :func:`torch.nn.Module.load_state_dict`.

    Raises:
        ValueError: settings that cannot work on this data, or a checkpoint of other settings or
            other data.
    """

    def __init__(
        self,
        cohort: Cohort,
        method: Method,
        data: Dataset,
        config: TrainConfig,
        run_dir: Path | str | None = None,
        *,
        network_names: Sequence[str] | None = None,
    ) -> None:
        if cohort.num_classes != data.num_classes:
            raise ValueError(
                f"cohort: expected {data.num_classes} classes as the data has, "
                f"got {cohort.num_classes}"
            )
        if config.sampler == "balanced" and not method.supervised:
            raise ValueError(
                f"sampler: expected shuffle for method {config.method}, which uses no labels, "
                "got balanced"
            )
        self.config = config
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.device = select_device(config.device)
        self.data, self.held_out = hold_out(data.to(self.device), method.holdout())
        self.cohort = cohort
        if config.offload == "peers":
            check_method(method)
            PeerOffload(cohort, self.device)
        else:
            cohort.to(self.device)
        throughput.arrange(self.cohort, config, self.device)
        self.method = method
        self.method.check_device(self.device)
        self.method.prepare(
            Setup(
                self.data.train.labels,
                self.data.num_classes,
                self.cohort.projection_dim,
                self._example(),
                config.seed,
                config.batch_size,
            )
        )
        self.method.to(self.device)
        self.average = frozen_copy(self.cohort) if method.teacher else None
        if self.average is not None:
            self.average.train(method.teacher_mode == "train")
        self.mean_images = None if method.supervised else class_mean_images(self.data)
        #: Where the weights come from, where not from the seed; kept with the settings, so that no
        #: run of other weights goes on with this one.
        self.origin: dict[str, str] = {}
        self.own_parts = network_names is None
        self.names = tuple(network_names or (class_name(p.backbone) for p in cohort.peers))
        self.sampler = self._sampler()
        self.feed = TrainingFeed(
            self.data,
            device=self.device,
            seed=config.seed,
            augmented=config.augment,
            views={"one": 1, "per_peer": len(self.cohort.peers), "query_key": 2}[method.views],
            contrastive=method.augmentation(),
        )
        self.history: list[dict[str, float]] = []
        self.step = 0
        self._so_far = EpochSoFar()
        self._started = 0.0

        meta = self.method.meta_parameters()
        groups = [{"params": list(self.cohort.parameters())}, *self.method.parameter_groups()]
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = self._sgd(groups)
        self.meta_optimizer = self._sgd(meta) if meta else None
        # Only fp16 underflows: with the scaler off, its methods do nothing.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.compute: Gradients = self._gradients
        self.memory, self.memory_reason = memory_modes.resolve(config, self)
        self.runner = memory_modes.runner(self)
        throughput.check_memory(config, self.memory)
        if config.cuda_graphs:
            check_graphs(config, self.method, self.memory, self.device)
            modules = [self.cohort, self.method]
            self.compute = GraphedStep(self._gradients, self.parameters, modules, self.device)

    @torch.no_grad()
    def _example(self) -> PeerOutputs:
        """Outputs for two blank images."""
        with evaluation_mode(self.cohort):
            outputs: PeerOutputs = self.cohort(
                torch.zeros(2, *self.data.train.image_shape, device=self.device)
            )
        return outputs

    def _sampler(self) -> BalancedSampler | ShuffleSampler:
        c, images = self.config, self.data.train
        if c.sampler == "shuffle":
            return ShuffleSampler(len(images), batch_size=c.batch_size, seed=c.seed)
        return BalancedSampler(
            images.labels,
            batch_size=c.batch_size,
            images_per_class=c.images_per_class,
            num_classes=self.data.num_classes,
            seed=c.seed,
        )

    def _sgd(self, parameters: list[Any]) -> torch.optim.SGD:
        c = self.config
        return torch.optim.SGD(
            parameters,
            lr=c.lr,
            momentum=c.momentum,
            nesterov=c.nesterov,
            weight_decay=c.weight_decay,
        )

    def fit(self, *, progress: bool = True, stop_after: int | None = None) -> RunResult:
        """Trains to the last epoch, from the checkpoint in ``run_dir`` if there is one.

        Args:
            progress: show a progress bar with the time left.
            stop_after: leave after this many epochs of this call, as an interruption would.

        Raises:
            FloatingPointError: the loss became infinite or NaN; the last checkpoint stays.
        """
        if self.run_dir is not None:
            self._start_run_dir(self.run_dir)
        if stop_after is not None and stop_after < 1:
            raise ValueError(f"stop_after: expected an integer >= 1 or None, got {stop_after!r}")
        first = len(self.history)
        last = self.config.epochs if stop_after is None else first + stop_after
        bar = self._progress_bar(progress)
        try:
            for epoch in range(first, min(last, self.config.epochs)):
                self._started = time.perf_counter() - self._so_far.seconds
                record = self._train_epoch(epoch, bar)
                record |= self._evaluate()
                before = self.history[-1]["seconds"] if self.history else 0.0
                record["seconds"] = before + time.perf_counter() - self._started
                self.history.append(record)
                self._so_far = EpochSoFar()
                bar.set_postfix_str(
                    f"loss {record['train_loss']:.3g}, test {record['acc_mean']:.1f} %"
                )
                if self.run_dir is not None:
                    metrics.write_csv(self.run_dir / METRICS, self.history)
                    checkpoint.save(self.run_dir / CHECKPOINT, self.state())
        finally:
            bar.close()
        result = self._result()
        if self.run_dir is not None and len(self.history) == self.config.epochs:
            self._finish_run_dir(self.run_dir, result)
        return result

    def _train_epoch(self, epoch: int, bar: Any) -> dict[str, float]:
        c = self.config
        lr = learning_rate(c, epoch)
        for optimizer in (self.optimizer, self.meta_optimizer):
            for group in optimizer.param_groups if optimizer else ():
                group["lr"] = lr
        self.cohort.train()
        self.method.train()
        totals = self._so_far.totals
        done = self.step - epoch * len(self.sampler)
        if done == 0:
            self._tell_held_out()
        rows = self.sampler.epoch(epoch)
        for images, labels, index in self.feed.batches(rows[done:], first_step=self.step):
            batch = Batch(labels, index, self.step, epoch)
            parts = self.train_step(images, batch)
            for name, value in parts.items():
                totals[name] = totals.get(name, 0) + value.detach()
            if self.meta_optimizer and c.bilevel_every and self.step % c.bilevel_every == 0:
                self.bilevel_step(images, batch, lr)
            self.step += 1
            done += 1
            bar.update()
            if c.checkpoint_every and self.step % c.checkpoint_every == 0 and done < len(rows):
                self._save_within_epoch(done)
        # Nothing before this in an epoch waits for the device, but for checkpoints within it.
        means = {f"train_{k}": float(v) / len(rows) for k, v in totals.items()}
        self._check_finite(means["train_loss"])
        return {
            "epoch": epoch + 1, "step": self.step, "lr": lr, **means, **self.feed.throughput()
        }  # fmt: skip

    def _save_within_epoch(self, done: int) -> None:
        if self.run_dir is None:
            return
        self._check_finite(float(self._so_far.totals["loss"]) / done)
        self._so_far.seconds = time.perf_counter() - self._started
        checkpoint.save(self.run_dir / CHECKPOINT, self.state())

    def _check_finite(self, loss: float) -> None:
        """Raises before weights that are not finite get into a checkpoint."""
        self._wait()
        # The last step shows in no loss yet.
        tensors = [*self.cohort.state_dict().values(), *self.method.state_dict().values()]
        sums = torch.stack([_finite_sum(t).to(self.device) for t in tensors])
        if not (math.isfinite(loss) and bool(sums.isfinite().all())):
            epoch = len(self.history)
            raise FloatingPointError(
                f"lr: expected a finite loss and weights, got loss {loss} in epoch {epoch + 1}; "
                "try a smaller learning rate or clip_grad_norm "
                f"(lr was {learning_rate(self.config, epoch):.3g})"
            )

    def _tell_held_out(self) -> None:
        if self.held_out is None:
            self.method.before_epoch(None, None)
            return
        size = self.config.eval_batch_size
        logits = peer_logits(self.cohort, self.held_out, self.data, batch_size=size)
        self.method.before_epoch(logits, self.held_out.labels)

    def train_step(self, images: Tensor | list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """One ordinary step: outputs of the peers, loss, backward, SGD. Returns the loss parts."""
        outputs, parts = self.compute(images, batch)
        if self.config.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None and self.method.teacher_mode == "eval":
            update_average(self.average, self.cohort, self.method.teacher_decay(batch.step))
        self.method.after_step(outputs, batch)
        return parts

    def _gradients(
        self, images: Tensor | list[Tensor], batch: Batch
    ) -> tuple[PeerOutputs, dict[str, Tensor]]:
        """Outputs and loss parts; the gradients are in ``.grad`` afterwards."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            outputs = self._outputs(images, batch)
            parts = self.method.loss(outputs, batch)
        self.scaler.scale(parts["loss"]).backward()
        self.runner.backward(outputs)
        return detached(outputs), parts

    def _outputs(self, images: Tensor | list[Tensor], batch: Batch) -> PeerOutputs:
        """Those of the peers, and those of their moving average where there is one."""
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

    def bilevel_step(self, images: Tensor | list[Tensor], batch: Batch, lr: float) -> None:
        """One SGD step of the method's meta parameters along the exact bilevel gradient.

        Networks, their buffers and the ordinary optimiser stay as they are. In fp16 it runs in
        fp32: its second-order gradients are not scaled against underflow. Where the memory mode is
        not the ordinary one, activations of one peer live at a time.
        """
        assert self.meta_optimizer is not None
        c = self.config
        inner, outer = self.method.inner_loss, self.method.outer_loss
        meta = self.method.meta_parameters()
        # Checkpointing would not reach into forward mode: one peer at a time saves as much.
        alone = self.memory in ("sequential", "checkpoint")
        network, whole = networks_for(self.cohort, images, one_at_a_time=alone)
        autocast = nullcontext() if c.amp == "fp16" else self.autocast()
        with throughput.plain_calls(self.cohort), autocast:
            result = bilevel_gradient(
                lambda outputs: inner(whole(outputs), batch),
                lambda outputs: outer(whole(outputs), batch),
                dict(self.cohort.named_parameters()),
                meta,
                network=network,
                inner_steps=c.inner_steps,
                outer_steps=c.outer_steps,
                lr=lr,
                momentum=c.momentum,
                weight_decay=c.weight_decay,
            )
        for parameter, grad in zip(meta, result.grads, strict=True):
            parameter.grad = grad
        self.meta_optimizer.step()
        self.meta_optimizer.zero_grad(set_to_none=True)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of mixed precision that forward runs and losses are computed in."""
        """The context of forward runs: mixed precision where the config asks for it."""
        if self.config.amp == "off":
            return nullcontext()
        dtype = torch.bfloat16 if self.config.amp == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype)

    def _evaluate(self) -> dict[str, float]:
        self.method.eval()
        if self.mean_images is not None:
            size = self.config.eval_batch_size
            set_class_means(self.cohort, self.mean_images, self.data, batch_size=size)
        found = cohort_accuracy(
            self.cohort,
            self.data,
            batch_size=self.config.eval_batch_size,
            ensemble=self.method.ensemble,
        )
        best = max([found.best_head, *(row["acc_best_head_so_far"] for row in self.history[-1:])])
        return {
            **{f"acc_peer{i}": accuracy for i, accuracy in enumerate(found.peers)},
            "acc_mean": sum(found.peers) / len(found.peers),
            "acc_ensemble": found.ensemble,
            "acc_best_head_so_far": best,
        }

    def state(self) -> dict[str, Any]:
        """Everything that training changes, as tensors and plain values."""
        self._wait()
        return {
            "settings": self._settings(),
            "data": self._data_facts(),
            "cohort": self.cohort.state_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "meta_optimizer": self.meta_optimizer.state_dict() if self.meta_optimizer else None,
            "own_optimizers": {k: o.state_dict() for k, o in self.method.own_optimizers().items()},
            "average": self.average.state_dict() if self.average is not None else None,
            "scaler": self.scaler.state_dict(),
            "rng": checkpoint.rng_state(),
            "step": self.step,
            "epoch_so_far": asdict(self._so_far),
            "history": self.history,
        }

    def _wait(self) -> None:
        """Until the device has written what it writes to host memory."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _settings(self) -> dict[str, Any]:
        """The settings by name, with the true names of the networks and of the data."""
        names = {"cohort": list(self.names), "data": self.data.name}
        return self.config.to_values() | names | self.origin

    def _data_facts(self) -> dict[str, Any]:
        """What tells one data set from another, wherever its files lie."""
        d = self.data
        facts = {
            "training images": len(d.train),
            "test images": len(d.test),
            "class_names": list(d.class_names),
            "mean": list(d.mean),
            "std": list(d.std),
        }
        if d.train.fingerprint is not None:
            # Their numbers mean the same images only while these are the same files.
            facts["training files"] = d.train.fingerprint
        return facts

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from what :meth:`state` gave.

        Raises:
            ValueError: the state is of other settings, other data or other networks.
        """
        self._wait()
        try:
            for kind, mine in (("settings", self._settings()), ("data", self._data_facts())):
                for name, value in state[kind].items():
                    if name not in FREE_SETTINGS and mine.get(name) != value:
                        want, got = (shortened(repr(v), 80) for v in (value, mine.get(name)))
                        raise ValueError(
                            f"{name}: expected {want} as in the checkpoint being resumed, got {got}"
                        )
            self.cohort.load_state_dict(state["cohort"])
            self.method.load_state_dict(state["method"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.meta_optimizer:
                self.meta_optimizer.load_state_dict(state["meta_optimizer"])
            for name, optimizer in self.method.own_optimizers().items():
                optimizer.load_state_dict(state["own_optimizers"][name])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.scaler.load_state_dict(state["scaler"])
            checkpoint.set_rng_state(state["rng"])
            self.step, self.history = state["step"], state["history"]
            # Older checkpoints were written between epochs only.
            so_far = EpochSoFar(**state.get("epoch_so_far", {}))
            totals = {name: total.to(self.device) for name, total in so_far.totals.items()}
            self._so_far = replace(so_far, totals=totals)
        except (KeyError, RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"checkpoint: expected the state of these networks and this method, got: {reason}"
            ) from None

    def _start_run_dir(self, run_dir: Path) -> None:
        import yaml

        if (run_dir / CHECKPOINT).exists():
            # In host memory: beside the modules, a second copy of the banks may not fit the GPU.
            self.load_state(checkpoint.load(run_dir / CHECKPOINT))
            return
        write_text(run_dir / CONFIG, yaml.safe_dump(self._settings(), sort_keys=False))
        memory = {"mode": self.memory, "reason": self.memory_reason}
        write_json(run_dir / ENVIRONMENT, env.report_dict() | {"memory": memory})

    def _finish_run_dir(self, run_dir: Path, result: RunResult) -> None:
        write_json(
            run_dir / RESULT,
            {
                "peers": result.peers,
                "ensemble": result.ensemble,
                "published_protocol": result.published_protocol,
                "seconds": round(result.seconds, 2),
            },
        )
        title = f"{self.config.method} on {self.data.name}, seed {self.config.seed}"
        plots.run_curves(self.history, self.names, run_dir / CURVES, title)
        for i in range(len(self.cohort.networks)):
            self.export(i, run_dir / f"peer{i}")

    def export(self, peer: int, folder: Path) -> Path:
        """Writes one peer's bare backbone, see :func:`mclfast.export.export_backbone`."""
        self._wait()
        c = self.config
        return export_backbone(
            self.cohort.peers[peer].backbone,
            folder,
            network=None if self.own_parts else self.names[peer],
            description={
                "class": class_name(self.cohort.peers[peer].backbone),
                "num_classes": self.data.num_classes,
                "in_channels": self.data.in_channels,
                "image_size": self.data.image_size,
                "mean": self.data.mean,
                "std": self.data.std,
                "class_names": self.data.class_names,
                "data": None if self.own_parts else c.data,
                "data_root": c.data_root,
                "train_per_class": c.train_per_class,
                "eval_batch_size": c.eval_batch_size,
                "method": c.method,
                "seed": c.seed,
                "epochs_trained": len(self.history),
                "accuracy": self.history[-1][f"acc_peer{peer}"] if self.history else None,
            },
        )

    def _result(self) -> RunResult:
        row = self.history[-1]
        return RunResult(
            peers=tuple(row[f"acc_peer{i}"] for i in range(len(self.cohort.networks))),
            ensemble=row["acc_ensemble"],
            published_protocol=row["acc_best_head_so_far"],
            seconds=row["seconds"],
            history=self.history,
        )

    def _progress_bar(self, shown: bool) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=self.config.epochs * len(self.sampler),
            initial=self.step,
            disable=not shown,
            desc=f"{self.config.method} seed {self.config.seed}",
            unit="step",
            # A line now and then where there is no terminal to redraw.
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
        )


def hold_out(data: Dataset, share: float) -> tuple[Dataset, ImageSource | None]:
    """The data with a share of each class's training images taken out, and those images.

    The split is one for all seeds, as that of the test images.
    """
    if share == 0:
        return data, None
    labels = data.train.labels
    ranks = class_ranks(labels, data.num_classes, seed=0).to(labels.device)
    counts = torch.bincount(labels, minlength=data.num_classes)
    kept_out = ranks < (share * counts).ceil()[labels]
    return replace(data, train=select(data.train, ~kept_out)), select(data.train, kept_out)


def class_name(backbone: StagedNetwork) -> str:
    """Class of a network; of the module inside one that ``staged`` adapted."""
    return type(getattr(backbone, "module", backbone)).__name__


def select_device(name: str) -> torch.device:
    """The device a name stands for; "auto" takes a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected one of {torch.cuda.device_count()} GPUs here, got {name!r}"
        )
    return device


def _finite_sum(tensor: Tensor) -> Tensor:
    """A sum of all values in float64 that is not finite where one of them is not; 0-dim.

    In parts: a sum in another dtype copies what it adds up, which a large bank leaves no room for.
    """
    parts = tensor.detach().reshape(-1).split(_SUM_AT_A_TIME)
    return torch.stack([part.sum(dtype=torch.float64) for part in parts]).sum()
