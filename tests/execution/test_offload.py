"""Peers in host memory: the same training, one peer on the device at a time."""

from __future__ import annotations

import functools
import io
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.equal_states import assert_same, meta_gradients, steps_of, tensors
from helpers.small_cohort import CASES, batches, in_float64, small_trainer
from helpers.two_places import DEVICE, HOST, Mixed, offloaded_in_two_places
from mclfast import methods
from mclfast._base.random import rng_restored
from mclfast.bilevel import gradient, param_vector
from mclfast.bilevel.param_vector import ParamVector
from mclfast.config import TrainConfig
from mclfast.execution.offload import PeerOffload
from mclfast.train.export import WEIGHTS
from mclfast.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

OFFLOAD = {"memory": "sequential", "offload": "peers"}


def fits(case: str) -> bool:
    method = methods.method_class(CASES[case].get("method", case))
    return not method.teacher and "topology" not in CASES[case]


FITTING = [case for case in CASES if fits(case)]


@pytest.mark.parametrize("case", FITTING)
def test_steps_equal_the_ordinary_ones(case: str):
    want = steps_of(in_float64(small_trainer(case)), 4)
    got = steps_of(in_float64(small_trainer(case, **OFFLOAD)), 4)
    for part in ("losses", "state"):
        assert_same(got[part], want[part], 1e-9)
    assert want["state"]["optimizer"]["state"]


class CountingOffload:
    """Counts the values of copies on the device that are alive."""

    def __init__(self, offload: PeerOffload) -> None:
        self.now = self.most = self.copies = 0
        fetch = offload.fetch

        def counted(tensor: Tensor) -> Tensor:
            copy = fetch(tensor)
            self.copies += 1
            self.now += copy.numel()
            self.most = max(self.most, self.now)
            weakref.finalize(copy.untyped_storage(), self.forget, copy.numel())
            return copy

        offload.fetch = counted  # type: ignore[method-assign]

    def forget(self, values: int) -> None:
        self.now -= values


def counted(trainer: Trainer) -> tuple[CountingOffload, int]:
    """A count for the trainer, and the values of the largest peer's parameters."""
    cohort = trainer.cohort
    assert cohort.offload is not None
    sizes = [
        sum(p.numel() for m in cohort.peer_modules(j) for p in m.parameters())
        for j in range(len(cohort.peers))
    ]
    return CountingOffload(cohort.offload), max(sizes)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_one_peer_at_a_time_is_on_the_device(amp: str):
    trainer = small_trainer("mcl", networks=4, amp=amp, **OFFLOAD)
    count, size = counted(trainer)
    homes = [p.data_ptr() for p in trainer.cohort.parameters()]
    before = [p.detach().clone() for p in trainer.cohort.parameters()]
    for images, batch in batches(trainer, 3):
        trainer.train_step(images, batch)
        assert count.now == 0
    # Parameters and momentum of one peer.
    assert size < count.most <= 2 * size
    assert [p.data_ptr() for p in trainer.cohort.parameters()] == homes
    assert not any(map(torch.equal, trainer.cohort.parameters(), before))
    assert all(p.grad is None for p in trainer.cohort.parameters())
    count.most = 0
    trainer.evaluate()
    assert count.now == 0 and count.most == size


def test_a_turn_is_a_few_large_copies():
    trainer = small_trainer("mcl", networks=2, channels_last=True, **OFFLOAD)
    count, _ = counted(trainer)
    first, second = batches(trainer, 2)
    trainer.train_step(*first)
    count.copies = 0
    trainer.train_step(*second)
    # Of each peer: its parameters for each of two passes, and its momentum.
    assert count.copies == 2 * 3
    for j in range(2):
        own = [p for m in trainer.cohort.peer_modules(j) for p in m.parameters()]
        state = [trainer.train_step.optimizer.state[p]["momentum_buffer"] for p in own]
        blocks = {t.untyped_storage().data_ptr() for t in (*own, *state)}
        assert len(blocks) == 2
        for some in (own, state):
            assert some[0].untyped_storage().nbytes() == sum(p.nbytes for p in own)
            kernels = [t for t in some if t.dim() == 4]
            assert kernels
            assert all(t.is_contiguous(memory_format=torch.channels_last) for t in kernels)


def test_a_checkpoint_holds_the_values_once():
    sizes = []
    for where in ({"memory": "sequential"}, OFFLOAD):
        trainer = small_trainer("mcl", networks=2, blocks=4, **where)
        steps_of(trainer, 1)
        state = trainer.state()
        file = io.BytesIO()
        torch.save([state["cohort"], state["optimizer"]], file)
        sizes.append(file.tell())
    # Less, as each tensor that does not share a block has a record of its own.
    assert sizes[1] < sizes[0]


def test_a_run_equals_one_that_keeps_its_peers_on_the_device(tmp_path: Path):
    settings: dict[str, Any] = {"weight_decay": 1e-2, "lr": 0.02}
    trainers = []
    for name, where in (("peers", OFFLOAD), ("none", {"memory": "sequential"})):
        # An epoch each way in turn: the checkpoints are the same.
        small_trainer("mcl", run_dir=tmp_path / name, **settings, **where).fit(
            progress=False, stop_after=1
        )
        last = small_trainer("mcl", run_dir=tmp_path / name, **settings, **OFFLOAD)
        last.fit(progress=False)
        trainers.append(last)
    one, other = (dict(tensors(t.state())) for t in trainers)
    for path, value in one.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            torch.testing.assert_close(other[path], value, rtol=1e-4, atol=1e-4, msg=path)
    assert trainers[0].history[-1]["step"] == 2 * len(trainers[0].sampler)
    for j, peer in enumerate(trainers[0].cohort.peers):
        weights = load_file(tmp_path / "peers" / f"peer{j}" / WEIGHTS)
        assert all(torch.equal(weights[k], v) for k, v in peer.backbone.state_dict().items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"memory": "ordinary"}, "^memory: expected sequential with offload peers, got ordinary"),
        ({"topology": "tree"}, "^topology: expected independent with offload peers, got tree"),
        ({"clip_grad_norm": 1.0}, "^clip_grad_norm: expected none, .* got 1.0"),
        ({"amp": "fp16"}, "^amp: expected off or bf16, .* got fp16"),
    ],
)
def test_what_excludes_peers_in_host_memory(values: dict[str, Any], message: str):
    base: dict[str, Any] = {"method": "baseline", **OFFLOAD}
    TrainConfig.from_values(base)
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_values(base | values)


@pytest.mark.parametrize(
    ("case", "values", "message"),
    [
        ("pcl", {"topology": "independent"}, "^offload: expected none .* average .* with PCL"),
        ("moco-mcl", {}, "^offload: expected none .* got peers with MomentumMCL"),
    ],
)
def test_methods_that_need_all_peers_at_a_time(case: str, values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        small_trainer(case, **values, **OFFLOAD)


# ---------------------------------------------------------------- the bilevel step

BILEVEL = {"bilevel_every": 1, "networks": 3}


@pytest.mark.parametrize("case", ["lmcl", "lmcl-bank"])
def test_bilevel_steps_equal_the_ordinary_ones(case: str):
    want = meta_gradients(in_float64(small_trainer(case, **BILEVEL)), 2)
    trainer = in_float64(small_trainer(case, **BILEVEL, **OFFLOAD))
    got = meta_gradients(trainer, 2)
    assert_same(got, want, 1e-10)
    assert all(g.abs().max() > 1e-3 for g in want)
    assert all(p.grad is None for p in trainer.cohort.parameters())


def test_a_bilevel_step_has_one_peer_on_the_device(monkeypatch: pytest.MonkeyPatch):
    waits: list[int] = []
    monkeypatch.setattr(PeerOffload, "wait", lambda _: waits.append(1))
    trainer = small_trainer("lmcl", **BILEVEL, **OFFLOAD)
    count, size = counted(trainer)
    (images, batch), *_ = batches(trainer, 1)
    trainer.train_step(images, batch)
    before = {n: t.clone() for n, t in trainer.cohort.state_dict().items()}
    homes = [p.data_ptr() for p in trainer.cohort.parameters()]
    count.most = 0
    waits.clear()
    trainer.train_step.bilevel(images, batch, 0.05)
    # For the parameters that the step before it sends home.
    assert waits == [1]
    assert count.now == 0 and count.most == size
    assert [p.data_ptr() for p in trainer.cohort.parameters()] == homes
    assert all(torch.equal(before[n], t) for n, t in trainer.cohort.state_dict().items())


def test_random_numbers_are_those_of_all_devices(monkeypatch: pytest.MonkeyPatch):
    """As if there were two GPUs: the parameters do not say which of them draws."""
    states = [torch.tensor([1]), torch.tensor([2])]
    for name, value in (
        ("is_initialized", lambda: True),
        ("device_count", lambda: 2),
        ("get_rng_state", lambda gpu: states[gpu].clone()),
        ("set_rng_state", lambda state, gpu: states[gpu].copy_(state)),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    with rng_restored():
        states[1] += 5
        torch.rand(1)
    assert torch.cat(states).tolist() == [1, 2]


def test_nothing_but_copies_comes_from_the_host_to_the_device():
    trainer = small_trainer("lmcl", **BILEVEL, **OFFLOAD)
    places = offloaded_in_two_places(trainer)
    (images, batch), *_ = batches(trainer, 1)
    places.put(DEVICE, (images, batch.labels, batch.index))
    vectors: list[ParamVector] = []

    class Recorded(ParamVector):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            vectors.append(self)

    with pytest.MonkeyPatch.context() as patch, places:
        trainer.train_step(images, batch)
        for module in (gradient, param_vector):
            patch.setattr(module, "ParamVector", Recorded)
        trainer.train_step.bilevel(images, batch, 0.05)
        # The watch sees what is not copied.
        with pytest.raises(Mixed):
            trainer.cohort.peers[0](images)
    # Parameters, momentum, directions and adjoints; zeros that were only read have no place.
    assert len(vectors) > 10
    assert {places.place(t) for v in vectors for t in v.tensors} - {None} == {HOST}
    assert all(places.place(p) == HOST for p in trainer.cohort.parameters())
    assert all(places.place(p) == DEVICE for p in trainer.method.meta_parameters())


def test_a_run_with_bilevel_steps():
    """In mixed precision too, and with convolutions in another layout."""
    runs = []
    for where in ({"memory": "sequential"}, OFFLOAD):
        settings = {"networks": 2, "epochs": 1, "bilevel_every": 5, "channels_last": True}
        trainer = small_trainer("lmcl", **settings, **where)
        trainer.fit(progress=False)
        runs.append(dict(tensors(trainer.method.state_dict())))
    for path, value in runs[0].items():
        torch.testing.assert_close(runs[1][path], value, rtol=1e-3, atol=1e-4, msg=path)
    trainer = small_trainer("lmcl", networks=2, bilevel_every=1, amp="bf16", **OFFLOAD)
    assert all(g.isfinite().all() and g.any() for g in meta_gradients(trainer, 1))


# ---------------------------------------------------------------- pinned memory, errors


def test_parameters_and_momentum_move_to_pinned_memory(monkeypatch: pytest.MonkeyPatch):
    """As if there were such memory here: a layout, a dtype or a checkpoint brings other memory."""
    pinned: set[int] = set()
    empty_like = torch.empty_like

    def allocate(tensor: Tensor, *, pin_memory: bool = False, **where: Any) -> Tensor:
        result = empty_like(tensor, **where)
        if pin_memory:
            pinned.add(result.untyped_storage().data_ptr())
        return result

    monkeypatch.setattr(torch, "empty_like", allocate)
    monkeypatch.setattr(Tensor, "is_pinned", lambda t: t.untyped_storage().data_ptr() in pinned)
    monkeypatch.setattr(PeerOffload, "_pins", lambda _: True)
    trainer = small_trainer("baseline", channels_last=True, **OFFLOAD)
    steps_of(trainer, 1)
    trainer.load_state(small_trainer("baseline").state())
    steps_of(trainer, 1)
    for p in trainer.cohort.parameters():
        assert p.is_pinned()
        assert trainer.train_step.optimizer.state[p]["momentum_buffer"].is_pinned()


def test_a_step_that_fails_is_not_taken(monkeypatch: pytest.MonkeyPatch):
    trainer = small_trainer("baseline", **OFFLOAD)
    (first, second) = batches(trainer, 2)
    trainer.train_step(*first)
    state = trainer.train_step.optimizer.state
    own = [p for m in trainer.cohort.peer_modules(0) for p in m.parameters()]
    before = [(p.detach().clone(), state[p]["momentum_buffer"]) for p in own]
    values = [buffer.clone() for _, buffer in before]
    step = torch.optim.SGD.step

    def failing(optimizer: torch.optim.SGD, *args: Any) -> None:
        if any(p.grad is not None for p in own):
            step(optimizer, *args)
            raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(
        trainer.train_step.optimizer,
        "step",
        functools.partial(failing, trainer.train_step.optimizer),
    )
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train_step(*second)
    for p, (weight, buffer), value in zip(own, before, values, strict=True):
        assert torch.equal(p, weight)
        assert state[p]["momentum_buffer"] is buffer and torch.equal(buffer, value)


def test_peers_that_share_modules_stay_on_the_device():
    cohort = small_trainer("one").cohort
    with pytest.raises(ValueError, match="^offload: expected none for peers that share modules"):
        PeerOffload(cohort, torch.device("cpu"))


def test_a_turn_ends_when_a_run_fails():
    trainer = small_trainer("baseline", **OFFLOAD)
    offload = trainer.cohort.offload
    assert offload is not None
    homes = [p.data_ptr() for p in trainer.cohort.parameters()]
    with pytest.raises(RuntimeError, match="size|channels"):
        trainer.cohort(torch.zeros(2, 7, 8, 8))
    assert [p.data_ptr() for p in trainer.cohort.parameters()] == homes
    with offload.present(1), pytest.raises(AssertionError, match="peer 1"), offload.present(0):
        pass
