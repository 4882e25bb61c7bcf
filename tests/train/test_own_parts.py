"""Training networks and data of one's own, which the command line cannot build again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import mclfast
from mclfast.cli.main import main
from mclfast.config import TrainConfig
from mclfast.data import Augmentation, Dataset, ImageSet
from mclfast.methods import Baseline, LayerwiseMCL
from mclfast.train.export import load_backbone


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(self.one(x)).mean((2, 3)))


def my_data(seed: int = 0) -> Dataset:
    g = torch.Generator().manual_seed(seed)
    sets = [
        ImageSet(
            torch.randint(0, 256, (12, 1, 8, 8), generator=g, dtype=torch.uint8),
            torch.arange(12) % 2,
        )
        for _ in range(2)
    ]
    return Dataset("mine", *sets, 2, ("no", "yes"), (0.5,), (0.3,), Augmentation(pad=1))


def my_trainer(peers: int, run_dir, data: Dataset | None = None, method=LayerwiseMCL):
    torch.manual_seed(0)
    cohort = mclfast.Cohort(
        [mclfast.staged(Mine(), ["one", "two"], classifier="out") for _ in range(peers)],
        auxiliary_heads=method.auxiliary_heads,
        projection_dim=4 if method.projections else None,
    )
    config = TrainConfig(epochs=2, batch_size=4, images_per_class=2, bilevel_every=2, device="cpu")
    return mclfast.Trainer(cohort, method(cohort.feature_dims), data or my_data(), config, run_dir)


@pytest.mark.parametrize(("peers", "method"), [(1, Baseline), (1, LayerwiseMCL), (3, LayerwiseMCL)])
def test_a_whole_run(peers, method, tmp_path, capsys):
    trainer = my_trainer(peers, tmp_path / "run", method=method)
    result = trainer.fit(progress=False)
    assert len(result.peers) == peers
    assert (tmp_path / "run" / "curves.png").stat().st_size > 0
    for i in range(peers):
        folder = tmp_path / "run" / f"peer{i}"
        about = json.loads((folder / "backbone.json").read_text())
        assert about["network"] is None and about["data"] is None and about["class"] == "Mine"
        with pytest.raises(ValueError, match="expected a network of mclfast.models, got Mine"):
            load_backbone(folder)
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "- Mine" in config and "data: mine" in config and "resnet8" not in config
    for command in ("eval", "export"):
        assert main([command, str(tmp_path / "run")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "Mine" in line or "mine" in line


def test_resuming_on_other_data_is_refused(tmp_path):
    my_trainer(2, tmp_path).fit(progress=False, stop_after=1)
    data = my_data()
    fewer = replace(data, test=ImageSet(data.test.images[:6], data.test.labels[:6]))
    renamed = replace(data, class_names=("yes", "no"))
    for other, message in (
        (fewer, "test images: expected 12 as in the checkpoint being resumed, got 6"),
        (renamed, r"class_names: expected \['no', 'yes'\] as in the checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            my_trainer(2, tmp_path, other).fit(progress=False)
    assert len(my_trainer(2, tmp_path).fit(progress=False).history) == 2


def test_resuming_other_networks_is_one_line(tmp_path):
    trainer = my_trainer(2, tmp_path)
    trainer.fit(progress=False, stop_after=1)
    state = trainer.state()
    del state["cohort"]["networks.0.backbone.module.out.bias"]
    with pytest.raises(ValueError, match="checkpoint: expected the state of these") as error:
        my_trainer(2, None).load_state(state)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="^checkpoint: expected settings .* got none"):
        my_trainer(2, None).load_state({})


def test_eval_uses_the_recorded_statistics_and_classes(tmp_path, capsys):
    """An image folder whose training images change must not change the evaluation."""
    pil = pytest.importorskip("PIL.Image")
    g = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = torch.randint(0, 256, (8, 8, 3), generator=g, dtype=torch.uint8)
                pil.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    run = tmp_path / "run"
    command = [
        "train",
        "--method",
        "baseline",
        "--cohort",
        "resnet8",
        "--data",
        "folder",
        "--data-root",
        str(tmp_path / "images"),
        "--image-size",
        "8",
        "--batch-size",
        "4",
        "--images-per-class",
        "2",
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--no-progress",
        "--run-dir",
        str(run),
    ]
    assert main(command) == 0
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    first = capsys.readouterr().out
    for path in (tmp_path / "images" / "train" / "cat").glob("*.png"):
        pil.new("RGB", (8, 8), (255, 255, 255)).save(path)
    assert main(["eval", str(run)]) == 0
    assert capsys.readouterr().out == first
    for split in ("train", "test"):
        (tmp_path / "images" / split / "cat").rename(tmp_path / "images" / split / "elk")
    assert main(["eval", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "data_root: expected the classes cat, dog of the export, got dog, elk" in line


def test_a_backend_that_is_not_there_stops_before_the_run_starts(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run = tmp_path / "run"
    assert main(["train", "--backend", "triton", "--device", "cpu", "--run-dir", str(run)]) == 2
    assert not run.exists()
