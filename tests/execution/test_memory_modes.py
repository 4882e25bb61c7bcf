"""Memory modes of a step: all equal the ordinary one, in gradients, buffers and random numbers."""

from __future__ import annotations

import dataclasses
import functools
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from helpers.equal_states import assert_same, meta_gradients, steps_of, tensors
from helpers.live_memory import peak_of
from helpers.small_cohort import CASES, SmallBlock, batches, in_float64, small_trainer
from mclfast import methods
from mclfast.cohort.cohort import Cohort
from mclfast.cohort.outputs import Batch, PeerOutputs
from mclfast.execution.parts import make_sgd
from mclfast.models import staged
from mclfast.train import checkpoint
from mclfast.train.folder import CHECKPOINT
from mclfast.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = ["checkpoint", "sequential"]


@functools.cache
def ordinary(case: str, count: int, *, exact: bool = True) -> dict[str, Any]:
    """What ordinary steps of a case leave behind, in float64 or in float32."""
    trainer = small_trainer(case, clip_grad_norm=0.5)
    return steps_of(in_float64(trainer) if exact else trainer, count)


def test_every_method_has_a_case():
    named = {values.get("method", name) for name, values in CASES.items()}
    assert named == set(methods.available())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_a_step_equals_the_ordinary_one(case: str, mode: str):
    trainer = in_float64(small_trainer(case, clip_grad_norm=0.5, memory=mode))
    want, got = ordinary(case, 1), steps_of(trainer, 1)
    assert_same(got, want, 1e-12)
    # Statistics are updated once, from the same values in the same order.
    for name, buffer in trainer.cohort.named_buffers():
        assert torch.equal(buffer, want["state"]["cohort"][name]), name
        if name.endswith("num_batches_tracked"):
            assert int(buffer) > 0
    assert any(g is not None and g.any() for g in want["grads"].values())
    assert torch.equal(want["state"]["rng"]["cpu"], got["state"]["rng"]["cpu"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_steps_equal_the_ordinary_ones(case: str, mode: str):
    got = steps_of(in_float64(small_trainer(case, clip_grad_norm=0.5, memory=mode)), 3)
    assert_same(got, ordinary(case, 3), 1e-9)


@pytest.mark.parametrize(
    ("topology", "networks"), [("independent", 2), ("shared_stem", 2), ("tree", 3)]
)
def test_bilevel_steps_equal_the_ordinary_ones(topology: str, networks: int):
    """With dropout in what the networks share; they run one at a time in all modes but one."""
    settings = {"topology": topology, "networks": networks, "bilevel_every": 1}
    want, got = (
        meta_gradients(in_float64(small_trainer("lmcl", memory=memory, **settings)), 1)
        for memory in ("ordinary", "sequential")
    )
    assert_same(got, want, 1e-10)
    assert all(g.abs().max() > 1e-3 for g in want)


def gradient_error(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Norm of the error of all gradients, relative to their norm."""
    pairs = [(found["grads"][n], g) for n, g in wanted["grads"].items() if g is not None]
    error, size = (
        torch.stack([v.double().square().sum() for v in values]).sum().sqrt()
        for values in ([a.double() - b.double() for a, b in pairs], [b for _, b in pairs])
    )
    return float(error / size)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_float32_gradients_are_as_exact_as_the_ordinary_ones(case: str, mode: str):
    trainer = small_trainer(case, clip_grad_norm=0.5, memory=mode)
    own = gradient_error(ordinary(case, 1, exact=False), ordinary(case, 1))
    assert 0 < own < 1e-3
    assert gradient_error(steps_of(trainer, 1), ordinary(case, 1)) <= 1.5 * own


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["lmcl", "one", "moco-mcl"])
def test_mixed_precision(case: str, mode: str):
    settings: dict[str, Any] = {"amp": "bf16", "clip_grad_norm": 0.5}
    eager = steps_of(small_trainer(case, **settings), 1)
    other = steps_of(small_trainer(case, **settings, memory=mode), 1)
    own = gradient_error(eager, ordinary(case, 1))
    assert own > 1e-3
    # Not the same roundings, but as many, and no cast weight without its gradient.
    assert gradient_error(other, eager) <= own
    assert gradient_error(other, ordinary(case, 1)) <= 1.5 * own


def test_loss_scaling():
    def run(memory: str) -> dict[str, Any]:
        trainer = in_float64(small_trainer("dml", memory=memory))
        trainer.train_step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        return steps_of(trainer, 3)

    want = run("ordinary")
    for mode in MODES:
        assert_same(run(mode)["state"], want["state"], 1e-9)


class Adapted(nn.Module):
    """A network that is no StagedNetwork, with a layer that changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 3, 4)
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
                for a, b in pairwise(widths)
            )
        )
        self.fc = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(functional.dropout(self.body(x).mean((2, 3)), 0.3, self.training))


@pytest.mark.parametrize("mode", MODES)
def test_adapted_networks(mode: str):
    def run(memory: str) -> dict[str, Any]:
        torch.manual_seed(0)
        networks = [staged(Adapted(), ["body.0", "body.1"]) for _ in range(3)]
        model = small_trainer("lmcl")
        cohort = Cohort(networks, projection_dim=4)
        config = dataclasses.replace(model.config, memory=memory)
        method = type(model.method)(cohort.feature_dims, config.options)
        return steps_of(in_float64(Trainer(cohort, method, model.data, config)), 2)

    assert_same(run(mode), run("ordinary"), 1e-10)


def test_checkpointing_leaves_a_forward_of_an_object_where_it_was():
    trainer = small_trainer("baseline", memory="checkpoint")
    block = next(m for m in trainer.cohort.modules() if isinstance(m, SmallBlock))
    forward, calls = block.forward, []

    def own(x: Tensor) -> Tensor:
        calls.append(1)
        return forward(x)

    block.forward = own
    for step in range(2):
        trainer.train_step(*batches(trainer, 1)[0])
        # Forward and backward.
        assert len(calls) == 2 * (step + 1)
    assert block.forward is own


@pytest.mark.parametrize("own_statistics", [True, False], ids=["spectral-norm", "frozen-norm"])
@pytest.mark.parametrize("mode", MODES)
def test_networks_with_buffers_of_other_kinds(mode: str, own_statistics: bool):
    """A forward run that reads a buffer that it changes, and batch norm in evaluation mode."""

    def run(memory: str) -> dict[str, Any]:
        trainer = small_trainer("dml", memory=memory)
        torch.manual_seed(1)
        for peer in trainer.cohort.peers:
            for block in [m for m in peer.modules() if isinstance(m, SmallBlock)]:
                if own_statistics:
                    torch.nn.utils.spectral_norm(block.conv)
                else:
                    block.norm.train = lambda _=True: None
                    block.norm.eval()
                    block.norm.running_mean.normal_()
        trainer.train_step.optimizer = make_sgd(trainer.config, list(trainer.cohort.parameters()))
        return steps_of(in_float64(trainer), 2)

    assert_same(run(mode), run("ordinary"), 1e-10)


def peaks(mode: str, case: str = "dml") -> list[int]:
    """Bytes that a step of 2 and of 5 peers adds at its peak."""
    found = []
    for networks in (2, 5):
        trainer = small_trainer(
            case, networks=networks, memory=mode, blocks=4, batch_size=20, images_per_class=2
        )
        first, second = batches(trainer, 2)
        trainer.train_step(*first)
        trainer.train_step.optimizer.zero_grad()
        found.append(peak_of(lambda t=trainer, b=second: t.train_step(*b)))
    return found


@pytest.mark.parametrize("case", ["mcl", "mcl-okd"])
def test_memory_of_the_modes(case: str):
    eager, saved, sequential = (peaks(m, case) for m in ("ordinary", *MODES))
    # What a peer adds: nothing but its outputs and gradients.
    assert sequential[1] - sequential[0] < 0.05 * (eager[1] - eager[0])
    assert sequential[1] < eager[0]
    assert all(s < 0.5 * e for s, e in zip(saved, eager, strict=True))


def test_maps_are_kept_for_the_methods_that_read_them():
    seen: list[PeerOutputs] = []
    for case in CASES:
        trainer = small_trainer(case, memory="sequential")
        trainer.method.after_step = lambda outputs, _: seen.append(outputs)
        trainer.train_step(*batches(trainer, 1)[0])
        assert bool(seen[-1].maps) == (case in ("afd", "ffl", "one")), case


@pytest.fixture
def ran(monkeypatch) -> list[int]:
    """Numbers of the peers in the order they run."""
    numbers: list[int] = []
    run = Cohort.peer_forward

    def recorded(cohort: Cohort, peer: int, *args: Any, **kwargs: Any) -> PeerOutputs:
        numbers.append(peer)
        return run(cohort, peer, *args, **kwargs)

    monkeypatch.setattr(Cohort, "peer_forward", recorded)
    return numbers


@pytest.mark.parametrize(("networks", "again"), [(3, [0, 1]), (1, [])])
def test_the_last_peer_runs_once(networks: int, again: list[int], ran: list[int]):
    trainer = small_trainer("baseline", networks=networks, memory="sequential")
    ran.clear()
    trainer.train_step(*batches(trainer, 1)[0])
    assert ran == [*range(networks), *again]


def test_a_peer_without_gradient_is_not_run_again(ran: list[int]):
    trainer = small_trainer("baseline", networks=4, memory="sequential")
    ran.clear()
    trainer.method.loss = lambda outputs, _: {"loss": outputs.final_logits[1].square().sum()}
    trainer.train_step(*batches(trainer, 1)[0])
    assert ran == [0, 1, 2, 3, 1]
    grads = [[p.grad for p in peer.parameters()] for peer in trainer.cohort.peers]
    assert [all(g is not None for g in own) for own in grads] == [False, True, False, False]
    assert all(g is None for j in (0, 2, 3) for g in grads[j])


def test_auto_resolves_to_a_mode():
    trainer = small_trainer("baseline", memory="auto")
    assert trainer.train_step.memory == "ordinary"
    assert trainer.memory_reason.startswith("ordinary: ")


# ---------------------------------------------------------------- resuming within an epoch


def interrupted(trainer: Trainer, step: int) -> None:
    """Trains until a step is about to begin, and leaves as Ctrl-C does."""
    compute = trainer.train_step.compute

    def stopped(images: Any, batch: Batch) -> Any:
        if batch.step == step:
            raise KeyboardInterrupt
        return compute(images, batch)

    trainer.train_step.compute = stopped
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(progress=False)


@pytest.mark.parametrize("case", ["mcl-bank", "kdcl-general", "moco-mcl"])
def test_resuming_within_an_epoch_equals_the_uninterrupted_run(case: str, tmp_path: Path):
    settings: dict[str, Any] = {"memory": "sequential", "epochs": 2, "checkpoint_every": 3}
    whole = small_trainer(case, **settings)
    per_epoch = len(whole.sampler)
    assert per_epoch % 3 and per_epoch > 7
    whole.fit(progress=False)

    # Once in each epoch, at a step after the last checkpoint in it.
    for stop in (4, per_epoch + 5):
        interrupted(small_trainer(case, run_dir=tmp_path, **settings), stop)
        torch.rand(5)  # Another process would not stand at the same random number either.
        saved = checkpoint.load(tmp_path / CHECKPOINT)
        assert saved["step"] == stop - stop % 3
        assert saved["epoch_so_far"]["totals"] and saved["epoch_so_far"]["seconds"] > 0
    last = small_trainer(case, run_dir=tmp_path, **settings)
    last.fit(progress=False)
    want, got = (dict(tensors(t.state())) for t in (whole, last))
    assert want.keys() == got.keys()
    for path, value in want.items():
        same = torch.equal(got[path], value) if isinstance(value, Tensor) else got[path] == value
        assert same or path.endswith("/seconds"), path
    assert got["/history/1/seconds"] > 0 and not last.state()["epoch_so_far"]["totals"]


def test_checkpoints_within_an_epoch_are_those_asked_for(tmp_path: Path, monkeypatch):
    saved: list[int] = []
    monkeypatch.setattr(checkpoint, "save", lambda _, state: saved.append(state["step"]))
    trainer = small_trainer("baseline", run_dir=tmp_path, epochs=2, checkpoint_every=5)
    assert len(trainer.sampler) == 10
    trainer.fit(progress=False)
    # At steps 10 and 20 the checkpoints of the epochs.
    assert saved == [5, 10, 15, 20]


def test_no_checkpoint_within_an_epoch_holds_weights_that_are_not_finite(tmp_path: Path):
    trainer = small_trainer("baseline", run_dir=tmp_path, checkpoint_every=4)

    def broken(outputs: PeerOutputs, batch: Batch) -> None:
        if batch.step == 7:
            next(trainer.cohort.parameters()).data.fill_(float("nan"))

    trainer.method.after_step = broken  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="^lr: expected finite weights"):
        trainer.fit(progress=False)
    assert checkpoint.load(tmp_path / CHECKPOINT)["step"] == 4


@pytest.mark.parametrize("mode", ["ordinary", *MODES])
def test_a_run_may_go_on_in_another_mode(mode: str, tmp_path: Path):
    first = small_trainer("mcl", run_dir=tmp_path, checkpoint_every=3, memory="sequential")
    interrupted(first, 5)
    trainer = small_trainer("mcl", run_dir=tmp_path, memory=mode)
    assert trainer.fit(progress=False).history[-1]["step"] == 2 * len(trainer.sampler)
