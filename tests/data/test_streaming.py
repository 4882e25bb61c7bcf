"""Streamed image sets: views of an image, listing, worker processes, training from them."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from helpers.images import encoded, make_folder, make_shards, picture
from mclfast import data
from mclfast.bench.loader import LoaderRate, measure_loader
from mclfast.cli.main import main
from mclfast.config import TrainConfig
from mclfast.data import Augmentation, BalancedSampler
from mclfast.data.feed import TrainingFeed, evaluation_batches
from mclfast.data.source import Views
from mclfast.data.stream import decode
from mclfast.data.stream.imagefolder import Files, list_files
from mclfast.data.stream.streamed import StreamedSet, core_count
from mclfast.train.builder import build
from mclfast.train.trainer import Trainer

CPU = torch.device("cpu")
TIMES = ("seconds", "step_images_per_s", "data_wait_seconds", "step_seconds")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 12 test images of three classes. Not to be changed."""
    return make_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def roots(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same images as each kind of set. Not to be changed."""
    shards = make_shards(tmp_path_factory.mktemp("shards"), folder)
    return {"imagefolder": folder, "webdataset": shards}


def loaded(root: Path, workers: int = 0, **values: Any) -> data.Dataset:
    return data.load("imagefolder", root=root, workers=workers, **{"image_size": 16} | values)


def all_pixels(source: data.ImageSource, rows: Tensor, views: Views | None) -> Tensor:
    return torch.stack(list(source.pixels(rows, CPU, views=views)))


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ---------------------------------------------------------------- views of one image


def drawn_boxes(width: int, height: int, count: int) -> np.ndarray:
    boxes = [
        decode.random_box(width, height, decode.view_generator(0, step, 7)) for step in range(count)
    ]
    return np.array(boxes)


def test_crops_have_the_published_distribution():
    width, height, count = 500, 375, 4000
    left, top, right, bottom = drawn_boxes(width, height, count).T
    assert (left >= 0).all() and (top >= 0).all()
    assert (right <= width).all() and (bottom <= height).all()
    w, h = right - left, bottom - top
    share, log_ratio = w * h / (width * height), np.log(w / h)
    # Whole pixels: the bounds hold up to half a pixel of each side.
    assert 0.075 < share.min() < 0.09 and 0.97 < share.max() <= 1
    assert abs(log_ratio).max() < math.log(4 / 3) + 0.01

    # The definition, drawn at once: uniform area and log ratio among those that fit.
    generator = np.random.RandomState(1)
    area = generator.uniform(0.08, 1, 200_000)
    logs = generator.uniform(math.log(3 / 4), math.log(4 / 3), 200_000)
    sides = np.sqrt(area * width * height) * np.exp([logs / 2, -logs / 2])
    fits = (sides[0].round() <= width) & (sides[1].round() <= height)
    for got, want in ((share, area[fits]), (log_ratio, logs[fits])):
        spread = want.max() - want.min()
        quantiles = np.linspace(0.1, 0.9, 9)
        away = np.quantile(got, quantiles) - np.quantile(want, quantiles)
        assert abs(away).max() < 0.03 * spread
    # Every place is as likely.
    for start, room in ((left, width - w), (top, height - h)):
        place = start[room > 20] / room[room > 20]
        assert np.quantile(place, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.04)


@pytest.mark.parametrize(
    ("size", "box"), [((1000, 12), (492, 0, 508, 12)), ((12, 1000), (0, 492, 12, 508))]
)
def test_crop_of_an_image_too_narrow_for_any_draw(size, box):
    assert decode.random_box(*size, decode.view_generator(0, 0, 0)) == box


def first_index(mirrored: bool, boxes: Any = lambda box: True, size: Any = (50, 40)) -> int:
    """The number of an image that is mirrored or not at step 0, and whose crop suits."""
    for index in range(1000):
        generator = decode.view_generator(0, 0, index)
        is_mirrored = generator.random() < 0.5
        if is_mirrored == mirrored and boxes(decode.random_box(*size, generator)):
            return index
    raise AssertionError("no such view")


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("size", [20, 48])
def test_training_view_is_crop_resize_flip(mirrored, size):
    content = encoded(1, format="PNG")
    index = first_index(mirrored)
    got = decode.training_view(content, size, decode.view_generator(0, 0, index))
    generator = decode.view_generator(0, 0, index)
    generator.random()
    crop = picture(1).crop(decode.random_box(50, 40, generator))
    want = as_tensor(crop.resize((size, size), Image.Resampling.BILINEAR))
    want = want.flip(-1) if mirrored else want
    assert got.dtype == torch.uint8 and got.shape == (3, size, size)
    # At the border the filter may look beyond the crop, which a cut-out crop has lost.
    edge = 2
    inner = slice(edge, -edge)
    assert torch.equal(got[:, inner, inner], want[:, inner, inner])
    assert (got.int() - want.int()).abs().float().mean() < 2


def test_half_of_the_views_are_mirrored():
    mirrored = sum(decode.view_generator(5, 1, i).random() < 0.5 for i in range(2000))
    assert mirrored == pytest.approx(1000, abs=90)


@pytest.mark.parametrize("sides", [(50, 40), (40, 50), (44, 44), (333, 100), (20, 30)])
@pytest.mark.parametrize("size", [16, 28])
def test_evaluation_view_is_resize_and_centre_crop(sides, size):
    content = encoded(2, sides, "PNG")
    image = Image.open(io.BytesIO(content))
    target = round(size * 256 / 224)
    shorter = min(sides)
    resized = image.resize(
        tuple(int(target * side / shorter) for side in sides), Image.Resampling.BILINEAR
    )
    left, top = (round((side - size) / 2) for side in resized.size)
    want = as_tensor(resized.crop((left, top, left + size, top + size)))
    assert torch.equal(decode.evaluation_view(content, size), want)


def test_evaluation_at_224_resizes_to_256(monkeypatch):
    asked = []
    resize = Image.Image.resize

    def recorded(self, size, *arguments, **values):
        asked.append(size)
        return resize(self, size, *arguments, **values)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    content = encoded(2, (500, 375))
    assert decode.evaluation_view(content, 224).shape == (3, 224, 224)
    assert asked[-1] == (341, 256)


@pytest.mark.parametrize("sides", [(640, 480), (641, 483), (1283, 1277)])
def test_big_jpegs_are_decoded_smaller_but_not_too_small(sides, monkeypatch):
    size, content = 32, encoded(3, sides)
    full = Image.open(io.BytesIO(content)).convert("RGB")
    decoded = []
    plain = decode.picture.decoded

    def recorded(image):
        decoded.append(image.size)
        return plain(image)

    monkeypatch.setattr(decode.picture, "decoded", recorded)
    shrinks = set()
    for index in range(30):
        generator = decode.view_generator(0, 0, index)
        mirrored = generator.random() < 0.5
        left, top, right, bottom = box = decode.random_box(*sides, generator)
        got = decode.training_view(content, size, decode.view_generator(0, 0, index))
        shrink = round(sides[0] / decoded[-1][0])
        shrinks.add(shrink)
        assert min(right - left, bottom - top) / shrink >= size or shrink == 1
        want = as_tensor(full.resize((size, size), Image.Resampling.BILINEAR, box=box))
        want = want.flip(-1) if mirrored else want
        assert (got.int() - want.int()).abs().float().mean() < 2
    assert max(shrinks) >= 4

    evaluated = decode.evaluation_view(content, size)
    assert min(decoded[-1]) >= 37 and decoded[-1] != sides
    monkeypatch.setattr(decode, "_draft", lambda image, *shrinks: 1)
    assert (evaluated.int() - decode.evaluation_view(content, size).int()).abs().max() <= 8


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1"])
def test_other_modes_become_rgb(mode):
    file = io.BytesIO()
    picture(4).convert(mode).save(file, "TIFF" if mode == "CMYK" else "PNG")
    plain = io.BytesIO()
    Image.open(file).convert("RGB").save(plain, "PNG")
    want = decode.evaluation_view(plain.getvalue(), 32)
    assert torch.equal(decode.evaluation_view(file.getvalue(), 32), want)


# ---------------------------------------------------------------- listing


def test_listing(tmp_path):
    make_folder(tmp_path, classes=2, train=3, test=1)
    (tmp_path / "train" / "c0" / "notes.txt").write_text("x")
    (tmp_path / "train" / "c0" / "._00.JPEG").write_text("x")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "c1" / "a.PNG").write_bytes(encoded(9, format="PNG"))
    odd = os.path.join(os.fsencode(tmp_path), b"train", b"c1", b"\xff.jpg")
    with open(odd, "wb") as file:
        file.write(encoded(8))
    split = loaded(tmp_path)
    assert split.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert split.train.labels.dtype == torch.int64
    files, labels = list_files(tmp_path / "train", ["c0", "c1"])
    names = [os.path.relpath(files.path(i), os.fsencode(tmp_path)) for i in range(len(files))]
    assert names == [
        b"train/c0/00.JPEG",
        b"train/c0/01.JPEG",
        b"train/c0/02.JPEG",
        b"train/c1/00.JPEG",
        b"train/c1/01.JPEG",
        b"train/c1/02.JPEG",
        b"train/c1/a.PNG",
        b"train/c1/\xff.jpg",
    ]
    assert files.read(7) == encoded(8)
    assert torch.equal(labels, split.train.labels)


def test_dataset_attributes(folder):
    split = data.load("imagefolder", root=folder)
    assert (split.name, split.num_classes, split.class_names) == (
        "imagefolder",
        3,
        ("c0", "c1", "c2"),
    )
    assert (split.in_channels, split.image_size) == (3, 224)
    assert (split.mean, split.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert split.augmentation == Augmentation()
    assert (len(split.train), len(split.test)) == (24, 12)
    assert split.train.workers == core_count() >= 1
    moved = split.to("cpu")
    assert torch.equal(moved.train.labels, split.train.labels)
    BalancedSampler(split.train.labels, batch_size=6, images_per_class=2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda root: (root / "val").rename(root / "other"), FileNotFoundError, "train and"),
        (lambda root: (root / "val" / "c9").mkdir(), ValueError, "classes of train, got also c9"),
        (lambda root: (root / "train" / "c9").mkdir(), ValueError, "c9: expected at least one"),
    ],
)
def test_listing_refuses(change, error, message, tmp_path):
    change(make_folder(tmp_path, train=1, test=1))
    with pytest.raises(error, match=message):
        loaded(tmp_path)


def test_val_comes_before_test(tmp_path):
    make_folder(tmp_path, train=1, test=2)
    (tmp_path / "test").mkdir()
    assert len(loaded(tmp_path).test) == 6
    (tmp_path / "test").rmdir()
    (tmp_path / "val").rename(tmp_path / "test")
    assert len(loaded(tmp_path).test) == 6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 0}, "image_size: expected at least 1, got 0"),
        ({"workers": -1}, "workers: expected at least 0, got -1"),
        ({"workers": 1.5}, "workers: expected an integer or None, got 1.5"),
    ],
)
def test_refuses_numbers(values, message, folder):
    with pytest.raises(ValueError, match=message):
        loaded(folder, **values)


def test_without_pillow(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r'pip install "mclfast\[train\]"'):
        loaded(folder)


def test_train_per_class_takes_the_same_images_as_in_memory(folder):
    few, whole = loaded(folder, train_per_class=3), loaded(folder)
    assert few.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(few.test) == len(whole.test)
    folder_set = data.load("folder", root=folder, image_size=16)
    limited = data.load("folder", root=folder, image_size=16, train_per_class=3)
    kept = [
        next(i for i, image in enumerate(folder_set.train.images) if torch.equal(image, one))
        for one in limited.train.images
    ]
    want = all_pixels(whole.train, torch.tensor([kept]), None)
    assert torch.equal(all_pixels(few.train, torch.arange(9).view(1, 9), None), want)


def test_fingerprint_tells_the_files_apart(folder, tmp_path):
    again = loaded(make_folder(tmp_path)).train
    assert again.fingerprint == loaded(folder).train.fingerprint
    (tmp_path / "train" / "c1" / "00.JPEG").rename(tmp_path / "train" / "c1" / "99.JPEG")
    assert loaded(tmp_path).train.fingerprint != again.fingerprint
    assert again.subset(torch.arange(3)).fingerprint != again.fingerprint


# ---------------------------------------------------------------- batches


def test_batches_do_not_depend_on_the_workers(folder):
    rows = torch.randperm(24, generator=torch.Generator().manual_seed(0)).view(6, 4)
    sets = [loaded(folder, workers).train for workers in (0, 1, 2)]
    first, *others = (all_pixels(source, rows, Views(3, 10)) for source in sets)
    assert first.shape == (6, 4, 3, 16, 16) and first.dtype == torch.uint8
    assert all(torch.equal(first, other) for other in others)
    plain, *others = (all_pixels(source, rows, None) for source in sets)
    assert all(torch.equal(plain, other) for other in others)
    assert not torch.equal(plain, first)
    # From the middle, in another order within the batch, beside other images.
    for source in sets:
        assert torch.equal(all_pixels(source, rows[4:], Views(3, 14)), first[4:])
        assert torch.equal(all_pixels(source, rows[4:].flip(1), Views(3, 14)), first[4:].flip(1))
        assert torch.equal(all_pixels(source, rows[4:, :1], Views(3, 14)), first[4:, :1])


def test_views_differ_by_seed_step_and_image(folder):
    source = loaded(folder).train
    rows = torch.zeros(1, 1, dtype=torch.int64)
    base = all_pixels(source, rows, Views(0, 0))
    assert torch.equal(base, all_pixels(source, rows, Views(0, 0)))
    for other in (Views(1, 0), Views(0, 1)):
        assert not torch.equal(base, all_pixels(source, rows, other))
    states = {
        decode.view_generator(*key).random() for key in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0))
    }
    assert len(states) == 4


def test_the_views_never_change():
    generator = decode.view_generator(1, 2, 3)
    assert generator.random() == pytest.approx(0.09883514440345587, abs=1e-15)
    assert decode.random_box(500, 375, generator) == (71, 45, 419, 335)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pass_leaves_the_random_numbers_alone(workers, folder):
    source = loaded(folder, workers).train
    before = torch.get_rng_state()
    all_pixels(source, torch.arange(4).view(2, 2), Views(0, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pass_left_early_and_one_at_a_time(folder):
    source = loaded(folder, 1).train
    rows = torch.arange(24).view(6, 4)
    want = all_pixels(loaded(folder).train, rows, Views(0, 0))
    first = source.pixels(rows, CPU, views=Views(0, 0))
    assert torch.equal(next(first), want[0])
    assert torch.equal(all_pixels(source, rows, Views(0, 0)), want)
    with pytest.raises(RuntimeError, match="one pass over a streamed set at a time"):
        next(first)
    assert torch.equal(all_pixels(source, rows[1:], Views(0, 1)), want[1:])


def refusal(call: Any) -> str:
    """The text of a ValueError, without the traceback, which would keep the workers alive."""
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("no error")


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_files_are_named(workers, tmp_path):
    make_folder(tmp_path, train=3, test=1)
    split = loaded(tmp_path, workers)
    bad = tmp_path / "train" / "c1" / "01.JPEG"
    content = bad.read_bytes()
    rows = torch.arange(8).view(2, 4)
    for damage in (b"no image", content[: len(content) // 2], b"", None):
        bad.unlink(missing_ok=True)
        if damage is not None:
            bad.write_bytes(damage)
        for views in (None, Views(0, 0)):
            message = refusal(lambda views=views: all_pixels(split.train, rows, views))
            assert message.startswith(f"{bad}: expected a readable image, got ")
            assert "\n" not in message and "Traceback" not in message
    bad.write_bytes(content)
    assert all_pixels(split.train, rows, None).shape == (2, 4, 3, 16, 16)


def test_feed_gives_images_labels_and_numbers(folder):
    split = loaded(folder)
    rows = torch.tensor([[3, 20], [9, 0]])
    got = list(TrainingFeed(split, device=CPU, seed=4).batches(rows, first_step=7))
    pixels = all_pixels(split.train, rows, Views(4, 7))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (split.mean, split.std))
    for (images, labels, index), row, raw in zip(got, rows, pixels, strict=True):
        assert torch.equal(index, row)
        assert torch.equal(labels, split.train.labels[row])
        torch.testing.assert_close(images, (raw / 255 - mean) / std, atol=1e-5, rtol=1e-5)
    plain = TrainingFeed(split, device=CPU, seed=4, augmented=False).batches(rows, first_step=7)
    want = (all_pixels(split.train, rows, None) / 255 - mean) / std
    torch.testing.assert_close(torch.stack([b[0] for b in plain]), want, atol=1e-5, rtol=1e-5)


def test_evaluation_sees_every_image_once_in_order(folder):
    split = loaded(folder)
    batches = list(
        evaluation_batches(split.test, mean=split.mean, std=split.std, batch_size=5, device=CPU)
    )
    assert [len(labels) for _, labels in batches] == [5, 5, 2]
    assert torch.equal(torch.cat([labels for _, labels in batches]), split.test.labels)
    assert torch.cat([images for images, _ in batches]).shape == (12, 3, 16, 16)


# ---------------------------------------------------------------- times


class SlowReader:
    """Takes 10 ms of waiting for every file."""

    fingerprint = "slow"

    def __init__(self, count: int) -> None:
        self.content = encoded(0)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> bytes:
        time.sleep(0.01)
        return self.content


@pytest.mark.parametrize("views", [1, 2])
def test_waiting_for_data_and_steps(views):
    slow = StreamedSet(SlowReader(12), torch.zeros(12).long(), size=8, workers=0)
    split = data.Dataset("slow", slow, slow, 1, ("a",), (0.5,) * 3, (0.5,) * 3)
    feed = TrainingFeed(split, device=CPU, seed=0, views=views)
    assert feed.throughput() == {}
    for _ in range(2):
        started = time.perf_counter()
        for _ in feed.batches(torch.arange(12).view(3, 4), first_step=0):
            time.sleep(0.02)
        found = feed.throughput()
        passed = time.perf_counter() - started
        assert set(found) == set(TIMES[1:])
        assert found["data_wait_seconds"] >= 0.12 * views
        assert found["step_seconds"] >= 0.06
        # Each pass is counted by itself.
        total = found["data_wait_seconds"] + found["step_seconds"]
        assert total == pytest.approx(passed, abs=0.01)
        assert found["step_images_per_s"] == pytest.approx(12 / found["step_seconds"])


def test_a_step_left_by_an_exception_is_timed(folder):
    feed = TrainingFeed(loaded(folder), device=CPU, seed=0)
    for _ in feed.batches(torch.arange(8).view(2, 4), first_step=0):
        time.sleep(0.01)
        break
    found = feed.throughput()
    assert found["step_seconds"] >= 0.01
    assert found["step_images_per_s"] == pytest.approx(4 / found["step_seconds"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_a_gpu_are_those_of_the_cpu(folder):
    rows = torch.arange(24).view(6, 4)
    split = loaded(folder, 2)
    want = all_pixels(split.train, rows, Views(0, 0))
    on_gpu = split.to("cuda")
    got = torch.stack(list(on_gpu.train.pixels(rows, "cuda", views=Views(0, 0))))
    assert got.is_cuda and torch.equal(got.cpu(), want)
    _, labels, index = next(
        TrainingFeed(on_gpu, device=torch.device("cuda"), seed=0).batches(rows, first_step=0)
    )
    assert labels.is_cuda and index.is_cuda


@pytest.mark.parametrize(
    ("values", "bound"),
    [
        ({}, "workers: 4 workers on 8 cores, more of them help"),
        ({"cores": 4}, "cores: 4 workers on 4 cores, all at work"),
        ({"cores": 2, "seconds": 20.0}, "cores: 4 workers on 2 cores, all at work"),
        ({"workers": 0, "seconds": 40.0}, "workers: 0 workers on 8 cores, more of them help"),
        ({"read": 0.06}, "storage: 63% of an image's time is reading"),
        ({"seconds": 20.0}, "sharing: 4 workers on 8 cores could make 111 images/s"),
    ],
)
def test_what_bound_the_loader(values, bound):
    usual = dict(images=1000, seconds=10.0, read=0.001, view=0.035, workers=4, cores=8)
    found = LoaderRate(**usual | values)
    assert found.bound.startswith(bound)
    assert found.images_per_s == 1000 / values.get("seconds", 10)


def test_measure_loader(folder):
    found = measure_loader(loaded(folder).train, batch_size=5, budget=0.2)
    assert found.seconds >= 0.2
    assert found.images % 5 == 0 and found.images > 0
    assert found.read > 0 and found.view > 0
    with pytest.raises(ValueError, match=r"batch_size: expected a value in \[1, 24\], got 25"):
        measure_loader(loaded(folder).train, batch_size=25, budget=0.1)


def test_measure_loader_tells_slow_files_and_damaged_ones():
    reader = SlowReader(12)
    slow = StreamedSet(reader, torch.zeros(12).long(), size=8, workers=0)
    found = measure_loader(slow, batch_size=4, budget=0.2)
    assert 0.01 <= found.read < 1 and found.bound.startswith("storage: ")
    reader.content = b"no image"
    with pytest.raises(ValueError, match="^file 3: expected a readable image"):
        reader.describe = lambda index: "file 3"
        measure_loader(slow, batch_size=4, budget=0.2)


# ---------------------------------------------------------------- training


def settings(root: Path, **values: Any) -> TrainConfig:
    small = {
        "data": "imagefolder",
        "data_root": str(root),
        "image_size": 16,
        "workers": 0,
        "method": "lmcl",
        "cohort": "resnet8,resnet8",
        "batch_size": 6,
        "images_per_class": 2,
        "epochs": 2,
        "projection_dim": 8,
        "matcher_dim": 4,
        "bilevel_every": 3,
        "device": "cpu",
    }
    return TrainConfig.from_values(small | values)


def outcome(trainer: Trainer) -> dict[str, Any]:
    """What training changed, without the times."""
    state = trainer.state()
    history = [{k: v for k, v in row.items() if k not in TIMES} for row in state["history"]]
    return {"cohort": state["cohort"], "step": state["step"], "history": history}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    cohorts = a["cohort"].keys() == b["cohort"].keys() and all(
        torch.equal(value, b["cohort"][name]) for name, value in a["cohort"].items()
    )
    return cohorts and (a["step"], a["history"]) == (b["step"], b["history"])


@pytest.mark.parametrize("kind", ["imagefolder", "webdataset"])
def test_resuming_equals_the_uninterrupted_run(kind, roots, tmp_path):
    whole = build(settings(roots[kind], data=kind))
    whole.fit(progress=False)
    build(settings(roots[kind], data=kind), tmp_path).fit(progress=False, stop_after=1)
    torch.rand(3)
    second = build(settings(roots[kind], data=kind, workers=1), tmp_path)
    second.fit(progress=False)
    assert same(outcome(whole), outcome(second))
    assert len(second.history) == 2
    other = build(settings(roots[kind], data=kind, seed=1))
    other.fit(progress=False)
    assert not same(outcome(whole), outcome(other))


def test_both_kinds_train_alike(roots):
    runs = []
    for kind in ("imagefolder", "webdataset"):
        trainer = build(settings(roots[kind], data=kind, epochs=1))
        trainer.fit(progress=False)
        runs.append(outcome(trainer))
    assert same(*runs)


def test_resuming_with_other_files_is_refused(tmp_path):
    root = make_folder(tmp_path / "data")
    build(settings(root), tmp_path / "run").fit(progress=False, stop_after=1)
    (root / "train" / "c0" / "00.JPEG").rename(root / "train" / "c0" / "aa.JPEG")
    with pytest.raises(ValueError, match="training files: expected .* being resumed"):
        build(settings(root), tmp_path / "run").fit(progress=False)


def test_sets_in_memory_have_no_times(folder):
    result = build(settings(folder, data="folder", epochs=1)).fit(progress=False)
    assert not set(TIMES[1:]) & set(result.history[0])


def call(*arguments: str | Path) -> int:
    try:
        return main([str(a) for a in arguments])
    except SystemExit as leave:
        return int(leave.code or 0)


TINY = [
    "--image-size",
    "16",
    "--method",
    "baseline",
    "--cohort",
    "resnet8",
    "--batch-size",
    "6",
    "--images-per-class",
    "2",
    "--device",
    "cpu",
    "--no-progress",
]


@pytest.mark.parametrize(("kind", "workers"), [("imagefolder", "1"), ("webdataset", "0")])
def test_command_line(kind, workers, roots, tmp_path, capsys):
    run = tmp_path / "run"
    where = ["--data", kind, "--data-root", roots[kind], "--workers", workers]
    assert call("train", *where, *TINY, "--epochs", "2", "--run-dir", run) == 0
    printed = capsys.readouterr().out
    assert f"{kind}: 24 training and 12 test images, 3 classes, 3 x 16 x 16" in printed
    assert re.search(
        r"last epoch  steps [\d.]+ images/s; "
        r"waited [\d.]+ s for data beside [\d.]+ s of steps",
        printed,
    )
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert len(rows) == 2
    for row in rows:
        waited, steps = float(row["data_wait_seconds"]), float(row["step_seconds"])
        assert waited >= 0 and steps > 0
        assert float(row["step_images_per_s"]) == pytest.approx(24 / steps)

    assert call("eval", run, "--device", "cpu", "--workers", "0") == 0
    line = capsys.readouterr().out
    shown = re.search(r": ([\d.]+) % of 12 test images \(recorded in training: ([\d.]+) %", line)
    assert shown and shown[1] == shown[2]
    assert call("export", run, "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "backbone.safetensors").is_file()


def test_bench_loader(roots, capsys):
    for kind, root in roots.items():
        arguments = ["--data", kind, "--data-root", root, "--batch-size", "8", "--workers", "0"]
        more = ["--image-size", "16", "--budget", "0.2"]
        assert call("bench", "--loader", *arguments, *more) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"{kind}: 24 training images")
        assert re.match(r"arriving +[\d.]+ images/s of 16 x 16, batches of 8, 0 workers", lines[1])
        assert re.match(r"one image +[\d.]+ ms reading, [\d.]+ ms decoding", lines[2])
        assert re.match(r"workers +[\d.]+ images/s", lines[3])
        assert re.match(r"bound by +(workers|cores|storage|sharing): ", lines[4])
    assert call("bench", "--loader") == 2
    assert "data: expected imagefolder or webdataset" in capsys.readouterr().err
    assert call("bench", "--loader", "--data", "digits") == 2
    assert "which is in memory" in capsys.readouterr().err


def session_members(session: int) -> set[int]:
    """Processes of a session that have not ended."""
    members = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            members.add(int(stat.parent.name))
    return members


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_ended_run_leaves_no_process(number, folder, tmp_path):
    command = [sys.executable, "-W", "error::DeprecationWarning", "-m", "mclfast", "train"]
    where = ["--data", "imagefolder", "--data-root", str(folder), "--workers", "2"]
    run = tmp_path / "run"
    process = subprocess.Popen(
        [*command, *where, *TINY, "--epochs", "100000", "--run-dir", str(run)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in its background has them ignore interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        until = time.monotonic() + 60
        while not (run / "metrics.csv").exists() and time.monotonic() < until:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        # The main process, the server, and two workers for each of training and test.
        assert len(session_members(process.pid)) >= 6
        if number == signal.SIGKILL:
            process.send_signal(number)
        else:
            # A scheduler may send its signal to all processes, those that read images included.
            os.killpg(process.pid, number)
        until = time.monotonic() + 60
        while (process.poll() is None or session_members(process.pid)) and (
            time.monotonic() < until
        ):
            time.sleep(0.05)
        assert session_members(process.pid) == set()
        if number != signal.SIGKILL:
            assert process.returncode == 128 + number, process.stderr.read()
            lines = process.stderr.read().split("\n")
            reason = "interrupted" if number == signal.SIGINT else "ended by SIGTERM"
            assert [line for line in lines if line] == [
                f"{reason}; go on with: mclfast train --resume {run}"
            ]
    finally:
        for member in session_members(process.pid):
            os.kill(member, signal.SIGKILL)
        process.wait()


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="has no server of workers")
def test_the_server_of_workers_outlives_the_signals_of_a_group(folder):
    images = loaded(folder, workers=1).test
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    scale = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    batches = evaluation_batches(images, **scale, batch_size=2, device=CPU)
    first = next(batches)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    server = forkserver._forkserver._forkserver_pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(server, number)
    assert len(first[1]) + sum(len(labels) for _, labels in batches) == len(images)
    # Nothing to be waited for: it runs.
    assert os.waitpid(server, os.WNOHANG) == (0, 0)


def test_files_are_small_in_memory(folder):
    files, _ = list_files(folder / "train", ["c0", "c1", "c2"])
    assert isinstance(files, Files)
    held = sum(t.numel() * t.element_size() for t in vars(files).values() if isinstance(t, Tensor))
    # The name with its class, and two places.
    assert held == len(files) * (len("c0/00.JPEG") + 16)
