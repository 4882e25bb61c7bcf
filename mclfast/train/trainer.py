"""The training loop, in the order things happen.

    config = TrainConfig.from_values({"method": "lmcl", "data": "digits"})
    result = train(config, "runs/mine")          # build, train, evaluate, checkpoint, export

or with your own parts: ``Trainer(cohort, method, data, config, run_dir).fit()``.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from mclfast._base.machine import select_device
from mclfast._base.tensors import all_finite
from mclfast.cohort.cohort import Cohort
from mclfast.cohort.outputs import Batch
from mclfast.config import TrainConfig, learning_rate
from mclfast.data.dataset import Dataset
from mclfast.data.feed import TrainingFeed
from mclfast.data.subsets import hold_out
from mclfast.execution.non_finite import NonFiniteError
from mclfast.execution.parts import make_sampler
from mclfast.execution.step import TrainStep
from mclfast.methods.base import Method
from mclfast.models.staged import class_name
from mclfast.plan.chooser import choose
from mclfast.plan.sizes_of_data import facts_of
from mclfast.train import checkpoint, evidence
from mclfast.train import folder as run_folder
from mclfast.train import state as run_state
from mclfast.train.class_means import class_mean_images, mean_classifiers, set_class_means
from mclfast.train.evaluation import CohortAccuracy, cohort_accuracy, peer_logits
from mclfast.train.export import describe, export_backbone
from mclfast.train.history import RunResult, accuracies, evaluated, result_of
from mclfast.train.lock import check_held, hold
from mclfast.train.progress import progress_bar, set_back
from mclfast.train.rehearsal import rehearse_evaluation, rehearse_files
from mclfast.train.state import EpochSoFar, Identity, Place, data_facts

#: Steps in a row that may be left out, or rollbacks to one checkpoint, before a run ends.
BAD_STEPS = 10


class Stopped(KeyboardInterrupt):
    """A run has saved its state and left, as :meth:`Trainer.stop` asked."""


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

        if config.non_finite == "rollback" and self.run_dir is None:
            raise ValueError(
                "non_finite: expected raise or skip for a run without a folder, whose checkpoints "
                "it could go back to, got rollback"
            )
        self.history: list[dict[str, float]] = []
        self.step = 0
        self._so_far = EpochSoFar()
        self._left_out: frozenset[int] = frozenset()
        self._in_a_row = {"step": 0, "bilevel step": 0}
        self._kept_evidence = False
        self._placed = self._stop = False
        self._started = 0.0

    def fit(self, *, progress: bool = True, stop_after: int | None = None) -> RunResult:
        """Trains to the last epoch, from the checkpoint in ``run_dir`` if there is one.

        Args:
            progress: show a progress bar with the time left.
            stop_after: leave after this many epochs of this call, as an interruption would.

        Raises:
            NonFiniteError: a step made numbers that are infinite or NaN; the last checkpoint
                stays, and the step is kept for ``mclfast replay``.
            FloatingPointError: weights are not finite; the last checkpoint stays.
            Stopped: :meth:`stop` was called, and the state is saved.
            ValueError: another run writes into ``run_dir``; or what follows the training would
                fail: the evaluation, or, with a run_dir, the curves or an export.
            OSError: a file cannot be written, or ``run_dir`` was moved or deleted meanwhile.
        """
        if stop_after is not None and stop_after < 1:
            raise ValueError(f"stop_after: expected an integer >= 1 or None, got {stop_after!r}")
        self._rehearse()
        with nullcontext() if self.run_dir is None else hold(self.run_dir):
            return self._fit(progress, stop_after)

    def stop(self) -> None:
        """Asks :meth:`fit` to save and leave: after the step, or before the next evaluation batch.

        Fit for a handler of signals, and for another thread.
        """
        self._stop = True

    def resume(self) -> bool:
        """Goes to the checkpoint in ``run_dir``, where :meth:`fit` will go on.

        Returns:
            Whether there is one. If not, training begins with the first step.

        Raises:
            ValueError: a checkpoint of other settings or other data, or a damaged one.
        """
        self._placed = True
        path = None if self.run_dir is None else self.run_dir / run_folder.CHECKPOINT
        if path is None or not checkpoint.exists(path):
            return False
        # In host memory: beside the modules, a second copy of the banks may not fit the GPU.
        self.load_state(checkpoint.load_newest(path))
        return True

    def _fit(self, progress: bool, stop_after: int | None) -> RunResult:
        self._kept_evidence = False
        if self.run_dir is not None:
            self._resume_or_start(self.run_dir)
        first = len(self.history)
        last = self.config.epochs if stop_after is None else first + stop_after
        bar = progress_bar(
            f"{self.config.method} seed {self.config.seed}",
            steps=self.config.epochs * len(self.sampler),
            done=self.step,
            shown=progress,
        )
        try:
            while len(self.history) < min(last, self.config.epochs):
                try:
                    self._one_epoch(len(self.history), bar)
                except NonFiniteError as error:
                    self._roll_back_or_raise(error)
                    set_back(bar, self.step)
        finally:
            bar.close()
        result = result_of(self.history, len(self.cohort.peers))
        if self.run_dir is not None and len(self.history) == self.config.epochs:
            check_held(self.run_dir)
            self._finish(self.run_dir, result)
        return result

    def _rehearse(self) -> None:
        """Tries what follows the training, which is late to learn that it fails."""
        self._rehearse_evaluation()
        if self.run_dir is not None:
            rehearse_files(
                [(peer.backbone, self._description(i)) for i, peer in enumerate(self.cohort.peers)],
                self.names,
                self._title(),
            )

    def _rehearse_evaluation(self) -> None:
        if self.mean_images is not None:
            mean_classifiers(self.cohort)
        rehearse_evaluation(self.cohort, self.method, self.data)

    def _resume_or_start(self, run_dir: Path) -> None:
        placed = self._placed or self.resume()
        self._placed = False
        if not placed or not (run_dir / run_folder.CHECKPOINT).exists():
            memory = {"mode": self.train_step.memory, "reason": self.memory_reason}
            run_folder.write_start(run_dir, self._identity().settings, memory)
            if self.config.non_finite == "rollback":
                checkpoint.save(run_dir / run_folder.CHECKPOINT, self.state())

    def _one_epoch(self, epoch: int, bar: Any) -> None:
        """Trains and evaluates an epoch, and writes what came out."""
        self._started = time.perf_counter() - self._so_far.seconds
        record = self._train_epoch(epoch, bar)
        record |= accuracies(
            self._evaluate_or_leave() if self._is_evaluated(epoch) else None,
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
            check_held(self.run_dir)
            run_folder.write_epoch(self.run_dir, self.history, self.state())
            self._leave_if_asked()

    def _train_epoch(self, epoch: int, bar: Any) -> dict[str, float]:
        c = self.config
        lr = self.train_step.begin_epoch(epoch)
        done = self.step - epoch * len(self.sampler)
        if done == 0:
            self._tell_held_out()
        rows = self.sampler.epoch(epoch)
        for images, labels, index in self._batches(rows[done:]):
            self._take_step(images, Batch(labels, index, self.step, epoch))
            self.step += 1
            done += 1
            bar.update()
            wanted = c.checkpoint_every and self.step % c.checkpoint_every == 0
            if wanted and done < len(rows) and self.run_dir is not None:
                self._save()
            self._leave_if_asked()
        # Nothing before this in an epoch waits for the device, but for checkpoints within it.
        self._check_finite()
        counted = len(rows) - self._so_far.skipped
        if counted == 0:
            raise FloatingPointError(
                f"non_finite: expected a step of epoch {epoch + 1} with finite numbers, got none"
            )
        means = {f"train_{k}": float(v) / counted for k, v in self._so_far.totals.items()}
        skipped = {} if c.non_finite == "raise" else {"skipped_steps": self._so_far.skipped}
        return {
            "epoch": epoch + 1,
            "step": self.step,
            "lr": lr,
            **means,
            **skipped,
            **self.feed.throughput(),
        }

    def _batches(self, rows: Tensor) -> Iterator[tuple[Tensor | list[Tensor], Tensor, Tensor]]:
        try:
            yield from self.feed.batches(rows, first_step=self.step)
        except Exception:
            # A signal that goes to a group of processes ends those that read images, too.
            self._leave_if_asked()
            raise

    def _take_step(self, images: Tensor | list[Tensor], batch: Batch) -> None:
        """One step and, where it is time, a bilevel step; adds to the totals of the epoch."""
        if batch.step in self._left_out:
            self._so_far.skipped += 1
            return
        parts = self.train_step(images, batch)
        if self.train_step.skipped is not None:
            self._so_far.skipped += 1
            self._skip("step", self.train_step.skipped)
            return
        self._in_a_row["step"] = 0
        totals = self._so_far.totals
        for name, value in parts.items():
            totals[name] = totals.get(name, 0) + value.detach()
        if self.train_step.has_bilevel and batch.step % self.config.bilevel_every == 0:
            self.train_step.bilevel(images, batch)
            if self.train_step.skipped is not None:
                self._skip("bilevel step", self.train_step.skipped)
            else:
                self._in_a_row["bilevel step"] = 0

    def _skip(self, what: str, error: NonFiniteError) -> None:
        """Goes on after a step that was left out, unless there are too many in a row."""
        self._keep_evidence(error)
        self._in_a_row[what] += 1
        if self._in_a_row[what] > BAD_STEPS:
            raise error.with_advice(f"; the {BAD_STEPS} {what}s before it were left out as well")

    def _roll_back_or_raise(self, error: NonFiniteError) -> None:
        """Goes back to the last checkpoint, where that is set and has a chance to help."""
        kept = self._keep_evidence(error)
        advice = f"; mclfast replay {self.run_dir} shows the step again" if kept else ""
        if self.config.non_finite != "rollback" or self.run_dir is None:
            raise error.with_advice(advice) from None
        left_out = self._left_out | {error.finding.step}
        check_held(self.run_dir)
        self.resume()
        self._placed = False
        if sum(step >= self.step for step in left_out) > BAD_STEPS:
            raise error.with_advice(
                f"; {BAD_STEPS} rollbacks to step {self.step} did not help{advice}"
            ) from None
        self._left_out = left_out

    def _keep_evidence(self, error: NonFiniteError) -> bool:
        """Writes the first bad step of a call into the run folder; whether one is there."""
        if self.run_dir is None or self._kept_evidence:
            return self._kept_evidence
        # A full disk is no reason to hide what has happened before.
        with suppress(OSError):
            check_held(self.run_dir)
            images = self._images_of(error.batch) if error.images is None else error.images
            state = self.state() if error.before_update else None
            evidence.write(self.run_dir, error, images, state)
            self._kept_evidence = True
        return self._kept_evidence

    def _images_of(self, batch: Batch) -> Tensor | list[Tensor]:
        """The images of a step once more, which depend on nothing but its number."""
        row = self.sampler.epoch(batch.epoch)[batch.step - batch.epoch * len(self.sampler)]
        images, _, _ = next(self.feed.batches(row[None], first_step=batch.step))
        return images

    def _leave_if_asked(self) -> None:
        """Saves and leaves if :meth:`stop` was called."""
        if not self._stop:
            return
        self._stop = False
        if self.run_dir is not None and self._so_far != EpochSoFar():
            self._save()
        raise Stopped

    def _evaluate_or_leave(self) -> CohortAccuracy:
        """An evaluation that :meth:`stop` ends before its next batch."""
        handle = self.cohort.register_forward_pre_hook(lambda *_: self._leave_if_asked())
        try:
            return self.evaluate()
        except Exception:
            # As in a batch: what reads the images may be gone by the same signal.
            self._leave_if_asked()
            raise
        finally:
            handle.remove()

    def _tell_held_out(self) -> None:
        if self.held_out is None:
            self.method.before_epoch(None, None)
            return
        size = self.config.eval_batch_size
        logits = peer_logits(self.cohort, self.held_out, self.data, batch_size=size)
        self.method.before_epoch(logits, self.held_out.labels)

    def _save(self) -> None:
        """Writes a checkpoint within an epoch."""
        assert self.run_dir is not None
        self._check_finite()
        check_held(self.run_dir)
        self._so_far.seconds = time.perf_counter() - self._started
        checkpoint.save(self.run_dir / run_folder.CHECKPOINT, self.state())

    def _check_finite(self) -> None:
        """Raises before weights that are not finite get into a checkpoint."""
        self.train_step.check()
        # The update of the last step shows in no loss yet.
        tensors = [*self.cohort.state_dict().values(), *self.method.state_dict().values()]
        if not all_finite(tensors, self.device):
            epoch = len(self.history)
            raise FloatingPointError(
                f"lr: expected finite weights, got others after step {self.step} in epoch "
                f"{epoch + 1}; try a smaller learning rate or clip_grad_norm "
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
        measure = functools.partial(
            cohort_accuracy,
            self.cohort,
            self.data,
            batch_size=self.config.eval_batch_size,
            ensemble=self.method.ensemble,
        )
        try:
            return measure()
        except FloatingPointError as error:
            self._check_finite()
            # Batch statistics of few steps can do this to sound weights; training may go on.
            warnings.warn(
                f"epoch {len(self.history) + 1}: {error}; such images count as wrong",
                RuntimeWarning,
                stacklevel=2,
            )
            return measure(refuse_non_finite=False)

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
        place = Place(self.step, self._so_far, self.history, self._left_out)
        return run_state.gather(self._identity(), self.train_step, place)

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from what :meth:`state` gave.

        Raises:
            ValueError: the state is of other settings, other data or other networks.
        """
        place = run_state.restore(state, self._identity(), self.train_step, len(self.sampler))
        self.step, self._so_far, self.history, self._left_out = place

    def _identity(self) -> Identity:
        names = {"cohort": list(self.names), "data": self.data.name}
        return Identity(self.config.to_values() | names | self.origin, data_facts(self.data))
