"""Checkpoints: whole or absent, refused when damaged, foreign or of other settings."""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mclfast._base import files
from mclfast._base.random import rng_state, set_rng_state
from mclfast.config import TrainConfig
from mclfast.train import checkpoint
from mclfast.train.builder import build
from mclfast.train.trainer import Trainer

STATE = {"step": 3, "weights": torch.arange(6.0).view(2, 3), "history": [{"loss": 0.5}]}


pytestmark = pytest.mark.usefixtures("one_thread")


class Creates:
    """A pickle of this runs code that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def trainer(**values: Any) -> Trainer:
    small: dict[str, Any] = {
        "method": "lmcl",
        "cohort": "resnet8",
        "data": "digits-full",
        "train_per_class": 2,
        "batch_size": 20,
        "images_per_class": 2,
        "projection_dim": 4,
        "device": "cpu",
        "lr": 0.1,
        "seed": 0,
        "epochs": 60,
        "temperature": 0.1,
        "amp": "off",
    }
    if values.get("method") == "baseline":
        del small["temperature"]
    return build(TrainConfig.from_values(small | values))


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path / "new" / "c.pt", STATE)
    found = checkpoint.load(tmp_path / "new" / "c.pt")
    assert torch.equal(found.pop("weights"), STATE["weights"])
    assert found == {"format": checkpoint.FORMAT, "step": 3, "history": [{"loss": 0.5}]}


def test_an_error_while_writing_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    checkpoint.save(path, STATE)
    before = path.read_bytes()
    real = torch.save

    def broken(value: Any, file: Path) -> None:
        real(value, file)
        assert path.read_bytes() == before
        with file.open("r+b") as stream:
            stream.truncate(100)
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(path, {"step": 4})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.pt"]


def test_an_interruption_before_the_move_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    checkpoint.save(path, STATE)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"step": 4})
    assert checkpoint.load(path)["step"] == 3
    assert os.listdir(tmp_path) == ["c.pt"]


def test_text_and_json_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "half \ud800")
    assert json.loads(path.read_text()) == files.read_json(path, "test") == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="^checkpoint: expected a file .*c.pt, found none"):
        checkpoint.load(tmp_path / "c.pt")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.99])
def test_truncated(tmp_path, share):
    path = tmp_path / "c.pt"
    checkpoint.save(path, STATE)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="^checkpoint: expected an intact file") as error:
        checkpoint.load(path)
    assert str(path) in message(error)


@pytest.mark.parametrize(
    "content",
    [
        b"not a checkpoint",
        b"\x80\x02a.",
        b"\x80\x02u.",
        b"\x80\x02h\x07.",
        b"\x80\x02}q\x00.",
        pickle.dumps({"format": 1}, protocol=2)[:-2],
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_other_content(tmp_path, content):
    path = tmp_path / "c.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="^checkpoint: expected an intact file") as error:
        checkpoint.load(path)
    message(error)


@pytest.mark.parametrize(
    ("content", "found"),
    [({"format": 2}, "2"), ({"step": 1}, "None"), ([1, 2], "None"), (torch.zeros(2), "None")],
)
def test_wrong_format(tmp_path, content, found):
    torch.save(content, tmp_path / "c.pt")
    text = rf"^checkpoint: expected format {checkpoint.FORMAT} in .*c.pt, got {found}$"
    with pytest.raises(ValueError, match=text):
        checkpoint.load(tmp_path / "c.pt")


@pytest.mark.parametrize("plain", [True, False])
def test_code_in_a_checkpoint_is_not_run(tmp_path, plain):
    path, victim = tmp_path / "c.pt", tmp_path / "made"
    content = {"format": checkpoint.FORMAT, "step": Creates(victim)}
    if plain:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="^checkpoint: expected an intact file") as error:
        checkpoint.load(path)
    message(error)
    assert not victim.exists()
    # The file is a working trap: an ordinary reader walks into it.
    if plain:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert victim.exists()


def flip(path: Path) -> None:
    """Turns over one bit of a weight."""
    content = bytearray(path.read_bytes())
    place = content.index(STATE["weights"].numpy().tobytes())
    content[place + 7] ^= 0x40
    path.write_bytes(content)


def test_the_previous_checkpoint_takes_the_place_of_a_damaged_one(tmp_path):
    path = tmp_path / "c.pt"
    for step in (1, 2, 3):
        checkpoint.save(path, STATE | {"step": step})
    assert sorted(os.listdir(tmp_path)) == ["c.previous.pt", "c.pt"]
    assert checkpoint.load(checkpoint.previous_of(path))["step"] == 2
    flip(path)
    with pytest.raises(ValueError, match="^checkpoint: expected an intact file .*c.pt, got: other"):
        checkpoint.load(path)
    with pytest.warns(RuntimeWarning, match=r"file .*c.pt, got: other .*c\.damaged\.pt.* step 2"):
        assert checkpoint.load_newest(path)["step"] == 2
    # The next checkpoint displaces the damaged one, not the intact one.
    assert checkpoint.load(path)["step"] == 2
    checkpoint.save(path, STATE | {"step": 4})
    steps = [checkpoint.load(p)["step"] for p in (path, checkpoint.previous_of(path))]
    assert steps == [4, 2]
    with pytest.raises(checkpoint.DamagedError):
        checkpoint.load(checkpoint.damaged_of(path))


def test_two_damaged_checkpoints_are_both_named(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, STATE)
    flip(path)
    with pytest.raises(ValueError, match=r"c\.pt, got: .*no earlier one beside it") as error:
        checkpoint.load_newest(path)
    message(error)
    checkpoint.save(path, STATE)
    flip(path)
    with pytest.raises(ValueError, match=r"c\.pt, got: .*c\.previous\.pt, got: ") as error:
        checkpoint.load_newest(path)
    message(error)
    with pytest.raises(FileNotFoundError):
        checkpoint.load_newest(tmp_path / "d.pt")


def test_the_previous_checkpoint_takes_the_place_of_one_that_is_gone(tmp_path):
    path = tmp_path / "c.pt"
    for step in (1, 2):
        checkpoint.save(path, {"step": step})
    path.unlink()
    assert checkpoint.exists(path)
    with pytest.warns(RuntimeWarning, match=r"found none; the run goes on from .* it, step 1$"):
        assert checkpoint.load_newest(path)["step"] == 1
    assert sorted(os.listdir(tmp_path)) == ["c.previous.pt", "c.pt"]
    for place in checkpoint.all_of(path):
        place.unlink(missing_ok=True)
    assert not checkpoint.exists(path)
    with pytest.raises(FileNotFoundError):
        checkpoint.load_newest(path)


def test_the_previous_checkpoint_is_kept_where_files_have_one_name(tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(checkpoint.os, "link", refuse)
    path = tmp_path / "c.pt"
    for step in (1, 2):
        checkpoint.save(path, STATE | {"step": step})
    assert checkpoint.load(checkpoint.previous_of(path))["step"] == 1
    assert sorted(os.listdir(tmp_path)) == ["c.previous.pt", "c.pt"]


def test_checksums_are_written_though_the_program_turned_them_off(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        checkpoint.save(tmp_path / "c.pt", STATE)
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert zipfile.ZipFile(tmp_path / "c.pt").testzip() is None


def test_a_run_goes_on_from_the_newest_intact_checkpoint(tmp_path):
    whole = trainer(method="baseline", epochs=3)
    whole.fit(progress=False)

    def again() -> Trainer:
        config = TrainConfig.from_values(whole.config.to_values())
        return build(config, tmp_path)

    again().fit(progress=False, stop_after=2)
    content = bytearray((tmp_path / "checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 0x10
    (tmp_path / "checkpoint.pt").write_bytes(content)
    other = again()
    with pytest.warns(RuntimeWarning, match="checkpoint.pt, got: other content"):
        other.fit(progress=False)
    for name, value in whole.cohort.state_dict().items():
        assert torch.equal(value, other.cohort.state_dict()[name])
    # A finished run keeps no second checkpoint.
    kept = {path.name for path in tmp_path.glob("checkpoint*")}
    assert kept == {"checkpoint.pt", "checkpoint.damaged.pt"}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs the names of open files")
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events: list[tuple[str, str]] = []
    sync, replace = os.fsync, os.replace

    def name(number: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{number}")).name

    monkeypatch.setattr(files.os, "fsync", lambda n: (events.append(("sync", name(n))), sync(n)))
    monkeypatch.setattr(
        files.os, "replace", lambda a, b: (events.append(("name", b.name)), replace(a, b))
    )
    files.write_text(tmp_path / "new" / "a.txt", "a")
    partial = f".a.txt.{os.getpid()}.partial"
    expected = [("sync", tmp_path.name), ("sync", partial), ("name", "a.txt"), ("sync", "new")]
    assert events == expected


def test_a_file_has_the_mode_of_any_new_file(tmp_path):
    (tmp_path / "a").touch()
    with files.replacing(tmp_path / "b") as partial:
        partial.unlink()
        partial.touch(mode=0o600)
    checkpoint.save(tmp_path / "c.pt", STATE)
    modes = {(tmp_path / name).stat().st_mode for name in ("a", "b", "c.pt")}
    assert len(modes) == 1


def test_a_sealed_json_object_is_refused_when_it_was_changed(tmp_path):
    path = tmp_path / "a.json"
    value = {"a": (1, 2.5), "b": {"1": None, "c": "ä"}}
    files.write_sealed_json(path, value)
    text = path.read_text()
    assert files.read_json(path, "test") == {"a": [1, 2.5], "b": {"1": None, "c": "ä"}}
    path.write_text(text.replace("2.5", "2.7"))
    with pytest.raises(ValueError, match="^test: expected .*a.json as it was written.*blake2b"):
        files.read_json(path, "test")
    path.write_text(json.dumps({"a": 1}))
    assert files.read_json(path, "test") == {"a": 1}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_json_that_no_reader_takes(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="^test: expected JSON in .*a.json, got"):
        files.read_json(tmp_path / "a.json", "test")


def test_random_state_round_trip():
    before = rng_state()
    first = torch.rand(3)
    set_rng_state(before)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_random_state_of_a_machine_with_a_gpu(monkeypatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("there is no GPU to set")

    monkeypatch.setattr(torch.cuda, "set_rng_state", refuse)
    state = rng_state()._replace(cuda=[torch.zeros(16, dtype=torch.uint8)])
    set_rng_state(state)
    assert torch.equal(torch.get_rng_state(), state.cpu)


def test_state_round_trip_through_a_file(tmp_path):
    first = trainer()
    first.fit(progress=False, stop_after=1)
    checkpoint.save(tmp_path / "c.pt", first.state())
    second = trainer(eval_batch_size=10)
    second.load_state(checkpoint.load(tmp_path / "c.pt"))
    assert (second.step, second.history) == (first.step, first.history)
    for name, value in first.cohort.state_dict().items():
        assert torch.equal(value, second.cohort.state_dict()[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.2}, "^lr: expected 0.1 as in the checkpoint being resumed, got 0.2"),
        ({"seed": 1}, "^seed: expected 0 .*got 1"),
        ({"epochs": 7}, "^epochs: expected 60 .*got 7"),
        ({"temperature": 0.2}, "^temperature: expected 0.1 .*got 0.2"),
        ({"cohort": "resnet8,resnet8"}, r"^cohort: expected \['resnet8'\] .*got \['resnet8', "),
        ({"method": "baseline"}, "^method: expected 'lmcl' .*got 'baseline'"),
        ({"amp": "bf16"}, "^amp: expected 'off' .*got 'bf16'"),
    ],
)
def test_resuming_with_another_setting(changes, message):
    state = trainer().state()
    other = trainer(**changes)
    weights = {k: v.clone() for k, v in other.cohort.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        other.load_state(state)
    assert all(torch.equal(v, weights[k]) for k, v in other.cohort.state_dict().items())


def test_where_a_run_computes_may_change():
    first = trainer()
    other = trainer(eval_batch_size=10, data_root="moved")
    other.config.device = "cpu:0"
    other.load_state(first.state())


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    """The state of a run after two of its epochs. Not to be changed."""
    run = trainer()
    run.fit(progress=False, stop_after=2)
    return run.state()


def changed(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of nested mappings and lists with another value at a place; ``...`` removes it."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(state, list):
        return [changed(v, rest, value) if i == key else v for i, v in enumerate(state)]
    new = dict(state) | {key: changed(state.get(key), rest, value)}
    return {k: v for k, v in new.items() if v is not ...}


BUFFER = ("optimizer", "state", 0, "momentum_buffer")
BIAS = ("cohort", "networks.0.auxiliary.1.classifier.bias")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("step",), -1, "expected an integer >= 0 as step in it, got -1"),
        (("step",), "2", "expected an integer >= 0 as step in it, got '2'"),
        (("step",), 10**12, "expected step 2 to 3 after 2 epochs of 1 steps, 60 in all, got 10000"),
        (("step",), 1, "expected step 2 to 3 after 2 epochs"),
        (("history",), "many", "expected a list of .* as history in it, got 'many'"),
        (("history",), [], "expected step 0 to 1 after 0 epochs"),
        (("history", 0), 5, "expected a list of .*, each names with values as history"),
        (("history", 1, "acc_mean"), "good", "expected a number .* as acc_mean in record 2 of "),
        (("history", 1, "acc_mean"), 400.0, "as acc_mean in record 2 of history, got 400.0"),
        (("history", 1, "acc_peer0"), ..., r"expected acc_peer0 \(.*\) in record 2 .*, got none"),
        (("history", 1, "epoch"), 7, "expected epoch 2 in record 2 of history, got 7"),
        (("history", 1, "step"), 7, "expected step 2 in record 2 of history, got 7"),
        (("history", 1, "seconds"), -1.0, "as seconds in record 2 of history, got -1.0"),
        (("rng", "cpu"), torch.zeros(3), "expected the state of a generator .* as cpu in rng"),
        (("rng", "cpu"), torch.zeros(3, dtype=torch.uint8), "expected 5056 bytes as cpu in rng"),
        (("rng",), ..., r"expected rng \(names with values\) in it, got none"),
        (("settings",), None, "as settings in it, got None"),
        (("data",), ["digits"], "as data in it, got "),
        (("epoch_so_far",), 3, "as epoch_so_far in it, got 3"),
        (("epoch_so_far", "seconds"), math.nan, "as seconds in epoch_so_far, got nan"),
        (("epoch_so_far", "totals"), {"loss": 1}, "expected a finite 0-dim tensor as loss in "),
        (("cohort",), [1], "as cohort in it, got "),
        (BIAS, torch.zeros(9), r"expected shape \[10\] of cohort.*classifier.bias, got \[9\]"),
        (BIAS, "zeros", r"expected shape \[10\] of cohort.*classifier.bias, got str"),
        (BIAS, torch.full((10,), math.nan), "expected finite values of cohort.*classifier.bias"),
        (BUFFER, torch.zeros(1), r"of momentum_buffer in state\[0\] of optimizer, got \[1\]"),
        (BUFFER, 0.5, r"of momentum_buffer in state\[0\] of optimizer, got float"),
        (BUFFER, ..., r"expected momentum_buffer \(a value as .*\) in state\[0\] of .*, got none"),
        (BUFFER, None, "a value as other parameters have as momentum_buffer in .*, got None"),
        (("optimizer", "param_groups", 0, "foreach"), "x", "true, false or null as foreach in "),
        (("history", 0, "lr"), -1.0, "expected a number >= 0 as lr in record 1 of history"),
        (("history", 0, "train_loss"), math.nan, "as train_loss in record 1 of history, got nan"),
        (("history", 0, "acc_peer0"), 99.0, "expected acc_mean 99 of the peers in record 1 of "),
        (("history", 0, "acc_peer0"), math.nan, "expected acc_mean nan of the peers in record 1"),
        (("history", 1, "acc_best_head_so_far"), 0.0, "expected acc_best_head_so_far >= .*, got 0"),
        (("optimizer", "state", 999), {}, r"expected \d+ parameters, got state\[999\] of "),
        (("optimizer", "param_groups"), [], r"expected \d param_groups in optimizer, got 0"),
        (("optimizer", "param_groups", 0, "momentum"), 0.5, "expected momentum 0.9 in .*, got 0.5"),
        (
            ("optimizer", "param_groups", 0, "params"),
            [0],
            r"expected \d+ params in param_groups\[0\] .*, got 1",
        ),
        (("optimizer",), 4, "expected names with values as optimizer in it, got 4"),
    ],
)
def test_states_that_lie(saved, path, value, message):
    other = trainer()
    before = {k: v.clone() for k, v in other.cohort.state_dict().items()}
    with pytest.raises(ValueError, match=f"^checkpoint: .*{message}"):
        other.load_state(changed(saved, path, value))
    assert (other.step, other.history) == (0, [])
    assert all(torch.equal(v, before[k]) for k, v in other.cohort.state_dict().items())


def test_older_states_lack_the_epoch_so_far(saved):
    other = trainer()
    other.load_state(changed(saved, ("epoch_so_far",), ...))
    assert other.step == 2
