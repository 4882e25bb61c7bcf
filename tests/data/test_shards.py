"""Tar shards: numbering, the index and its upkeep, damage."""

from __future__ import annotations

import gzip
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.images import encoded, make_folder, make_shards, write_shard
from mclfast import data
from mclfast.data.source import Views
from mclfast.data.stream import shards


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """Nothing is written into the cache of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """24 training images in 5 shards and 12 test images in 3."""
    return make_shards(tmp_path / "shards", make_folder(tmp_path / "folder"))


def loaded(root: Path, workers: int = 0) -> data.Dataset:
    return data.load("webdataset", root=root, image_size=16, workers=workers)


def opened(folder: Path) -> tuple[shards.Shards, torch.Tensor]:
    return shards.open_shards(sorted(folder.glob("*.tar")))


def sample(key: str, seed: int, label: int, suffix: str = "jpg") -> list[tuple[str, bytes]]:
    return [(f"{key}.{suffix}", encoded(seed)), (f"{key}.cls", str(label).encode())]


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_are_those_of_the_folder(root, workers):
    folder = data.load("imagefolder", root=root.parent / "folder", image_size=16, workers=0)
    split = loaded(root, workers)
    assert (split.name, split.num_classes, split.class_names) == ("webdataset", 3, ("0", "1", "2"))
    assert (len(split.train), len(split.test)) == (24, 12)
    assert split.mean == (0.485, 0.456, 0.406)
    for mine, theirs in ((split.train, folder.train), (split.test, folder.test)):
        assert torch.equal(mine.labels, theirs.labels)
        # At random: neighbours in a batch lie in different shards.
        rows = torch.randperm(12, generator=torch.Generator().manual_seed(1)).view(3, 4)
        for views in (None, Views(1, 5)):
            for a, b in zip(
                mine.pixels(rows, "cpu", views=views),
                theirs.pixels(rows, "cpu", views=views),
                strict=True,
            ):
                assert torch.equal(a, b)


def test_order_is_that_of_names_then_of_the_shard(tmp_path):
    write_shard(tmp_path / "b.tar", [*sample("z", 1, 4), *sample("a", 2, 0, "png")])
    others = [("q.txt", b"x"), ("README", b"")]
    write_shard(tmp_path / "a.tar", [*reversed(sample("q", 3, 2)), *others])
    write_shard(tmp_path / "._a.tar", [])
    found, labels = shards.open_shards(shards._shards(tmp_path))
    assert labels.tolist() == [2, 4, 0]
    assert [found.read(i) for i in range(3)] == [encoded(3), encoded(1), encoded(2)]
    assert [Path(found.describe(i)).name for i in range(3)] == [
        "a.tar: q.jpg",
        "b.tar: z.jpg",
        "b.tar: a.png",
    ]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_keys_with_folders(format, tmp_path):
    deep = "part.one/" + "f" * 90 + "/" + "k" * 60
    write_shard(tmp_path / "a.tar", [*sample(deep, 1, 1), *sample("part.two/k", 2, 0)], format)
    found, labels = opened(tmp_path)
    assert labels.tolist() == [1, 0]
    assert [found.read(i) for i in range(2)] == [encoded(1), encoded(2)]
    assert found.describe(0).endswith(f"{deep}.jpg")


def test_few_shards_are_open_at_once(root, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 2)
    found, _ = opened(root / "train")
    whole = [found.read(i) for i in range(24)]
    assert [found.read(i) for i in (20, 0, 10, 5, 23, 1)] == [
        whole[i] for i in (20, 0, 10, 5, 23, 1)
    ]
    assert len(found._open) == 2


def test_the_index_is_made_once_and_again_after_a_change(root, monkeypatch):
    scans = []
    scan = shards._scan

    def counted(paths):
        scans.append(len(paths))
        return scan(paths)

    monkeypatch.setattr(shards, "_scan", counted)
    first = loaded(root)
    assert scans == [5, 3]
    assert (root / "train" / shards.INDEX).is_file()
    again = loaded(root)
    assert scans == [5, 3]
    assert again.train.fingerprint == first.train.fingerprint
    assert torch.equal(again.train.labels, first.train.labels)

    write_shard(root / "train" / "set-000.tar", sample("other", 5, 1))
    changed = loaded(root)
    assert scans == [5, 3, 5]
    assert len(changed.train) == 20
    assert changed.train.fingerprint != first.train.fingerprint

    (root / "train" / shards.INDEX).write_bytes(b"damaged")
    assert torch.equal(loaded(root).train.labels, changed.train.labels)
    assert scans == [5, 3, 5, 5]
    os.utime(root / "val" / "set-001.tar", ns=(1, 1))
    loaded(root)
    assert scans == [5, 3, 5, 5, 3]


def test_an_index_that_was_damaged_or_lies_is_made_anew(root, monkeypatch):
    first = loaded(root)
    place = root / "train" / shards.INDEX
    content = place.read_bytes()
    scans = []
    scan = shards._scan
    monkeypatch.setattr(shards, "_scan", lambda paths: (scans.append(1), scan(paths))[1])

    def is_made_anew() -> bool:
        scans.clear()
        found = loaded(root).train
        assert found.fingerprint == first.train.fingerprint
        assert torch.equal(found.labels, first.train.labels)
        return len(scans) == 1

    assert not is_made_anew()
    for byte in (5, 60, 700, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[byte] ^= 8
        place.write_bytes(changed)
        assert is_made_anew()
    with np.load(place) as stored:
        good = dict(stored)
    for name, value in (
        ("shard", good["shard"] + 9),
        ("label", good["label"] - 1),
        ("size", good["size"][:-1]),
        ("offset", good["offset"] * 1.0),
        ("shard", good["shard"][:0]),
    ):
        np.savez(place, **{**good, name: value})
        assert is_made_anew()
    # An index without a digest is an older one.
    np.savez(place, **good)
    assert not is_made_anew()


def test_the_index_goes_to_the_cache_where_the_folder_is_read_only(root, cache, monkeypatch):
    # A folder in the way: whoever is root may write everywhere else.
    (root / "train" / shards.INDEX).mkdir()
    loaded(root)
    assert len(list((cache / "mclfast").glob("*.npz"))) == 1
    monkeypatch.setattr(shards, "_scan", lambda paths: pytest.fail("made again"))
    loaded(root)


def test_no_place_for_the_index(root, cache):
    (root / "train" / shards.INDEX).mkdir()
    (cache / "mclfast").write_text("in the way")
    assert len(loaded(root).train) == 24


def test_neither_torchvision_nor_webdataset_is_needed(root, monkeypatch):
    for name in ("torchvision", "webdataset", "wids"):
        monkeypatch.setitem(sys.modules, name, None)
    assert len(loaded(root).train) == 24


def test_damaged_image_is_named(tmp_path):
    make_shards(tmp_path / "s", make_folder(tmp_path / "f", train=2, test=1))
    files = [("x.jpg", b"no image"), ("x.cls", b"0"), *sample("y", 1, 2), *sample("z", 1, 1)]
    path = write_shard(tmp_path / "s" / "train" / "set-000.tar", files)
    split = loaded(tmp_path / "s")
    message = rf"^{path}: x\.jpg: expected a readable image, got .*8 bytes of no known image format"
    with pytest.raises(ValueError, match=message):
        next(split.train.pixels(torch.tensor([[1, 0]]), "cpu"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a.jpg", encoded(0))], r"a\.tar: expected an image .* got only an image of a$"),
        ([("d/a.cls", b"0")], r"got only a class of d/a$"),
        ([("a.jpg", encoded(0)), ("a.cls", b"cat")], r"class number in a\.cls, got b'cat'"),
        ([("a.jpg", encoded(0)), ("a.cls", b"-1")], "class number"),
        ([("a.jpg", encoded(0)), ("a.cls", b"9" * 20)], "class number"),
        ([("a.jpg", encoded(0)), ("a.cls", b"0" * 32 + b"5")], "class number"),
        ([*sample("a", 0, 1), ("a.png", encoded(0))], r"one image of a, got a\.png too"),
        ([*sample("a", 0, 1), ("a.cls", b"2")], r"one class of a, got a\.cls too"),
        ([("notes.txt", b"x")], "expected at least one sample"),
    ],
)
def test_refuses_samples(files, message, tmp_path):
    write_shard(tmp_path / "a.tar", files)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)


@pytest.mark.parametrize("label", [100_000, 50_000_000, 2**31 - 1])
def test_class_numbers_do_not_decide_the_memory(label, root, monkeypatch):
    path = write_shard(root / "train" / "set-000.tar", [*sample("a", 0, 1), *sample("b", 1, label)])
    with pytest.raises(ValueError, match=rf"^{path}: b\.jpg: .* below 100000, got {label}$"):
        loaded(root)
    # Where there are as many images, there may be as many classes.
    monkeypatch.setattr(shards, "_CLASSES", 3)
    write_shard(root / "train" / "set-000.tar", sample("b", 1, 19))
    assert loaded(root).num_classes == 20
    write_shard(root / "train" / "set-000.tar", sample("b", 1, 20))
    with pytest.raises(ValueError, match=r"expected a class number below 20, got 20$"):
        loaded(root)


def test_a_named_pipe_is_no_shard(root):
    os.mkfifo(root / "train" / "pipe.tar")
    with pytest.raises(ValueError, match=r"pipe\.tar: expected .* tar file, got a named pipe$"):
        loaded(root)


def test_refuses_damaged_shards(tmp_path):
    path = write_shard(tmp_path / "a.tar", [*sample("a", 0, 1), *sample("b", 1, 1)])
    whole = path.read_bytes()
    for content in (gzip.compress(whole), b"no tar" * 200, whole[:2000]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.tar: expected an uncompressed tar file, got "):
            opened(tmp_path)


@pytest.mark.parametrize("missing", ["train", "val"])
def test_refuses_a_root_without_shards(root, missing):
    (root / missing).rename(root / "other")
    with pytest.raises(FileNotFoundError, match=r"train/\*\.tar and val/\*\.tar"):
        loaded(root)


def test_a_test_class_that_training_lacks(root):
    write_shard(root / "val" / "set-000.tar", sample("a", 0, 3))
    with pytest.raises(ValueError, match=r"test\.labels: expected values in \[0, 3\), got 3"):
        loaded(root)


def test_the_library_writes_and_reads_alike(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(5):
            writer.write({"__key__": f"s{9 - i}", "jpg": encoded(i), "cls": i % 3, "txt": "x"})
    found, labels = opened(tmp_path)
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert len(found) == len(theirs) == 5
    for i, one in enumerate(theirs):
        assert found.read(i) == one["jpg"]
        assert int(labels[i]) == int(one["cls"])
