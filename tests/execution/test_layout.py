"""Settings that make a step faster: each gives the numbers of the plain step."""

from __future__ import annotations

import copy
import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.every_method import METHODS, first_batch, trainer_of
from mclfast import Cohort, models
from mclfast.cohort.outputs import Batch
from mclfast.config import TrainConfig
from mclfast.execution import cuda_graphs, layout, parallel
from mclfast.execution.cuda_graphs import GraphedStep
from mclfast.execution.parallel import equal_groups, separate, stacked
from mclfast.models.auxiliary import PeerNetwork, StageOutputs
from mclfast.train.export import load_backbone
from mclfast.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def peers_of(*names: str, **values: Any) -> list[PeerNetwork]:
    torch.manual_seed(0)
    return [PeerNetwork(models.create(n, num_classes=5, in_channels=3)).double() for n in names]


def total(outputs: list[StageOutputs]) -> Tensor:
    """Each output has a weight of its own."""
    tensors = [t for out in outputs for t in (*out.features, *out.logits, out.final_map)]
    return torch.stack([(i + 1) * t.pow(3).sum() for i, t in enumerate(tensors)]).sum()


# ---------------------------------------------------------------- stacked peers


@pytest.mark.parametrize(
    "names", [("resnet8",) * 3, ("resnet8", "wrn_16_2", "resnet8")], ids=["equal", "mixed"]
)
@pytest.mark.parametrize("own_views", [False, True], ids=["one-view", "own-views"])
def test_stacked_peers_equal_separate_ones(names: tuple[str, ...], own_views: bool):
    """Gradients and batch norm statistics after two steps, in float64."""
    x = torch.randn(4 if own_views else 1, 4, 3, 16, 16, dtype=torch.float64)
    views = [x[i % len(x)] for i in range(len(names))] if own_views else [x[0]] * len(names)
    states = []
    for run in (separate, stacked):
        peers = peers_of(*names)
        for _ in range(2):
            outputs = run(peers, views)
        total(outputs).backward()
        grads = [p.grad for peer in peers for p in peer.parameters()]
        states.append([*grads, *(b for peer in peers for b in peer.buffers())])
    for plain, found in zip(*states, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12 * float(plain.abs().max()))


def test_a_stacked_step_trains_the_peers_themselves():
    plain, fast = (doubled(trainer_of("mcl", peers_parallel=way)) for way in ("off", "stack"))
    for step in range(2):
        for trainer in (plain, fast):
            images, batch = first_batch(trainer, step)
            trainer.train_step(images.double(), batch)
    same_modules(plain, fast, 1e-10)


def test_which_peers_are_equal():
    narrow, wide = (
        models.staged(
            nn.Sequential(nn.Conv2d(3, c, 3), nn.AdaptiveAvgPool2d(1), Flat(c)),
            ["0"],
            tail=["1"],
            classifier="2.fc",
        )
        for c in (4, 6)
    )
    peers = peers_of("resnet8", "resnet20", "resnet8")
    assert equal_groups([*peers, PeerNetwork(narrow)]) == [[0, 2], [1], [3]]
    assert equal_groups([PeerNetwork(narrow), PeerNetwork(wide)]) == [[0], [1]]
    # A setting that no module prints, and batch norm in another mode.
    peers[2].backbone.conv1.padding_mode = "circular"
    assert equal_groups(peers) == [[0], [1], [2]]
    one, other = peers_of("resnet8", "resnet8")
    other.backbone.bn1.eval()
    assert equal_groups([one, other]) == [[0], [1]]


class Flat(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def test_auto_keeps_the_fastest_and_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    monkeypatch.setattr(layout, "_tell", told.append)
    # As if a GPU ran stacked networks faster: the time of each way is given.
    times = {"separate": 3.0, "partial": 2.0}
    timed = parallel._timed

    def given(way: Any, *args: Any) -> float:
        timed(way, *args)
        return times[type(way).__name__ if way is not separate else "separate"]

    monkeypatch.setattr(parallel, "_timed", given)
    plain, fast = (trainer_of("mcl", peers_parallel=way) for way in ("off", "auto"))
    for trainer in (plain, fast):
        trainer.train_step(*first_batch(trainer))
    assert fast.cohort.run_together.chosen == "stack"
    assert told == ["peers_parallel: auto chose stack (off 3000.0 ms, stack 2000.0 ms)"]
    same_modules(plain, fast, 1e-4)


def test_auto_really_times():
    told: list[str] = []
    peers = [p.float() for p in peers_of("resnet8", "resnet8")]
    run = parallel.way_to_run("auto", peers, CPU, report=told.append)
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        run(peers, [x, x])
    assert not told
    run(peers, [x, x])
    assert run.chosen in ("off", "stack") and len(told) == 1
    # Nothing to choose from where all networks differ.
    alone = parallel.way_to_run("auto", peers[:1], CPU, report=told.append)
    assert list(alone.ways) == ["off"]


def test_auto_goes_on_without_ways_that_fail():
    told: list[str] = []
    peers = [p.float() for p in peers_of("resnet8", "resnet8")]
    for peer in peers:
        for module in peer.modules():
            if isinstance(module, nn.BatchNorm2d):
                # Its forward run reads the number of batches on the host.
                module.momentum = None
    x = torch.randn(4, 3, 8, 8)
    run = parallel.way_to_run("auto", peers, CPU, report=told.append)
    run(peers, [x, x])
    assert run.chosen == "off" and "stack fails: vmap" in told[0]
    assert all(int(b) == 1 for b in peers[0].buffers() if b.dtype == torch.int64)
    # What is wrong with the networks themselves is an error.
    run = parallel.way_to_run("auto", peers, CPU, report=told.append)
    with pytest.raises(RuntimeError, match="channels"):
        run(peers, [x[:, :2]] * 2)
    assert all(int(b) == 1 for b in peers[0].buffers() if b.dtype == torch.int64)


def test_auto_times_each_way_with_its_own_casts():
    peers = [p.float() for p in peers_of("resnet8", "resnet8")]
    x = torch.randn(4, 3, 8, 8)
    casts = []
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            with CountCasts() as count:
                parallel._timed(separate, peers, [x, x])
            casts.append(count.casts)
    assert casts[0] == casts[1] > 0


class CountCasts(TorchDispatchMode):
    casts = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.casts += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peers_parallel": "streams"}, "peers_parallel: expected a CUDA device for streams"),
        (
            {"peers_parallel": "stack", "cohort": "resnet8,resnet20"},
            "peers_parallel: expected at least two equal networks for stack, got 2 that all differ",
        ),
        (
            {"peers_parallel": "auto", "topology": "shared_stem"},
            "peers_parallel: expected independent networks",
        ),
        (
            {"compile_peers": True, "topology": "shared_stem"},
            "compile_peers: expected independent networks",
        ),
        ({"peers_parallel": "auto", "compile_peers": True}, "peers_parallel: expected off with"),
        ({"peers_parallel": "stack", "memory": "sequential"}, "memory: expected ordinary with"),
        (
            {"compile_peers": True, "memory": "sequential", "offload": "peers"},
            "offload: expected none with compile_peers, got peers",
        ),
        ({"cuda_graphs": True}, "cuda_graphs: expected a CUDA device, got cpu"),
        ({"cuda_graphs": True, "amp": "fp16"}, "cuda_graphs: expected false with amp fp16"),
        ({"cuda_graphs": True, "compile_peers": True}, "cuda_graphs: expected false with compile"),
        ({"peers_parallel": "both"}, "peers_parallel: expected one of off, auto, stack, streams"),
    ],
)
def test_settings_that_do_not_go_together(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        trainer_of("dml", **values)


# ---------------------------------------------------------------- channels last


def test_channels_last_is_a_layout_and_no_more(tmp_path: Path):
    plain, fast = (doubled(trainer_of("mcl", channels_last=on)) for on in ("off", "on"))
    for trainer in (plain, fast):
        images, batch = first_batch(trainer)
        outputs, _ = trainer.train_step.compute(images.double(), batch)
        assert outputs.maps[0].is_contiguous(
            memory_format=torch.channels_last if trainer is fast else torch.contiguous_format
        )
    for (name, p), q in zip(plain.cohort.named_parameters(), fast.cohort.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-10, msg=name)
    fast.cohort.float()
    weight = fast.cohort.peers[0].backbone.layer2[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    # A checkpoint of one layout fits the other.
    fast.load_state(trainer_of("mcl", channels_last="off").state())
    assert weight.is_contiguous(memory_format=torch.channels_last)
    exported = load_backbone(fast.export(0, tmp_path)).network
    assert torch.equal(exported.layer2[0].conv1.weight, weight)


@pytest.mark.parametrize(
    ("setting", "device", "amp", "wanted"),
    [
        ("auto", "cpu", "off", True),
        ("auto", "cpu", "bf16", True),
        ("auto", "cuda", "off", False),
        ("auto", "cuda", "bf16", True),
        ("on", "cuda", "off", True),
        ("off", "cpu", "off", False),
    ],
)
def test_where_channels_last_is_the_default(setting: str, device: str, amp: str, wanted: bool):
    config = TrainConfig.from_values({"channels_last": setting, "amp": amp})
    assert layout.wants_channels_last(config, torch.device(device)) == wanted


# ---------------------------------------------------------------- compiled peers


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without code generation, which takes a minute; what is traced is the same."""
    torch._dynamo.reset()
    compiler = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(layout.torch, "compile", compiler)


@pytest.mark.parametrize("memory", ["ordinary", "sequential"])
def test_compiled_peers_train_evaluate_export_and_resume(
    memory: str, quick_compiler: None, tmp_path: Path
):
    settings = {"memory": memory, "epochs": 2, "train_per_class": 4}
    plain, fast = (trainer_of("mcl", compile_peers=on, **settings) for on in (False, True))
    torch._dynamo.utils.counters.clear()
    for trainer in (plain, fast):
        trainer.fit(progress=False)
    same_modules(plain, fast, 1e-4)
    # Equal peers share what is compiled; in sequential mode there are runs without a gradient, and
    # runs with it on the peer's own buffers or on kept ones.
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= (1 if memory == "ordinary" else 3)
    assert load_backbone(fast.export(1, tmp_path / "out")).network

    first, second = (
        trainer_of("mcl", compile_peers=True, **settings),
        trainer_of("mcl", **settings),
    )
    first.run_dir = second.run_dir = tmp_path
    first.fit(progress=False, stop_after=1)
    second.fit(progress=False)
    same_modules(plain, second, 1e-4)


def test_the_reason_why_nothing_compiles(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError("no C++ compiler\nfound")

    monkeypatch.setattr(layout.torch, "compile", broken)
    reason = "compile_peers: expected torch.compile to work on cpu here, got OSError: no C.. compil"
    with pytest.raises(RuntimeError, match=reason):
        trainer_of("dml", compile_peers=True)


# ---------------------------------------------------------------- CUDA graphs


def on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorder that runs the call: warm-up and replays are as on a GPU."""

    def record(call: Any) -> Any:
        call()
        call()
        parameters = inspect.getclosurevars(call).nonlocals["self"]._parameters
        grads = [p.grad for p in parameters]

        def replay() -> None:
            call()
            # A graph writes to the memory that it was recorded with.
            torch._foreach_copy_(grads, [p.grad for p in parameters])

        return replay

    monkeypatch.setattr(cuda_graphs, "CudaRecorder", lambda device: record)
    monkeypatch.setattr("mclfast.execution.modes.check_graphs", lambda *_: None)


@pytest.mark.parametrize("name", ["mcl", "kdcl minlogit"])
def test_recorded_steps_equal_plain_ones(name: str, monkeypatch: pytest.MonkeyPatch):
    """What is around the graph: inputs copied in, buffers kept in the warm-up, gradients found."""
    on_any_device(monkeypatch)
    plain, fast = (
        trainer_of(name, cuda_graphs=on, epochs=2, train_per_class=4) for on in (False, True)
    )
    assert isinstance(fast.train_step.compute, GraphedStep)
    for trainer in (plain, fast):
        trainer.fit(progress=False)
    same_modules(plain, fast, 0.0)
    assert plain.history[-1]["train_loss"] == fast.history[-1]["train_loss"]


def test_a_recorded_step_keeps_its_shapes(monkeypatch: pytest.MonkeyPatch):
    on_any_device(monkeypatch)
    trainer = trainer_of("dml", cuda_graphs=True)
    images, batch = first_batch(trainer)
    first = trainer.train_step(images, batch)
    kept = {name: value.clone() for name, value in first.items()}
    small = Batch(batch.labels[:8], batch.index[:8], 1, 0)
    with pytest.raises(ValueError, match=r"images: expected shapes \[\[20, 1, 16, 16\], \[20\], "):
        trainer.train_step(images[:8], small)
    trainer.train_step(*first_batch(trainer, 1))
    assert all(torch.equal(first[name], value) for name, value in kept.items())


class Untimed(Batch):
    """A batch whose step and epoch nobody may ask for."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("step", "epoch"):
            raise AssertionError(f"the loss read {name}")
        return super().__getattribute__(name)


@pytest.mark.parametrize("name", METHODS)
def test_which_losses_are_the_same_in_every_step(name: str):
    trainer = trainer_of(name)
    wanted = {"baseline", "dml", "cl-ilr", "mcl", "lmcl"}
    wanted |= {f"kdcl {teacher}" for teacher in ("naive", "minlogit", "general")}
    assert trainer.method.repeatable == (name in wanted)
    if not trainer.method.repeatable:
        with pytest.raises(ValueError, match="^cuda_graphs: expected a method whose loss is the"):
            cuda_graphs.check_graphs(
                trainer.config, trainer.method, "ordinary", torch.device("cuda")
            )
        return
    images, batch = first_batch(trainer)
    outputs = trainer.cohort(images)
    first, second = (
        trainer.method.loss(outputs, b)["loss"]
        for b in (Untimed(batch.labels, batch.index, 0, 0), batch)
    )
    assert torch.equal(first, second)


def test_graphs_need_the_ordinary_memory_mode():
    trainer = trainer_of("dml", memory="sequential")
    with pytest.raises(ValueError, match="^memory: expected ordinary with cuda_graphs, got seq"):
        cuda_graphs.check_graphs(
            trainer.config, trainer.method, trainer.train_step.memory, torch.device("cuda")
        )


# ---------------------------------------------------------------- in common


def doubled(trainer: Trainer) -> Trainer:
    trainer.cohort.double()
    trainer.method.double()
    return trainer


def same_modules(plain: Trainer, fast: Trainer, tolerance: float) -> None:
    """The same names, and the same values."""
    for a, b in ((plain.cohort, fast.cohort), (plain.method, fast.method)):
        ours, theirs = a.state_dict(), b.state_dict()
        assert list(ours) == list(theirs)
        for name, value in ours.items():
            torch.testing.assert_close(
                theirs[name], value, rtol=tolerance, atol=tolerance, msg=name
            )


def test_settings_of_speed_may_change_between_the_parts_of_a_run():
    slow = trainer_of("dml").state()
    trainer_of("dml", peers_parallel="stack", channels_last="on").load_state(slow)


def test_bilevel_steps_and_evaluation_run_plainly():
    trainer = trainer_of("lmcl", peers_parallel="stack", matcher_dim=8)
    calls: list[int] = []
    run = trainer.cohort.run_together

    def counted(*args: Any) -> Any:
        calls.append(1)
        return run(*args)

    trainer.cohort.run_together = counted
    images, batch = first_batch(trainer)
    trainer.train_step.bilevel(images, batch, 0.1)
    trainer.evaluate()
    assert not calls and trainer.cohort.run_together is counted
    trainer.cohort.train()
    trainer.train_step(images, batch)
    assert calls == [1]


def test_a_cohort_runs_plainly_unless_told():
    cohort = Cohort([models.create("resnet8", num_classes=3) for _ in range(2)])
    assert cohort.run_alone is None and cohort.run_together is None
    layout.arrange(copy.deepcopy(cohort), TrainConfig(), CPU)
