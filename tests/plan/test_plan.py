"""The plan of a run's memory against the memory that runs take."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.command import call, error_of
from helpers.equal_states import assert_same
from helpers.small_cohort import batches, small_trainer
from helpers.two_places import DEVICE, offloaded_in_two_places
from mclfast._base.machine import free_memory, group_rooms
from mclfast._base.sizes import format_bytes, parse_bytes
from mclfast.bench import resident as measured
from mclfast.bench.resident import RESIDENT, allocated, in_child, make_step, predicted, steps_of
from mclfast.config import TrainConfig
from mclfast.plan import chooser as choosing
from mclfast.plan import planner as planning
from mclfast.plan import report
from mclfast.plan.chooser import BILEVEL_AT_MOST, MODES, SHARE, Need, choose
from mclfast.plan.estimate import BANK, DATA, PARAMETERS, Choice, Estimate, estimate
from mclfast.plan.planner import make_plan
from mclfast.plan.rehearsal import ACTIVATIONS, OPTIMIZER, rehearse, rehearse_bilevel
from mclfast.plan.sizes_of_data import facts, facts_of
from mclfast.plan.stand_in import stand_in_step
from mclfast.train.builder import build
from mclfast.train.folder import ENVIRONMENT
from mclfast.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

RESNETS = ",".join(["resnet8"] * 4)
# What makes glibc give every freed tensor back at once: its heap leaves no gaps then.
NO_HEAP = {"MALLOC_MMAP_THRESHOLD_": "262144"}


def config(**values: Any) -> TrainConfig:
    fixed = {"data": "digits", "sampler": "shuffle", "device": "cpu", "bilevel_every": 0}
    return TrainConfig.from_values(fixed | values)


def planned(c: TrainConfig, device: str = "cuda") -> Estimate:
    """Without the gaps of a CPU's heap, unless for a CPU."""
    known = facts(c)
    choice = Choice(c.memory, c.offload, c.amp)
    return estimate(stand_in_step(c, known), known, choice, c.batch_size, device=device)


def needed(trainer: Trainer, memory: str, *, bilevel: bool = True) -> int:
    """What the steps of a trainer add to what it keeps."""
    known, c = facts_of(trainer.data), trainer.config
    found = estimate(
        trainer.train_step, known, Choice(memory), c.batch_size, device="cpu", bilevel=bilevel
    )
    return found.total - found.kept


def comes_and_goes(e: Estimate) -> int:
    """What of a plan's peak was not there before the step."""
    total = e.bilevel or e.step
    return total - sum(e.parts.get(part, 0) for part in (PARAMETERS, BANK, DATA, OPTIMIZER))


# ---------------------------------------------------------------- against real peaks


@pytest.mark.parametrize(
    "values",
    [
        {"method": "baseline", "cohort": "resnet20", "batch_size": 32},
        {
            "method": "baseline",
            "cohort": "wrn_16_2,resnet8",
            "batch_size": 48,
            "memory": "checkpoint",
        },
        {"method": "lmcl", "cohort": "resnet8,resnet8", "batch_size": 64, "amp": "bf16"},
        {
            "method": "lmcl",
            "cohort": "resnet8",
            "batch_size": 16,
            "bilevel_every": 1,
            "inner_steps": 3,
        },
        {"method": "lmcl", "cohort": RESNETS, "batch_size": 40, "memory": "sequential"},
        {
            "method": "mcl",
            "cohort": RESNETS,
            "batch_size": 32,
            "loss": "bank",
            "num_negatives": 2048,
        },
        {"method": "moco-mcl", "cohort": "resnet8,resnet8", "batch_size": 64, "queue_size": 1024},
    ],
    ids=lambda v: "-".join(map(str, v.values()))[:60],
)
def test_within_15_percent_of_what_the_allocator_gives_out(values):
    c = config(**values)
    trainer = build(c)
    step = steps_of(trainer.train_step)
    for _ in range(2):
        step()
    assert comes_and_goes(planned(c)) == pytest.approx(allocated(step), rel=0.15)


@pytest.mark.slow
def test_resident_memory():
    # Much memory for little computing.
    values = {"method": "baseline", "cohort": ["shufflenet_v2_x0_5_cifar"], "batch_size": 64}
    tensors, process = predicted(make_step(values, 32))
    assert tensors > 150e6
    without_gaps = in_child(RESIDENT, values, 32, {**os.environ, **NO_HEAP})
    assert without_gaps == pytest.approx(tensors, rel=0.15)
    # What gaps glibc leaves by default, the plan knows only roughly.
    with_gaps = in_child(RESIDENT, values, 32, os.environ)
    assert with_gaps == pytest.approx(process, rel=0.35) and with_gaps > 1.05 * without_gaps


def test_the_command_that_measures_resident_memory(tmp_path, monkeypatch, capsys):
    def here(kind: str, values: Any, side: int, _: Any) -> int:
        # Processes that take seconds to start, see the test above.
        if kind == RESIDENT:
            return 200 << 20
        task = {"kind": kind, "values": values, "side": side, "threads": 1}
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(task)))
        measured.main()
        return int(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(measured, "in_child", here)
    command = Path(__file__).resolve().parents[2] / "bench" / "bench_resident.py"
    monkeypatch.setattr(sys, "argv", [str(command), "--quick", "--out", str(tmp_path)])
    runpy.run_path(str(command), run_name="__main__")
    (row,) = json.loads((tmp_path / "resident.json").read_text())["rows"]
    assert row["case"] in capsys.readouterr().out and row["resident"] == 200 << 20
    assert row["predicted_tensors"] == pytest.approx(row["allocated"], rel=0.15)
    assert 1.2 < row["predicted_resident"] / row["predicted_tensors"] < 1.6


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
    steps_of(trainer.train_step)()
    state = trainer.train_step.optimizer.state.values()
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
    """Those of a bilevel step: here far more than what one peer needs."""
    values = {"networks": 3, "bilevel_every": 1, "batch_size": 2, "images_per_class": 1}
    trainer = small_trainer("lmcl", **values, memory="sequential", offload="peers")
    places = offloaded_in_two_places(trainer)
    (images, batch), *_ = batches(trainer, 1)
    places.put(DEVICE, (images, batch.labels, batch.index))
    with places:
        trainer.train_step(images, batch)
        before = places.most = places.now[DEVICE]
        trainer.train_step.bilevel(images, batch, 0.05)
    planned_bytes = rehearse_bilevel(
        small_trainer("lmcl", **values).train_step,
        one_at_a_time=True,
        amp="off",
        batch_size=2,
        offload="peers",
    )
    assert planned_bytes == pytest.approx(places.most - before, rel=0.15)


# The others are rehearsed above.
@pytest.mark.parametrize("case", ["afd", "cl-ilr", "ffl", "kdcl", "kdcl-general", "mcl-okd", "pcl"])
def test_every_method_can_be_rehearsed(case):
    trainer = small_trainer(case)
    came = rehearse(
        trainer.train_step, memory="sequential", offload="none", amp="off", batch_size=8
    )
    assert came.step["activations"] > 8 * trainer.data.train.image_shape[1] ** 2
    # Only its Newton steps look at values.
    assert came.whole_loss == (case != "kdcl")


# ---------------------------------------------------------------- what fits


def test_the_largest_that_fits_fits_and_one_more_does_not():
    c = config(method="mcl", cohort="resnet8", batch_size=16, eval_batch_size=16)
    plan = make_plan(c, "cuda", 14 << 20, [Choice("ordinary")])
    (row,), limit = plan.rows, plan.limit
    assert limit == int(0.85 * (14 << 20))
    assert row.fits and row.estimate.total <= limit
    assert not make_plan(c, "cuda", row.estimate.total, [Choice("ordinary")]).rows[0].fits

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
    assert (values["device_memory"], values["batch_size"]) == (1 << 20, 128)
    assert (row["memory"], row["fits"], row["largest_batch"]) == ("ordinary", False, 0)
    assert sum(row["parts"].values()) == row["step"]
    assert row["total"] == max(row["step"], row["evaluation"])


def test_one_peer_at_a_time_more_peers_cost_a_bilevel_step_no_activations(monkeypatch):
    def bilevel(step, *, one_at_a_time, **_):
        peers = len(step.cohort.peers)
        return (100 + 10 * peers) << 20 if one_at_a_time else 100 * peers << 20

    monkeypatch.setattr(planning, "rehearse_bilevel", bilevel)
    c = config(method="lmcl", cohort="resnet8,resnet8", batch_size=8, bilevel_every=1)
    asked = [Choice("ordinary"), Choice("sequential")]
    rows = make_plan(c, "cuda", 1 << 30, asked).rows
    limit, kept = int(0.85 * (1 << 30)), [row.estimate.kept / 2 for row in rows]
    ordinary, sequential = (row.largest_cohort for row in rows)
    assert ordinary == limit // (100 * 2**20 + kept[0])
    assert sequential == pytest.approx((limit - 100 * 2**20) / (10 * 2**20 + kept[1]), rel=0.05)
    assert rows[0].largest_batch == pytest.approx(8 * limit / (200 << 20), rel=0.05)


@pytest.mark.parametrize(
    "settings, choice, reason",
    [
        (
            {"method": "pcl", "topology": "shared_stem"},
            Choice("sequential", "peers"),
            "topology: expected independent",
        ),
        (
            {"method": "moco-mcl"},
            Choice("sequential", "peers"),
            "offload: expected none for a method with a moving average",
        ),
        (
            {"method": "dml", "peers_parallel": "stack"},
            Choice("sequential"),
            "memory: expected ordinary with peers_parallel",
        ),
        (
            {"method": "dml", "compile_peers": True},
            Choice("checkpoint"),
            "memory: expected ordinary or sequential with compile_peers",
        ),
        (
            {"method": "dml", "cuda_graphs": True},
            Choice("checkpoint"),
            "memory: expected ordinary with cuda_graphs",
        ),
    ],
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else "",
)
def test_what_training_refuses_is_refused_with_its_reason(settings, choice, reason):
    c = config(cohort="resnet8,resnet8", batch_size=8, **settings)
    with pytest.raises(ValueError, match=f"^{reason}"):
        make_plan(c, "cuda", 1 << 30, [choice])


def test_what_is_refused_beside_what_is_not_is_left_out():
    c = config(method="dml", cohort="resnet8,resnet8", batch_size=8, peers_parallel="stack")
    plan = make_plan(c, "cuda", 1 << 30, [Choice("ordinary"), Choice("sequential")])
    assert [row.estimate.choice.memory for row in plan.rows] == ["ordinary"]
    ((left_out, why),) = plan.left_out
    assert left_out == Choice("sequential") and "peers_parallel" in why
    assert f"sequential: left out; {why}" in report.text(plan)


def test_what_a_recorded_step_uses_is_not_there_for_evaluation():
    c = config(method="dml", cohort="resnet8,resnet8", batch_size=8)
    plain, graphed = (
        make_plan(replace(c, cuda_graphs=on), "cuda", 1 << 30, [Choice("ordinary")]).rows[0]
        for on in (False, True)
    )
    e = plain.estimate
    assert e.total == e.evaluation > e.step
    assert graphed.estimate.total == e.evaluation + e.step - e.lasting
    assert graphed.largest_batch < plain.largest_batch


def test_offload_without_a_memory_mode_is_that_of_its_only_one(capsys):
    small = ("--method", "dml", "--cohort", "resnet8,resnet8", "--device-memory", "1GiB")
    assert call("plan", "--offload", "peers", "--json", *small) == 0
    (row,) = json.loads(capsys.readouterr().out)["choices"]
    assert (row["memory"], row["offload"]) == ("sequential", "peers")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("--device-memory", "8Gb"),
            "device_memory: expected a number and a unit, as 8GiB or 500MB, got '8Gb' "
            "(did you mean 'GB'?)",
        ),
        (("--device-memory", "0GiB"), "device_memory: expected at least one byte, got '0GiB'"),
        (("--cohort", "resnet33"), "cohort: expected a known name"),
        (("--batch", "many"), "batch_size: expected an integer, got 'many'"),
        (("--batch", "8", "--batch-size=9"), "batch: expected one of --batch and --batch-size"),
        (
            ("--memory", "sequential", "--peers-parallel", "stack"),
            "memory: expected ordinary with peers_parallel, got sequential",
        ),
        (("--memory", "small"), "memory: expected one of ordinary"),
        (("--device", "gpu"), "device: expected auto, cpu, cuda"),
        (("--data", "folder"), "root: expected the folder"),
    ],
)
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


@pytest.mark.parametrize(
    "size, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (1 << 20, "1.00 MiB"),
        (int(37.66 * 2**30), "37.7 GiB"),
        (512 << 20, "512 MiB"),
    ],
)
def test_sizes_as_text(size, text):
    assert format_bytes(size) == text


# ---------------------------------------------------------------- memory auto


def test_auto_takes_the_fastest_mode_that_fits(monkeypatch):
    trainer = build(config(method="mcl", cohort=RESNETS, batch_size=60))
    needs = {m: needed(trainer, m) for m in MODES}
    assert needs["ordinary"] > needs["checkpoint"] > needs["sequential"]
    monkeypatch.setattr(choosing._Steps, "need", lambda _, mode: Need(needs[mode]))
    for mode, size in needs.items():
        chosen = choose(trainer.train_step, facts_of(trainer.data), free=int(size / 0.85) + 2)
        assert chosen.memory == mode
        assert chosen.reason.startswith(f"{mode}: its steps fit into 85% of")
        assert format_bytes(size) in chosen.reason
    nothing = choose(trainer.train_step, facts_of(trainer.data), free=1000)
    assert nothing.memory == "sequential"
    assert "do not fit" in nothing.reason and "batch_size" in nothing.reason


def test_auto_with_bilevel_steps_rehearses_them_where_the_choice_hangs_on_it(monkeypatch):
    trainer = small_trainer("lmcl", bilevel_every=1)
    steps = {"ordinary": 1000, "checkpoint": 300, "sequential": 400}
    plain = {m: Estimate(Choice(m), 3, 8, {ACTIVATIONS: size}) for m, size in steps.items()}
    alone, together = 900, 3000
    rehearsed: list[bool] = []

    def bilevel(*_: Any, one_at_a_time: bool, **__: Any) -> int:
        rehearsed.append(one_at_a_time)
        return alone if one_at_a_time else together

    monkeypatch.setattr(choosing, "estimate", lambda _, __, choice, *___, **____: plain[choice[0]])
    monkeypatch.setattr(choosing, "rehearse_bilevel", bilevel)
    for limit, mode, fits, wanted in (
        (BILEVEL_AT_MOST * steps["ordinary"], "ordinary", True, []),
        (together, "ordinary", True, [False]),
        (together - 9, "checkpoint", True, [False, True]),
        (alone, "checkpoint", True, [True]),
        (alone - 9, "checkpoint", False, [True]),
        (1, "checkpoint", False, []),
    ):
        rehearsed.clear()
        chosen = choose(
            trainer.train_step, facts_of(trainer.data), free=math.ceil((limit + 1) / SHARE)
        )
        assert (chosen.memory, "do not fit" not in chosen.reason) == (mode, fits)
        assert rehearsed == wanted


def test_auto_takes_no_mode_that_the_run_cannot_have():
    trainer = small_trainer("dml", peers_parallel="stack")
    chosen = choose(trainer.train_step, facts_of(trainer.data), free=1000)
    assert chosen.memory == "ordinary" and "do not fit" in chosen.reason
    assert "memory: expected ordinary with peers_parallel" in chosen.reason


@pytest.mark.parametrize("case", ["lmcl-bank", "afd", "moco-mcl"])
def test_choosing_changes_nothing(case):
    trainer, other = small_trainer(case), small_trainer(case)
    rng = torch.get_rng_state()
    choose(trainer.train_step, facts_of(trainer.data))
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
        choose(trainer.train_step, facts_of(trainer.data))


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
    assert group_rooms("0::/a/b\n", tmp_path) == [700]


def test_room_in_control_groups_of_version_1(tmp_path):
    names = {"memory__limit_in_bytes": "500", "memory__usage_in_bytes": "600"}
    _group(tmp_path / "memory", **names)
    assert group_rooms("3:cpu,cpuacct:/x\n2:memory:/gone\n0::/\n", tmp_path) == [0]
