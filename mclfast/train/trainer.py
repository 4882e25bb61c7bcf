"""The training loop, in the order things happen.

    config = TrainConfig.from_values({"method": "lmcl", "data": "digits"})
    result = train(config, "runs/mine")          # build, train, evaluate, checkpoint, export

or with your own parts: ``Trainer(cohort, method, data, config, run_dir).fit()``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mclfast._base.machine import select_device
from mclfast._base.tensors import all_finite
from mclfast.cohort.cohort import Cohort
from mclfast.cohort.outputs import Batch
from mclfast.config import TrainConfig, learning_rate
from mclfast.data.dataset import Dataset
from mclfast.data.feed import TrainingFeed
from mclfast.data.subsets import hold_out
from mclfast.execution.parts import make_sampler
from mclfast.execution.step import TrainStep
from mclfast.methods.base import Method
from mclfast.models.staged import class_name
from mclfast.plan.chooser import choose
from mclfast.plan.sizes_of_data import facts_of
from mclfast.train import checkpoint
from mclfast.train import folder as run_folder
from mclfast.train import state as run_state
from mclfast.train.class_means import class_mean_images, mean_classifiers, set_class_means
from mclfast.train.evaluation import CohortAccuracy, cohort_accuracy, peer_logits
from mclfast.train.export import describe, export_backbone
from mclfast.train.history import RunResult, accuracies, evaluated, result_of
from mclfast.train.progress import progress_bar
from mclfast.train.rehearsal import rehearse_evaluation, rehearse_files
from mclfast.train.state import EpochSoFar, Identity, Place, data_facts


class Trainer:
    """Trains a cohort with a method; knows neither networks nor methods by name.

    Args:
        cohort: the peers.
        method: defines the loss; moved to the device with the cohort.
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
        self.cohort, self.method = cohort, method
        self.own_parts = network_names is None
        self.names = tuple(network_names or (class_name(p.backbone) for p in cohort.peers))
        #: Where the weights come from, where not from the seed; kept with the settings, so that no
        #: run of other weights goes on with this one.
        self.origin: dict[str, str] = {}

        # The data come first: a held-out part is no longer among the labels that the step is for.
        self.device = select_device(config.device)
        self.data, self.held_out = hold_out(data.to(self.device), method.holdout())
        self.mean_images = None if method.supervised else class_mean_images(self.data)

        # Then the step, which moves networks and method to the device; "auto" chooses a memory mode
        # for it as soon as it is whole, with the data already in memory.
        auto = config.memory == "auto"
        self.train_step = TrainStep(
            cohort,
            method,
            config,
            labels=self.data.train.labels,
            image_shape=self.data.train.image_shape,
            memory="ordinary" if auto else None,
        )
        self.memory_reason = f"{self.train_step.memory}: as set"
        if auto:
            chosen = choose(self.train_step, facts_of(self.data))
            self.train_step.set_memory(chosen.memory)
            self.memory_reason = chosen.reason

        # Last what feeds it: the sampler deals the images that are not held out.
        self.sampler = make_sampler(config, self.data.train, self.data.num_classes)
        self.feed = TrainingFeed(
            self.data,
            device=self.device,
            seed=config.seed,
            augmented=config.augment,
            views=method.view_count(len(cohort.peers)),
            contrastive=method.augmentation(),
        )

        self.history: list[dict[str, float]] = []
        self.step = 0
        self._so_far = EpochSoFar()
        self._started = 0.0

    def fit(self, *, progress: bool = True, stop_after: int | None = None) -> RunResult:
        """Trains to the last epoch, from the checkpoint in ``run_dir`` if there is one.

        Args:
            progress: show a progress bar with the time left.
            stop_after: leave after this many epochs of this call, as an interruption would.

        Raises:
            FloatingPointError: the loss became infinite or NaN; the last checkpoint stays.
            ValueError: what follows the training would fail: the evaluation, or, with a run_dir,
                the curves or an export.
        """
        self._rehearse()
        if self.run_dir is not None:
            self._resume_or_start(self.run_dir)
        if stop_after is not None and stop_after < 1:
            raise ValueError(f"stop_after: expected an integer >= 1 or None, got {stop_after!r}")
        first = len(self.history)
        last = self.config.epochs if stop_after is None else first + stop_after
        bar = progress_bar(
            f"{self.config.method} seed {self.config.seed}",
            steps=self.config.epochs * len(self.sampler),
            done=self.step,
            shown=progress,
        )
        try:
            for epoch in range(first, min(last, self.config.epochs)):
                self._started = time.perf_counter() - self._so_far.seconds
                record = self._train_epoch(epoch, bar)
                record |= accuracies(
                    self.evaluate() if self._is_evaluated(epoch) else None,
                    self.history,
                    len(self.cohort.peers),
                )
                before = self.history[-1]["seconds"] if self.history else 0.0
                record["seconds"] = before + time.perf_counter() - self._started
                self.history.append(record)
                self._so_far = EpochSoFar()
                tested = evaluated(self.history)[-1:]
                bar.set_postfix_str(
                    f"loss {record['train_loss']:.3g}"
                    + "".join(f", test {row['acc_mean']:.1f} %" for row in tested)
                )
                if self.run_dir is not None:
                    run_folder.write_epoch(self.run_dir, self.history, self.state())
        finally:
            bar.close()
        result = result_of(self.history, len(self.cohort.peers))
        if self.run_dir is not None and len(self.history) == self.config.epochs:
            self._finish(self.run_dir, result)
        return result

    def _rehearse(self) -> None:
        """Tries what follows the training, which is late to learn that it fails."""
        if self.mean_images is not None:
            mean_classifiers(self.cohort)
        rehearse_evaluation(self.cohort, self.method, self.data)
        if self.run_dir is not None:
            rehearse_files(
                [(peer.backbone, self._description(i)) for i, peer in enumerate(self.cohort.peers)],
                self.names,
                self._title(),
            )

    def _resume_or_start(self, run_dir: Path) -> None:
        path = run_dir / run_folder.CHECKPOINT
        if path.exists():
            # In host memory: beside the modules, a second copy of the banks may not fit the GPU.
            self.load_state(checkpoint.load_newest(path))
            return
        memory = {"mode": self.train_step.memory, "reason": self.memory_reason}
        run_folder.write_start(run_dir, self._identity().settings, memory)

    def _train_epoch(self, epoch: int, bar: Any) -> dict[str, float]:
        c = self.config
        lr = self.train_step.begin_epoch(epoch)
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
            if self.train_step.has_bilevel and self.step % c.bilevel_every == 0:
                self.train_step.bilevel(images, batch)
            self.step += 1
            done += 1
            bar.update()
            if c.checkpoint_every and self.step % c.checkpoint_every == 0 and done < len(rows):
                self._save_within_epoch(done)
        # Nothing before this in an epoch waits for the device, but for checkpoints within it.
        means = {f"train_{k}": float(v) / len(rows) for k, v in totals.items()}
        self._check_finite(means["train_loss"])
        return {"epoch": epoch + 1, "step": self.step, "lr": lr, **means, **self.feed.throughput()}

    def _tell_held_out(self) -> None:
        if self.held_out is None:
            self.method.before_epoch(None, None)
            return
        size = self.config.eval_batch_size
        logits = peer_logits(self.cohort, self.held_out, self.data, batch_size=size)
        self.method.before_epoch(logits, self.held_out.labels)

    def _save_within_epoch(self, done: int) -> None:
        if self.run_dir is None:
            return
        self._check_finite(float(self._so_far.totals["loss"]) / done)
        self._so_far.seconds = time.perf_counter() - self._started
        checkpoint.save(self.run_dir / run_folder.CHECKPOINT, self.state())

    def _check_finite(self, loss: float) -> None:
        """Raises before weights that are not finite get into a checkpoint."""
        self.train_step.wait()
        # The last step shows in no loss yet.
        tensors = [*self.cohort.state_dict().values(), *self.method.state_dict().values()]
        if not (math.isfinite(loss) and all_finite(tensors, self.device)):
            epoch = len(self.history)
            raise FloatingPointError(
                f"lr: expected a finite loss and weights, got loss {loss} in epoch {epoch + 1}; "
                "try a smaller learning rate or clip_grad_norm "
                f"(lr was {learning_rate(self.config, epoch):.3g})"
            )

    def _is_evaluated(self, epoch: int) -> bool:
        return (epoch + 1) % self.config.eval_every == 0 or epoch + 1 == self.config.epochs

    def evaluate(self) -> CohortAccuracy:
        """Accuracies on the test set, of networks as they are now; sets evaluation mode."""
        self.method.eval()
        if self.mean_images is not None:
            size = self.config.eval_batch_size
            set_class_means(self.cohort, self.mean_images, self.data, batch_size=size)
        return self._accuracy()

    def _accuracy(self) -> CohortAccuracy:
        try:
            return cohort_accuracy(
                self.cohort,
                self.data,
                batch_size=self.config.eval_batch_size,
                ensemble=self.method.ensemble,
            )
        except FloatingPointError as error:
            # A checkpoint is checked when it is read, so that these weights come from training.
            raise FloatingPointError(
                f"lr: expected networks with finite logits, got: {error}; try a smaller learning "
                "rate or clip_grad_norm"
            ) from None

    def _finish(self, run_dir: Path, result: RunResult) -> None:
        run_folder.write_result(run_dir, result, self.names, self._title())
        for i in range(len(self.cohort.peers)):
            self.export(i, run_dir / f"peer{i}")

    def _title(self) -> str:
        return f"{self.config.method} on {self.data.name}, seed {self.config.seed}"

    def export(self, peer: int, folder: Path) -> Path:
        """Writes one peer's bare backbone, see :func:`mclfast.train.export.export_backbone`."""
        self.train_step.wait()
        backbone = self.cohort.peers[peer].backbone
        network = None if self.own_parts else self.names[peer]
        description = self._description(peer)
        return export_backbone(backbone, folder, network=network, description=description)

    def _description(self, peer: int) -> dict[str, Any]:
        tested = evaluated(self.history[-1:])
        return describe(
            self.cohort.peers[peer].backbone,
            self.data,
            self.config,
            own_parts=self.own_parts,
            epochs=len(self.history),
            accuracy=tested[-1][f"acc_peer{peer}"] if tested else None,
        )

    def state(self) -> dict[str, Any]:
        """Everything that training changes, as tensors and plain values."""
        place = Place(self.step, self._so_far, self.history)
        return run_state.gather(self._identity(), self.train_step, place)

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from what :meth:`state` gave.

        Raises:
            ValueError: the state is of other settings, other data or other networks.
        """
        steps = len(self.sampler)
        place = run_state.restore(state, self._identity(), self.train_step, steps)
        self.step, self._so_far, self.history = place

    def _identity(self) -> Identity:
        names = {"cohort": list(self.names), "data": self.data.name}
        return Identity(self.config.to_values() | names | self.origin, data_facts(self.data))
