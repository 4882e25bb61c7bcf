"""mclfast.data: the in-memory set, the digits, and images in folders."""

import hashlib
import sys
from pathlib import Path

import pytest
import torch

from mclfast import data
from mclfast.data import Augmentation, Dataset, ImageSet, channel_stats, limit_per_class


def image_set(labels: list[int], channels: int = 1, size: int = 4) -> ImageSet:
    """Image i is filled with the value i."""
    values = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    images = values.expand(-1, channels, size, size).contiguous()
    return ImageSet(images, torch.tensor(labels))


def dataset(**changes) -> Dataset:
    fields = dict(
        name="toy",
        train=image_set([0, 1, 0, 1]),
        test=image_set([1, 0]),
        num_classes=2,
        class_names=("a", "b"),
        mean=(0.5,),
        std=(0.5,),
    )
    return Dataset(**(fields | changes))


def rows(split: ImageSet) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


class TestImageSet:
    def test_length_and_device(self):
        one = image_set([0, 1, 2])
        assert len(one) == 3
        moved = one.to("cpu")
        assert torch.equal(moved.images, one.images) and torch.equal(moved.labels, one.labels)

    @pytest.mark.parametrize(
        ("images", "labels", "error", "message"),
        [
            (torch.zeros(2, 1, 4, 4), torch.zeros(2).long(), TypeError, "images: .*uint8.*float32"),
            (
                torch.zeros(2, 1, 4, 4).byte(),
                torch.zeros(2).int(),
                TypeError,
                "labels: .*int64.*int32",
            ),
            ([1], torch.zeros(2).long(), TypeError, "images: .*got list"),
            (torch.zeros(2, 4, 4).byte(), torch.zeros(2).long(), ValueError, r"\[N, C, H, W\]"),
            (
                torch.zeros(2, 1, 4, 4).byte(),
                torch.zeros(2, 1).long(),
                ValueError,
                r"labels: expected \[N\], got shape \[2, 1\]",
            ),
            (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(3).long(), ValueError, "got 2 and 3"),
            (torch.zeros(0, 1, 4, 4).byte(), torch.zeros(0).long(), ValueError, "at least one"),
        ],
    )
    def test_refuses(self, images, labels, error, message):
        with pytest.raises(error, match=message):
            ImageSet(images, labels)


class TestDataset:
    def test_own_tensors(self):
        own = dataset()
        assert (own.in_channels, own.image_size) == (1, 4)
        assert own.augmentation == Augmentation()
        assert own.to("cpu").train.images.shape == (4, 1, 4, 4)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"train": image_set([0, 1, 5])},
                r"train\.labels: expected values in \[0, 2\), got 5 at position 2",
            ),
            ({"test": image_set([0, -1])}, r"test\.labels: .*got -1 at position 1"),
            ({"test": image_set([0, 1], size=5)}, r"test\.images"),
            ({"test": image_set([0, 1], channels=3)}, r"test\.images"),
            ({"class_names": ("a",)}, "class_names: expected 2 entries, got 1"),
            ({"mean": (0.5, 0.5)}, "mean: expected 1 entries, got 2"),
            ({"std": ()}, "std: expected 1 entries, got 0"),
            ({"std": (0.0,)}, "std: expected positive"),
            ({"std": (float("inf"),)}, "std: expected positive finite values, got"),
            ({"mean": (float("nan"),)}, "mean: expected finite values, got"),
            ({"num_classes": 0, "class_names": ()}, "num_classes: expected at least 1, got 0"),
        ],
    )
    def test_refuses(self, changes, message):
        with pytest.raises(ValueError, match=message):
            dataset(**changes)

    def test_refuses_oblong_images(self):
        oblong = ImageSet(torch.zeros(2, 1, 4, 5).byte(), torch.tensor([0, 1]))
        with pytest.raises(ValueError, match="square"):
            dataset(train=oblong, test=oblong)


def test_channel_stats_equal_the_float_formula():
    images = torch.randint(0, 256, (7, 3, 5, 5), dtype=torch.uint8)
    scaled = images.double() / 255
    mean, std = channel_stats(images)
    expected_std = scaled.std((0, 2, 3), unbiased=False)
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert std == pytest.approx(expected_std.tolist(), rel=1e-12)


def test_channel_stats_of_a_constant_channel():
    assert channel_stats(torch.full((2, 1, 3, 3), 255, dtype=torch.uint8)) == ((1.0,), (1.0,))


class TestLimitPerClass:
    def test_memory_does_not_go_by_the_largest_label(self):
        # A count for each of so many classes would not fit into memory.
        labels = torch.tensor([0, 0, 1, 10**15])
        some = ImageSet(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), labels)
        with pytest.raises(ValueError, match="at most 0, the number of images of class 2, got 1"):
            limit_per_class(some, 1, 10**15 + 1)

    labels = [0, 1, 2] * 10

    def test_is_stratified_fixed_and_ordered(self):
        first = limit_per_class(image_set(self.labels), 4, 3, seed=1)
        again = limit_per_class(image_set(self.labels), 4, 3, seed=1)
        other = limit_per_class(image_set(self.labels), 4, 3, seed=2)
        assert first.labels.bincount().tolist() == [4, 4, 4]
        kept = first.images[:, 0, 0, 0].tolist()
        assert kept == sorted(kept)
        assert first.labels.tolist() == [self.labels[i] for i in kept]
        assert torch.equal(first.images, again.images)
        assert not torch.equal(first.images, other.images)

    def test_fewer_is_a_part_of_more(self):
        few = limit_per_class(image_set(self.labels), 3, 3)
        more = limit_per_class(image_set(self.labels), 5, 3)
        assert rows(few) < rows(more)

    def test_the_choice_never_changes(self):
        kept = limit_per_class(image_set(self.labels), 2, 3, seed=0).images[:, 0, 0, 0]
        assert kept.tolist() == [2, 13, 24, 26, 27, 28]

    def test_refuses(self):
        with pytest.raises(ValueError, match="at most 1, the number of images of class 1, got 2"):
            limit_per_class(image_set([0, 0, 1]), 2, 2)
        with pytest.raises(ValueError, match="class 2"):
            limit_per_class(image_set([0, 0, 1]), 1, 3)
        with pytest.raises(ValueError, match="per_class: expected at least 1, got 0"):
            limit_per_class(image_set([0, 1]), 0, 2)
        with pytest.raises(ValueError, match="seed"):
            limit_per_class(image_set([0, 1]), 1, 2, seed=-1)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (
            torch.zeros(2, 1).long(),
            ValueError,
            r"^train\.labels: expected \[N\], got shape \[2, 1\]",
        ),
        (
            torch.zeros(2).int(),
            TypeError,
            r"^train\.labels: expected torch\.int64, got torch\.int32",
        ),
        (torch.tensor([0, 10**9]), ValueError, r"^train\.labels: .*got 1000000000 at position 1"),
    ],
)
def test_labels_of_a_source_of_ones_own(labels, error, message):
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    good = ImageSet(images, torch.zeros(2, dtype=torch.int64))

    class Source:
        image_shape = (1, 4, 4)

    source = Source()
    source.labels = labels
    with pytest.raises(error, match=message):
        Dataset("mine", source, good, 1, ("a",), (0.5,), (0.5,))


class TestLoad:
    def test_available(self):
        in_memory = ["digits", "digits-full", "cifar10", "cifar100", "glyphs100", "folder"]
        assert data.available() == [*in_memory, "imagefolder", "webdataset"]

    def test_unknown_name_suggests_the_closest(self):
        with pytest.raises(ValueError, match="did you mean 'cifar100'") as error:
            data.load("CIFAR-100")
        assert "digits-full" in str(error.value) and "\n" not in str(error.value)

    def test_unknown_name_without_a_close_one(self):
        with pytest.raises(ValueError, match="'zzz'$"):
            data.load("zzz")

    @pytest.mark.parametrize("name", ["cifar10", "cifar100", "folder", "imagefolder", "webdataset"])
    def test_root_is_required(self, name):
        with pytest.raises(ValueError, match=r"root: expected .* data_root \(--data-root\)"):
            data.load(name)

    @pytest.mark.parametrize("argument", ["train_per_class", "image_size"])
    @pytest.mark.parametrize("value", ["5", 16.0])
    def test_counts_are_integers(self, argument, value):
        message = f"^{argument}: expected an integer or None, got {value!r}"
        with pytest.raises(ValueError, match=message):
            data.load("digits", **{argument: value})

    @pytest.mark.parametrize("name", ["digits", "cifar10"])
    def test_fixed_image_size(self, name):
        with pytest.raises(ValueError, match="image_size: expected .* got 20"):
            data.load(name, root=".", image_size=20)
        assert data.load("digits", image_size=16).image_size == 16

    def test_torchvision_is_not_needed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchvision", None)
        data.load("digits")


class TestDigits:
    @pytest.mark.parametrize("name", ["digits", "digits-full"])
    def test_the_split_covers_all_and_is_disjoint(self, name):
        from sklearn.datasets import load_digits

        split = data.load(name)
        assert len(split.train) + len(split.test) == 1797
        # Some digits occur twice: compare the multisets with the counts of the whole.
        joined = torch.cat((split.train.labels, split.test.labels)).bincount()
        assert joined.tolist() == torch.from_numpy(load_digits().target).bincount().tolist()
        both = torch.cat((split.train.images, split.test.images)).flatten(1)
        other = data.load("digits-full")
        reference = torch.cat((other.train.images, other.test.images)).flatten(1)
        assert sorted(both.tolist()) == sorted(reference.tolist())

    @pytest.mark.parametrize(
        ("name", "digest"), [("digits", "f122b333e60c8e97"), ("digits-full", "e2152f4c9e6a06c4")]
    )
    def test_the_split_never_changes(self, name, digest):
        images = data.load(name).train.images.numpy()
        assert hashlib.sha256(images.tobytes()).hexdigest().startswith(digest)

    def test_shapes_and_values(self):
        split = data.load("digits")
        assert split.train.images.shape == (100, 1, 16, 16)
        assert split.train.images.dtype == torch.uint8
        assert (split.in_channels, split.image_size, split.num_classes) == (1, 16, 10)
        assert (int(split.test.images.min()), int(split.test.images.max())) == (0, 255)
        assert split.augmentation == Augmentation(pad=2)
        assert split.class_names == tuple("0123456789")

    def test_statistics(self):
        split = data.load("digits")
        mean, std = channel_stats(torch.cat((split.train.images, split.test.images)))
        assert split.mean == pytest.approx(mean, abs=5.1e-5)
        assert split.std == pytest.approx(std, abs=5.1e-5)

    def test_upsampling_is_bilinear(self):
        from sklearn.datasets import load_digits

        from mclfast.data.sets.digits import _upsample

        levels = torch.from_numpy(load_digits().images[:50])
        expected = torch.nn.functional.interpolate(
            levels.unsqueeze(1), scale_factor=2, mode="bilinear", align_corners=False
        )
        got = _upsample(levels.long()).double()
        assert (got - expected * 255 / 16).abs().max() <= 0.5

    def test_train_per_class(self):
        few, more = data.load("digits", train_per_class=3), data.load("digits")
        assert few.train.labels.bincount().tolist() == [3] * 10
        assert len(few.train) + len(few.test) == 1797
        assert rows(few.train) < rows(more.train)

    def test_the_split_ignores_the_seed(self):
        one, other = data.load("digits", seed=0), data.load("digits", seed=1)
        assert torch.equal(one.train.images, other.train.images)

    @pytest.mark.parametrize("count", [0, 174])
    def test_both_splits_keep_every_class(self, count):
        with pytest.raises(ValueError, match=rf"train_per_class: .*\[1, 173\], got {count}"):
            data.load("digits", train_per_class=count)

    def test_full_is_stratified(self):
        split = data.load("digits-full")
        train, test = split.train.labels.bincount(), split.test.labels.bincount()
        assert ((test - 0.2 * (train + test)).abs() <= 0.5).all()

    def test_full_with_fewer_training_images(self):
        full, few = data.load("digits-full"), data.load("digits-full", train_per_class=5)
        assert few.train.labels.bincount().tolist() == [5] * 10
        assert torch.equal(few.test.images, full.test.images)
        assert rows(few.train) < rows(full.train)
        reseeded = data.load("digits-full", train_per_class=5, seed=1)
        assert rows(reseeded.train) != rows(few.train)

    def test_without_scikit_learn(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(ImportError, match=r'pip install "mclfast\[train\]"'):
            data.load("digits")


def save_image(path: Path, size: tuple[int, int], color: tuple[int, int, int]) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("PIL")
    for i in range(3):
        save_image(tmp_path / "train" / "cat" / f"{i}.png", (40, 60), (255, 0, 10 * i))
        save_image(tmp_path / "train" / "dog" / f"{i}.BMP", (16, 16), (0, 255, 10 * i))
    save_image(tmp_path / "test" / "dog" / "x.ppm", (64, 32), (0, 200, 0))
    return tmp_path


class TestFolder:
    def test_reads_images(self, folder):
        split = data.load("folder", root=folder)
        assert split.train.images.shape == (6, 3, 32, 32)
        assert split.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert split.class_names == ("cat", "dog")
        assert split.train.images[:, :, 5, 5].tolist() == [
            [255, 0, 0],
            [255, 0, 10],
            [255, 0, 20],
            [0, 255, 0],
            [0, 255, 10],
            [0, 255, 20],
        ]
        assert split.test.labels.tolist() == [1]
        assert (split.mean, split.std) == channel_stats(split.train.images)
        assert split.augmentation == Augmentation(pad=4, flip=True)

    def test_root_in_the_home_folder(self, folder, monkeypatch):
        for variable in ("HOME", "USERPROFILE"):
            monkeypatch.setenv(variable, str(folder.parent))
        assert len(data.load("folder", root=f"~/{folder.name}").train) == 6

    def test_keeps_the_centre(self, folder):
        from PIL import Image

        # Thirds red, green, blue along the long side: a centre crop is all green.
        wide = Image.new("RGB", (24, 8))
        wide.paste((255, 0, 0), (0, 0, 8, 8))
        wide.paste((0, 255, 0), (8, 0, 16, 8))
        wide.paste((0, 0, 255), (16, 0, 24, 8))
        wide.save(folder / "test" / "dog" / "x.ppm")
        image = data.load("folder", root=folder, image_size=8).test.images[0]
        assert image[1].eq(255).all() and image[0].eq(0).all() and image[2].eq(0).all()

    def test_grey_and_transparent_images_become_rgb(self, folder):
        from PIL import Image

        Image.new("L", (9, 9), 77).save(folder / "train" / "cat" / "0.png")
        Image.new("RGBA", (9, 9), (1, 2, 3, 0)).save(folder / "train" / "cat" / "1.png")
        images = data.load("folder", root=folder).train.images
        assert images[0].eq(77).all()
        # Transparent pixels are laid over white.
        assert images[1].eq(255).all()

    def test_image_size_and_limit(self, folder):
        split = data.load("folder", root=folder, image_size=8, train_per_class=2)
        assert split.train.images.shape == (4, 3, 8, 8)
        assert split.augmentation == Augmentation(pad=1, flip=True)

    def test_val_stands_in_for_test(self, folder):
        (folder / "test").rename(folder / "val")
        assert len(data.load("folder", root=folder).test) == 1

    def test_other_files_are_left_out(self, folder):
        (folder / "train" / "notes.txt").write_text("x")
        (folder / "train" / "cat" / "notes.txt").write_text("x")
        (folder / "train" / "cat" / "._0.png").write_text("x")
        (folder / "train" / ".cache").mkdir()
        assert len(data.load("folder", root=folder).train) == 6

    def test_broken_image(self, folder):
        broken = folder / "train" / "dog" / "bad.png"
        content = (folder / "train" / "cat" / "0.png").read_bytes()
        for damaged in (b"no image", content[: len(content) // 2]):
            broken.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"bad\.png: expected a readable image"):
                data.load("folder", root=folder)

    def test_test_class_missing_in_train(self, folder):
        save_image(folder / "test" / "emu" / "0.png", (8, 8), (0, 0, 0))
        with pytest.raises(ValueError, match="classes of train, got also emu"):
            data.load("folder", root=folder)

    def test_empty_class(self, folder):
        (folder / "train" / "emu").mkdir()
        with pytest.raises(ValueError, match="emu: expected at least one image, got none"):
            data.load("folder", root=folder)

    def test_no_classes(self, folder):
        (folder / "test" / "dog").rename(folder / "dog")
        with pytest.raises(ValueError, match="test: expected one folder per class"):
            data.load("folder", root=folder)

    def test_missing_folders(self, folder, tmp_path):
        with pytest.raises(FileNotFoundError, match="train and test"):
            data.load("folder", root=tmp_path / "nowhere")
        (folder / "test").rename(folder / "other")
        with pytest.raises(FileNotFoundError, match="train and test"):
            data.load("folder", root=folder)

    def test_image_size_must_be_positive(self, folder):
        with pytest.raises(ValueError, match="image_size: expected at least 1, got 0"):
            data.load("folder", root=folder, image_size=0)

    def test_without_pillow(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "PIL.Image", None)
        with pytest.raises(ImportError, match=r'pip install "mclfast\[train\]"'):
            data.load("folder", root=folder)
