"""Runs of networks as other packages build them: every kind of method, every memory mode."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers.own_networks import UNetEncoder, make
from mclfast import Cohort, Trainer, staged
from mclfast.config import TrainConfig
from mclfast.data import Augmentation, Dataset, ImageSet
from mclfast.methods import method_class
from mclfast.models import StagedNetwork, resnet8

pytestmark = pytest.mark.usefixtures("one_thread")


def my_data() -> Dataset:
    g = torch.Generator().manual_seed(0)
    sets = [
        ImageSet(
            torch.randint(0, 256, (12, 3, 8, 8), generator=g, dtype=torch.uint8),
            torch.arange(12) % 3,
        )
        for _ in range(2)
    ]
    mean, std = (0.5,) * 3, (0.3,) * 3
    return Dataset("mine", *sets, 3, ("a", "b", "c"), mean, std, Augmentation(pad=1))


def trainer(
    networks: list[StagedNetwork], method: str = "lmcl", run_dir: Any = None, **values: Any
) -> Trainer:
    cls = method_class(method)
    cohort = Cohort(
        networks, auxiliary_heads=cls.auxiliary_heads, projection_dim=4 if cls.projections else None
    )
    config = TrainConfig.from_values(
        {
            "method": method,
            "epochs": 1,
            "batch_size": 6,
            "images_per_class": 2,
            "lr": 0.01,
            "device": "cpu",
            **values,
        }
    )
    data = values.pop("images", None) or my_data()
    return Trainer(cohort, cls(cohort.feature_dims, config.options), data, config, run_dir)


def pair(name: str) -> list[StagedNetwork]:
    torch.manual_seed(0)
    return [make(name) for _ in range(2)]


@pytest.mark.parametrize("name", ["mixer", "swin", "huggingface", "squeezenet"])
@pytest.mark.parametrize("method", ["baseline", "dml", "lmcl", "mcl", "afd", "ffl"])
def test_methods(name: str, method: str) -> None:
    run = trainer(pair(name), method, bilevel_every=1)
    before = {n: p.clone() for n, p in run.cohort.named_parameters()}
    run.fit(progress=False)
    for n, p in run.cohort.named_parameters():
        assert bool(p.isfinite().all())
        # The bias of a key shifts all scores of a softmax alike.
        assert not torch.equal(p, before[n]) or "attention" in n, n


@pytest.mark.parametrize("name", ["vit", "mixer", "functional", "huggingface"])
@pytest.mark.parametrize("method", ["lmcl", "afd"])
def test_memory_modes_agree(name: str, method: str) -> None:
    states = []
    for values in (
        {"memory": "ordinary"},
        {"memory": "checkpoint"},
        {"memory": "sequential"},
        {"memory": "sequential", "offload": "peers"} if method == "afd" else {},
        {"peers_parallel": "stack"} if name != "huggingface" else {},
    ):
        run = trainer(pair(name), method, bilevel_every=2, **values)
        run.fit(progress=False)
        states.append(run.cohort.state_dict())
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=1e-3, atol=1e-5)


def test_methods_that_read_stages_refuse_networks_without() -> None:
    def bare() -> list[StagedNetwork]:
        return [staged(UNetEncoder()) for _ in range(2)]

    for method in ("baseline", "dml", "mcl"):
        trainer(bare(), method).fit(progress=False)
    message = "cohort: expected networks with stages for LayerwiseMCL, which reads them, got peer 0"
    with pytest.raises(ValueError, match=message):
        trainer(bare(), "lmcl")


@pytest.mark.parametrize("method", ["afd", "ffl"])
def test_maps_of_tokens_beside_maps_are_refused(method: str) -> None:
    networks = [make("vit"), resnet8(num_classes=3)]
    message = f"cohort: expected maps of one kind for method {method}, got .*: 4 x 1, 2 x 2"
    with pytest.raises(ValueError, match=message):
        trainer(networks, method)


class Aliased(UNetEncoder):
    """A classifier of two names, and two layers that share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.head = self.fc
        self.again = nn.Linear(6, 3)
        self.again.weight = self.fc.weight


def test_aliases_and_tied_tensors_are_exported(tmp_path: Any) -> None:
    torch.manual_seed(0)
    networks = [staged(Aliased(), ["down1", "down2", "down3"]) for _ in range(2)]
    run = trainer(networks, "lmcl", tmp_path / "run")
    run.fit(progress=False)
    for i, network in enumerate(networks):
        weights = load_file(tmp_path / "run" / f"peer{i}" / "backbone.safetensors")
        other = staged(Aliased(), ["down1", "down2", "down3"])
        other.load_state_dict(weights)
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(other.eval()(x), network.eval()(x))
        assert torch.equal(weights["module.again.weight"], weights["module.fc.weight"])
        about = json.loads((tmp_path / "run" / f"peer{i}" / "backbone.json").read_text())
        assert about["class"] == "Aliased"


class Counted(UNetEncoder):
    """State that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"count": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


class FailingInEvaluation(UNetEncoder):
    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        # The blank images of the start have no differences.
        if not self.training and float(x.std()) > 0:
            raise ValueError("no evaluation here")
        return logits


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Counted, "cohort: expected backbones that can be exported, got peer 0: .* dict at "),
        (FailingInEvaluation, "no evaluation here"),
    ],
)
def test_a_failure_at_the_end_comes_at_the_start(
    network: type[nn.Module], message: str, tmp_path: Any
) -> None:
    run = trainer([staged(network())], "baseline", tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        run.fit(progress=False)
    assert run.step == 0 and not (tmp_path / "run").exists()


def test_class_means_need_a_linear_classifier() -> None:
    run = trainer(pair("squeezenet"), "moco-mcl", sampler="shuffle", queue_size=12, norm_parts=2)
    message = "cohort: expected a Linear as the classifier, got Conv2d of SqueezeNet"
    with pytest.raises(ValueError, match=message):
        run.fit(progress=False)


def test_names_that_look_like_formulas(tmp_path: Any) -> None:
    run = trainer([staged(UNetEncoder())], "baseline", tmp_path / "run")
    run.data = replace(run.data, name=r"cost in $ or \frac{$")
    run.fit(progress=False)
    assert (tmp_path / "run" / "curves.png").stat().st_size > 0


def test_the_trial_leaves_the_run_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for tried in (True, False):
        run = trainer(pair("vgg"), "lmcl", bilevel_every=1)
        if not tried:
            monkeypatch.setattr(run, "_rehearse", lambda: None)
        torch.manual_seed(1)
        run.fit(progress=False)
        states.append(run.cohort.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
