"""Which files of class folders are images: all of them, or an error names what is none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from helpers.images import encoded
from mclfast import data
from mclfast.data.listing import image_names

LOADERS = ("folder", "imagefolder")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes with two images in each of train and test."""
    for split in ("train", "test"):
        for label, name in enumerate("ab"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(2):
                (folder / f"{i}.jpg").write_bytes(encoded(10 * label + i))
    return tmp_path


def loaded(root: Path, loader: str) -> data.Dataset:
    return data.load(loader, root=root, image_size=8, workers=0)


def all_pixels(source: data.ImageSource) -> torch.Tensor:
    return next(iter(source.pixels(torch.arange(len(source))[None], "cpu")))


@pytest.mark.parametrize("loader", LOADERS)
def test_folders_inside_a_class_folder_belong_to_the_class(loader, root):
    flat = loaded(root, loader)
    labels, pixels = flat.train.labels, all_pixels(flat.test)
    for split in ("train", "test"):
        for name in "ab":
            inner = root / split / name / "images"
            inner.mkdir()
            for file in (root / split / name).glob("*.jpg"):
                file.rename(inner / file.name)
            (root / split / name / "boxes.txt").write_text("0.jpg 1 2 3 4")
    nested = loaded(root, loader)
    assert torch.equal(nested.train.labels, labels)
    assert torch.equal(all_pixels(nested.test), pixels)
    # A mixture is read as a whole.
    for name in "ab":
        (root / "train" / name / "x.png").write_bytes(encoded(7, format="PNG"))
        (root / "train" / name / "images" / "deep").mkdir()
        (root / "train" / name / "images" / "deep" / "y.GIF").write_bytes(encoded(8, format="GIF"))
    assert loaded(root, loader).train.labels.tolist() == [0] * 4 + [1] * 4


def test_order_and_hidden_folders(root):
    folder = root / "train" / "a"
    for name in ("z/1.png", "b/2.PNG", ".hidden/3.png", "b/.4.png", "b/c/5.tiff", "b/6.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "b.png").symlink_to(folder / "0.jpg")
    assert image_names(folder) == ["0.jpg", "1.jpg", "b.png", "b/2.PNG", "b/c/5.tiff", "z/1.png"]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: os.mkfifo(a / "x.png"), r"a/x\.png: expected a file, got a named pipe$"),
        (lambda a: (a / "x.png").symlink_to("/dev/zero"), r"expected a file, got a device$"),
        (lambda a: (a / "x.png").symlink_to("gone"), r"expected a file, got a link to nothing$"),
        (
            lambda a: (a / "inner").symlink_to(a),
            r"expected a folder once, got a link to it as well",
        ),
        (lambda a: (a / "x.heic").touch(), r"a/x\.heic: expected images .*got \.heic; convert"),
        (
            lambda a: (a.parent / "x.png").touch(),
            r"train/x\.png: expected images in one folder per",
        ),
        (lambda a: (shutil.rmtree(a), a.mkdir()), r"a: expected at least one image, got none$"),
    ],
)
def test_what_is_no_image_is_named(loader, change, message, root):
    change(root / "train" / "a")
    with pytest.raises(ValueError, match=message):
        loaded(root, loader)


def test_a_pipe_that_takes_the_place_of_a_listed_file_is_not_waited_for(root):
    split = loaded(root, "imagefolder")
    (root / "train" / "a" / "0.jpg").unlink()
    os.mkfifo(root / "train" / "a" / "0.jpg")
    with pytest.raises(ValueError, match=r"a/0\.jpg: .*a named pipe in place of a file"):
        all_pixels(split.train)
