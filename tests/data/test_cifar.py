"""mclfast.data.sets.cifar on small archives in the official layout."""

import hashlib
import io
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mclfast import data
from mclfast.data import Augmentation, restricted_pickle
from mclfast.data.sets.cifar import CIFAR10, CIFAR100, CifarSource, load_cifar


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def images_file(source: CifarSource, count: int, seed: int) -> bytes:
    """As the official files: protocol 2, keys as bytes."""
    random = np.random.RandomState(seed)
    content = {
        b"data": random.randint(0, 256, (count, 3072)).astype(np.uint8),
        source.labels_key: [i % 3 for i in range(count)],
        b"filenames": [b"x.png"] * count,
    }
    return pickle.dumps(content, protocol=2)


def contents_of(source: CifarSource) -> dict[str, bytes]:
    files = [*source.train_files, *source.test_files]
    contents = {file: images_file(source, 6, i) for i, file in enumerate(files)}
    contents[source.meta_file] = pickle.dumps(
        {source.names_key: [b"apple", b"bee", b"cup"]}, protocol=2
    )
    return contents


def with_sums(source: CifarSource, contents: dict[str, bytes], archive: bytes = b"") -> CifarSource:
    sums = {file: md5(content) for file, content in contents.items()}
    return replace(source, md5=sums, archive_md5=md5(archive))


def tar_of(source: CifarSource, contents: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for file, content in contents.items():
            info = tarfile.TarInfo(f"{source.folder}/{file}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_folder(root: Path, source: CifarSource, contents: dict[str, bytes]) -> CifarSource:
    (root / source.folder).mkdir()
    for file, content in contents.items():
        (root / source.folder / file).write_bytes(content)
    return with_sums(source, contents)


def write_archive(root: Path, source: CifarSource, contents: dict[str, bytes]) -> CifarSource:
    archive = tar_of(source, contents)
    (root / source.archive).write_bytes(archive)
    return with_sums(source, contents, archive)


@pytest.mark.parametrize("write", [write_folder, write_archive])
@pytest.mark.parametrize(("official", "train_count"), [(CIFAR10, 30), (CIFAR100, 6)])
def test_reads_folder_and_archive(tmp_path, official, train_count, write):
    contents = contents_of(official)
    source = write(tmp_path, official, contents)
    before = sorted(tmp_path.rglob("*"))
    split = load_cifar(tmp_path, source)
    assert sorted(tmp_path.rglob("*")) == before
    assert split.train.images.shape == (train_count, 3, 32, 32)
    assert split.test.images.shape == (6, 3, 32, 32)
    assert split.class_names == ("apple", "bee", "cup")
    assert split.test.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert (split.name, split.in_channels, split.image_size) == (official.name, 3, 32)
    assert split.augmentation == Augmentation(pad=4, flip=True)
    # Red plane first, rows first within it.
    raw = pickle.loads(contents[official.train_files[0]])[b"data"]
    assert int(split.train.images[2, 1, 3, 4]) == raw[2, 1024 + 3 * 32 + 4]


def test_files_are_joined_in_order(tmp_path):
    contents = contents_of(CIFAR10)
    split = load_cifar(tmp_path, write_folder(tmp_path, CIFAR10, contents))
    raw = pickle.loads(contents["data_batch_3"])[b"data"]
    assert torch.equal(split.train.images[12:18].flatten(1), torch.from_numpy(raw))


def test_published_normalisation():
    assert CIFAR100.mean == (0.5071, 0.4867, 0.4408)
    assert CIFAR100.std == (0.2675, 0.2565, 0.2761)
    assert set(CIFAR10.md5) == set(CIFAR10.files) and set(CIFAR100.md5) == set(CIFAR100.files)


@pytest.mark.parametrize(("name", "source"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_missing_archive(tmp_path, name, source):
    with pytest.raises(FileNotFoundError) as error:
        data.load(name, root=tmp_path)
    message = str(error.value)
    assert source.archive in message and str(tmp_path) in message and "\n" not in message
    assert "https://www.cs.toronto.edu/~kriz/cifar.html" in message


def test_incomplete_folder(tmp_path):
    contents = contents_of(CIFAR100)
    source = write_folder(tmp_path, CIFAR100, contents)
    (tmp_path / source.folder / "test").unlink()
    with pytest.raises(FileNotFoundError, match="cifar-100-python lacking test"):
        load_cifar(tmp_path, source)
    source = write_archive(tmp_path, CIFAR100, contents)
    assert len(load_cifar(tmp_path, source).test) == 6


def test_load_checks_the_official_sums(tmp_path):
    write_archive(tmp_path, CIFAR100, contents_of(CIFAR100))
    found = md5((tmp_path / CIFAR100.archive).read_bytes())
    with pytest.raises(ValueError, match=f"expected MD5 {CIFAR100.archive_md5}, got {found}"):
        data.load("cifar100", root=tmp_path)


def test_corrupted_file(tmp_path):
    source = write_folder(tmp_path, CIFAR100, contents_of(CIFAR100))
    path = tmp_path / source.folder / "train"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_cifar(tmp_path, source)
    message = str(error.value)
    assert str(path) in message and source.md5["train"] in message and md5(content) in message


def test_corrupted_archive(tmp_path):
    source = write_archive(tmp_path, CIFAR100, contents_of(CIFAR100))
    archive = tmp_path / source.archive
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"tar.gz: damaged.*expected MD5 {source.archive_md5}"):
        load_cifar(tmp_path, source)


def test_truncated_archive_with_a_matching_sum(tmp_path):
    contents = contents_of(CIFAR100)
    whole = tar_of(CIFAR100, contents)
    for length in (0, 5, 100, len(whole) // 2, len(whole) * 3 // 4):
        (tmp_path / CIFAR100.archive).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"tar\.gz: expected (a readable archive|it to hold)"):
            load_cifar(tmp_path, with_sums(CIFAR100, contents, whole[:length]))


def test_archive_without_a_member(tmp_path):
    contents = contents_of(CIFAR100)
    del contents["meta"]
    source = write_archive(tmp_path, CIFAR100, contents)
    with pytest.raises(ValueError, match="expected it to hold cifar-100-python/meta"):
        load_cifar(tmp_path, source)


def test_member_differs_from_its_sum(tmp_path):
    source = write_archive(tmp_path, CIFAR100, contents_of(CIFAR100))
    source = replace(source, md5={**source.md5, "test": "0" * 32})
    with pytest.raises(ValueError, match=f"test: damaged.*expected MD5 {'0' * 32}"):
        load_cifar(tmp_path, source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "readable part"),
        (b"garbage", "readable part"),
        (pickle.dumps([1, 2], protocol=2), "dictionary with the key 'data'"),
        (pickle.dumps({b"data": [1]}, protocol=2), "uint8 array"),
        (pickle.dumps({b"data": np.zeros((2, 3072))}, protocol=2), "uint8 array"),
        (pickle.dumps({b"data": np.zeros((2, 9), np.uint8)}, protocol=2), r"got \[2, 9\]"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8)}, protocol=2), "key 'fine_labels'"),
        (
            pickle.dumps(
                {b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": ["a"]}, protocol=2
            ),
            "list of integers",
        ),
        (
            pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [9]}, protocol=2),
            "got 9 at position 0",
        ),
    ],
)
def test_unexpected_content(tmp_path, content, message):
    source = write_folder(tmp_path, CIFAR100, contents_of(CIFAR100) | {"train": content})
    with pytest.raises(ValueError, match=message):
        load_cifar(tmp_path, source)


def test_class_names_must_be_text(tmp_path):
    meta = pickle.dumps({CIFAR100.names_key: 3}, protocol=2)
    source = write_folder(tmp_path, CIFAR100, contents_of(CIFAR100) | {"meta": meta})
    with pytest.raises(ValueError, match="meta: expected a list of class names"):
        load_cifar(tmp_path, source)


class RunsCommand:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"echo x > {self.marker}",)


@pytest.mark.parametrize("write", [write_folder, write_archive])
def test_malicious_pickle_does_not_run(tmp_path, write):
    marker = tmp_path / "marker"
    payload = pickle.dumps({b"data": RunsCommand(marker)}, protocol=2)
    source = write(tmp_path, CIFAR100, contents_of(CIFAR100) | {"train": payload})
    with pytest.raises(ValueError, match="refused .*system"):
        load_cifar(tmp_path, source)
    assert not marker.exists()


def test_a_wrong_sum_stops_before_parsing(tmp_path, monkeypatch):
    source = write_folder(tmp_path, CIFAR100, contents_of(CIFAR100))
    source = replace(source, md5=dict.fromkeys(source.md5, "0" * 32))
    monkeypatch.setattr(restricted_pickle, "loads", lambda data: pytest.fail("parsed"))
    with pytest.raises(ValueError, match="damaged"):
        load_cifar(tmp_path, source)


class TestRestrictedPickle:
    @pytest.mark.parametrize("protocol", [0, 1, 2])
    @pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
    def test_arrays_of_both_numpy_generations(self, protocol, module):
        array = np.arange(6, dtype=np.uint8).reshape(2, 3)
        content = pickle.dumps(array, protocol=protocol)
        for name in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
            content = content.replace(name, module)
        assert np.array_equal(restricted_pickle.loads(content), array)

    def test_python_2_text(self):
        # {'names': ['a', 'b'], 'n': 2} as Python 2 writes it in protocol 0.
        content = b"(dp1\nS'names'\np2\n(lp3\nS'a'\naS'b'\nasS'n'\nI2\ns."
        assert restricted_pickle.loads(content) == {b"names": [b"a", b"b"], b"n": 2}

    @pytest.mark.parametrize(
        "content",
        [
            b"cbuiltins\neval\n(S'1'\ntR.",
            b"cnumpy\nload\n(S'x'\ntR.",
            b"cnumpy\nndarray.tofile\n.",
            b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
            b"c_codecs\ndecode\n.",
        ],
    )
    def test_refuses_other_names(self, content):
        with pytest.raises(pickle.UnpicklingError, match="refused"):
            restricted_pickle.loads(content)

    def test_refuses_other_codecs(self):
        with pytest.raises(pickle.UnpicklingError, match="refused the codec 'rot13'"):
            restricted_pickle.loads(b"c_codecs\nencode\n(Vabc\nVrot13\ntR.")


def test_unreadable_archive_leaves_nothing_behind(tmp_path):
    source = write_archive(tmp_path, CIFAR100, contents_of(CIFAR100))
    (tmp_path / source.archive).write_bytes(b"broken")
    with pytest.raises(ValueError, match="damaged"):
        load_cifar(tmp_path, source)
    assert os.listdir(tmp_path) == [source.archive]
