"""The plan of a run's memory against the memory that runs take."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from real_peaks import NO_HEAP, allocated, resident, step_of
from two_places import DEVICE, offloaded_in_two_places

from command import call, error_of
from equal_states import assert_same
from mclfast.config import TrainConfig
from mclfast.plan import choose as choosing
from mclfast.plan import format_bytes, parse_bytes
from mclfast.plan.choose import choose, still_needed
from mclfast.plan.estimate import BANK, DATA, PARAMETERS, Choice, Estimate, estimate
from mclfast.plan.free_memory import _group_rooms, free_memory
from mclfast.plan.planner import make_plan
from mclfast.plan.rehearsal import OPTIMIZER, rehearse
from mclfast.plan.stand_in import facts, stand_in_trainer
from mclfast.run_folder import ENVIRONMENT
from mclfast.train import build
from small_cohort import batches, small_trainer

pytestmark = pytest.mark.usefixtures("one_thread")

RESNETS = ",".join(["resnet8"] * 4)
# Much memory for little computing.
SHUFFLENETS = "shufflenet_v2_x0_5_cifar,shufflenet_v2_x0_5_cifar"


def config(**values: Any) -> TrainConfig:
    fixed = {"data": "digits", "sampler": "shuffle", "device": "cpu", "bilevel_every": 0}
    return TrainConfig.from_values(fixed | values)


def planned(c: TrainConfig, device: str = "cuda") -> Estimate:
    """Without the gaps of a CPU's heap, unless for a CPU."""
    known = facts(c)
    choice = Choice(c.memory, c.offload, c.amp)
    return estimate(stand_in_trainer(c, known), known, choice, c.batch_size, device=device)


def comes_and_goes(e: Estimate) -> int:
    """What of a plan's peak was not there before the step."""
    total = e.bilevel or e.step
    return total - sum(e.parts.get(part, 0) for part in (PARAMETERS, BANK, DATA, OPTIMIZER))


# ---------------------------------------------------------------- against real peaks


@pytest.mark.parametrize(
    "values",
    [
        {"method": "baseline", "cohort": "resnet20", "batch_size": 32},
        {"method": "baseline", "cohort": "wrn_16_2,resnet8", "batch_size": 48,
         "memory": "checkpoint"},
        {"method": "lmcl", "cohort": "resnet8,resnet8", "batch_size": 64, "amp": "bf16"},
        {"method": "lmcl", "cohort": "resnet8", "batch_size": 32, "bilevel_every": 1},
        {"method": "lmcl", "cohort": RESNETS, "batch_size": 40, "memory": "sequential"},
        {"method": "mcl", "cohort": RESNETS, "batch_size": 32, "loss": "bank",
         "num_negatives": 2048},
        {"method": "moco-mcl", "cohort": "resnet8,resnet8", "batch_size": 64, "queue_size": 1024},
    ],
    ids=lambda v: "-".join(map(str, v.values()))[:60],
)  # fmt: skip
def test_within_15_percent_of_what_the_allocator_gives_out(values):
    c = config(**values)
    trainer = build(c)
    step = step_of(trainer)
    for _ in range(2):
        step()
    assert comes_and_goes(planned(c)) == pytest.approx(allocated(step), rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    "batch_size, environment, tolerance",
    # What gaps glibc leaves by default, the plan knows only roughly.
    [(512, NO_HEAP, 0.15), (128, {}, 0.35)],
    ids=["no-gaps", "gaps-of-the-heap"],
)
def test_resident_memory(batch_size, environment, tolerance):
    values = {"method": "mcl", "cohort": SHUFFLENETS, "data": "digits-full",
              "sampler": "shuffle", "device": "cpu", "batch_size": batch_size}  # fmt: skip
    plan = planned(TrainConfig.from_values(values), device="cuda" if environment else "cpu")
    # The process measured has its parameters before, and no momentum yet.
    want = comes_and_goes(plan) + plan.parts[OPTIMIZER]
    assert not environment or want > 500e6
    assert resident(values, environment) == pytest.approx(want, rel=tolerance)


def test_what_a_run_keeps_is_counted_exactly():
    c = config(method="mcl", cohort="resnet8,resnet20", loss="bank", num_negatives=64)
    trainer, plan = build(c), planned(c)
    nets = [*trainer.cohort.parameters(), *trainer.cohort.buffers(), *trainer.method.parameters()]
    assert plan.parts[PARAMETERS] == sum(t.nbytes for t in nets)
    bank, sampler = trainer.method.bank, trainer.method.sampler
    drawn = 2 * 8 * c.batch_size * (2 + 64)
    tables = sum(t.nbytes for t in (*bank.buffers(), *sampler.buffers()))
    assert plan.parts[BANK] == tables + drawn
    images = (trainer.data.train, trainer.data.test)
    assert plan.parts[DATA] == sum(s.images.nbytes + s.labels.nbytes for s in images)
    step_of(trainer)()
    state = trainer.optimizer.state.values()
    assert plan.parts[OPTIMIZER] == sum(s["momentum_buffer"].nbytes for s in state)


def test_a_set_without_files_is_taken_to_be_the_published_one():
    c = config(method="mcl", loss="bank", data="imagefolder", cohort="resnet8", batch_size=8)
    bank = planned(c).parts[BANK]
    assert bank == pytest.approx(1_281_167 * (128 * 4 + 3 * 4), rel=0.002)


def test_offloaded_peers_lie_in_host_memory():
    settings = {"method": "baseline", "cohort": RESNETS, "memory": "sequential"}
    here, away = planned(config(**settings)), planned(config(**settings, offload="peers"))
    count = sum(p.numel() for p in build(config(**settings)).cohort.parameters())
    assert away.host == 2 * 4 * count
    # Parameters and momentum of all, and gradients of all but one.
    assert here.step - away.step > 1.5 * 4 * count


def test_vectors_in_host_memory_are_not_on_the_device():
    """Those of a bilevel step: here many times what one peer needs."""
    values = {"networks": 6, "bilevel_every": 1, "batch_size": 2, "images_per_class": 1}
    away = {"memory": "sequential", "offload": "peers"}
    trainer = small_trainer("lmcl", **values, **away)
    places = offloaded_in_two_places(trainer)
    (images, batch), *_ = batches(trainer, 1)
    places.put(DEVICE, (images, batch.labels, batch.index))
    with places:
        trainer.train_step(images, batch)
        before = places.most = places.now[DEVICE]
        trainer.bilevel_step(images, batch, 0.05)
    came = rehearse(small_trainer("lmcl", **values), amp="off", batch_size=2, **away)
    print(places.most-before, came)
    assert 0.9 < came.bilevel / (places.most - before) < 1.1


# The others are rehearsed above.
@pytest.mark.parametrize("case", ["afd", "cl-ilr", "ffl", "kdcl", "kdcl-general", "mcl-okd", "pcl"])
def test_every_method_can_be_rehearsed(case):
    trainer = small_trainer(case)
    came = rehearse(trainer, memory="sequential", offload="none", amp="off", batch_size=8)
    assert came.step["activations"] > 8 * trainer.data.train.image_shape[1] ** 2
    # Only its Newton steps look at values.
    assert came.whole_loss == (case != "kdcl")


# ---------------------------------------------------------------- what fits


def test_the_largest_that_fits_fits_and_one_more_does_not():
    c = config(method="mcl", cohort="resnet8", batch_size=16, eval_batch_size=16)
    limit = 12 << 20
    (row,) = make_plan(c, "cuda", limit, [Choice("ordinary")]).rows
    assert row.fits and row.estimate.total <= limit

    def total(**values: Any) -> int:
        return planned(config(**c.to_values() | values)).total

    batch, cohort = row.largest_batch, row.largest_cohort
    assert total(batch_size=batch) <= 1.01 * limit
    assert total(batch_size=int(1.05 * batch)) > limit
    assert total(cohort=["resnet8"] * cohort) <= 1.01 * limit
    assert total(cohort=["resnet8"] * (cohort + 1)) > limit


def test_plan_as_text_and_as_json(capsys):
    arguments = ("plan", "--cohort", "resnet8", "--batch", "128", "--method", "baseline")
    assert call(*arguments, "--device-memory", "1GiB") == 0
    text = capsys.readouterr().out
    for word in ("ordinary", "checkpoint", "sequential + offload", "largest cohort", "1.00 GiB"):
        assert word in text
    assert "images_per_class" in text
    least = ("--device-memory", "1MiB", "--memory", "ordinary", "--json")
    assert call(*arguments, *least) == 1
    values = json.loads(capsys.readouterr().out)
    (row,) = values["choices"]
    assert (values["limit"], values["batch_size"]) == (1 << 20, 128)
    assert (row["memory"], row["fits"], row["largest_batch"]) == ("ordinary", False, 0)
    assert sum(row["parts"].values()) == row["step"]
    assert row["total"] == max(row["step"], row["evaluation"])


def test_settings_that_do_not_go_together_are_left_out_with_the_reason():
    c = config(method="pcl", cohort="resnet8,resnet8", topology="shared_stem")
    plan = make_plan(c, "cpu", 1 << 30, [Choice("sequential", "peers")])
    ((choice, reason),) = plan.left_out
    assert choice.offload == "peers" and reason.startswith("topology: expected independent")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--device-memory", "8Gb"),
         "device_memory: expected a number and a unit, as 8GiB or 500MB, got '8Gb' "
         "(did you mean 'GB'?)"),
        (("--device-memory", "0GiB"), "device_memory: expected at least one byte, got '0GiB'"),
        (("--cohort", "resnet33"), "cohort: expected a known name"),
        (("--batch", "many"), "batch_size: expected an integer, got 'many'"),
        (("--memory", "small"), "memory: expected one of ordinary"),
        (("--device", "gpu"), "device: expected auto, cpu, cuda"),
        (("--data", "folder"), "root: expected the folder"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(capsys, arguments, message):
    assert error_of(capsys, "plan", *arguments).startswith(message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_elsewhere_needs_a_size(capsys):
    text = error_of(capsys, "plan", "--device", "cuda")
    assert text.startswith("device_memory: expected a size for cuda")


@pytest.mark.parametrize(
    "text, size",
    [("8GiB", 8 << 30), ("500MB", 500_000_000), ("1.5 KiB", 1536), ("77", 77), ("3B", 3)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("size, text", [
    (0, "0 B"), (999, "999 B"), (1000, "0.98 KiB"), (1 << 20, "1.00 MiB"),
    (int(37.66 * 2**30), "37.7 GiB"), (512 << 20, "512 MiB"),
])  # fmt: skip
def test_sizes_as_text(size, text):
    assert format_bytes(size) == text


# ---------------------------------------------------------------- memory auto


def test_auto_takes_the_fastest_mode_that_fits(monkeypatch):
    trainer = build(config(method="mcl", cohort=RESNETS, batch_size=60))
    needs = {m: still_needed(trainer, m) for m in ("ordinary", "checkpoint", "sequential")}
    assert needs["ordinary"] > needs["checkpoint"] > needs["sequential"]
    monkeypatch.setattr(choosing, "still_needed", lambda _, memory: needs[memory])
    for mode, size in needs.items():
        chosen = choose(trainer, free=int(size / 0.85) + 2)
        assert chosen.memory == mode
        assert chosen.reason.startswith(f"{mode}: its steps fit into 85% of")
        assert format_bytes(size) in chosen.reason
    nothing = choose(trainer, free=1000)
    assert nothing.memory == "sequential"
    assert "do not fit" in nothing.reason and "batch_size" in nothing.reason


@pytest.mark.parametrize("case", ["lmcl-bank", "afd", "moco-mcl"])
def test_choosing_changes_nothing(case):
    trainer, other = small_trainer(case), small_trainer(case)
    rng = torch.get_rng_state()
    choose(trainer)
    assert torch.equal(torch.get_rng_state(), rng)
    before = copy.deepcopy(other.state())
    for one in (trainer, other):
        torch.set_rng_state(rng)
        one.train_step(*batches(one, 1)[0])
    assert_same(trainer.state(), other.state(), 0.0)
    with pytest.raises(AssertionError):
        assert_same(other.state(), before, 0.0)


def test_auto_is_printed_and_kept(tmp_path, capsys):
    run = ("train", "--run-dir", tmp_path, "--method", "baseline", "--cohort", "resnet8")
    assert call(*run, "--epochs", "1", "--memory", "auto", "--no-progress") == 0
    assert "memory ordinary: its steps fit into" in capsys.readouterr().out
    kept = json.loads((tmp_path / ENVIRONMENT).read_text())["memory"]
    assert kept["mode"] == "ordinary" and "free on cpu" in kept["reason"]


def test_auto_says_when_a_run_cannot_be_rehearsed():
    trainer = small_trainer("baseline")
    trainer.cohort.peers[0].register_forward_hook(lambda *_: float(torch.ones(()).item()) and None)
    with pytest.raises(ValueError, match="^memory: expected one of ordinary, .* got auto"):
        choose(trainer)


# ---------------------------------------------------------------- free memory


def test_free_memory_of_this_machine():
    assert 0 < free_memory(torch.device("cpu")) <= 1 << 46


def _group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_room_in_control_groups_of_version_2(tmp_path):
    _group(tmp_path / "a", memory__max="1000\n", memory__current="300\n")
    _group(tmp_path / "a" / "b", memory__max="max\n", memory__current="200\n")
    assert _group_rooms("0::/a/b\n", tmp_path) == [700]


def test_room_in_control_groups_of_version_1(tmp_path):
    names = {"memory__limit_in_bytes": "500", "memory__usage_in_bytes": "600"}
    _group(tmp_path / "memory", **names)
    assert _group_rooms("3:cpu,cpuacct:/x\n2:memory:/gone\n0::/\n", tmp_path) == [0]
