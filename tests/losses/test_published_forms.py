"""Published accuracies: shown for the published setting, for no other, and as in the recipes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest

from mclfast import models, recipe
from mclfast._base.settings import field_types
from mclfast.compare.published import Published, differing_settings, published, tables
from mclfast.config import TrainConfig

SHUFFLE = "shufflenet_v2_x1_0_cifar"
# Recipe, cohort, what differs from the recipe: accuracy of the peers, spread, ensemble, alone.
KNOWN: list[tuple[str, str, dict[str, Any], tuple[Any, ...]]] = [
    ("baseline-cifar100", "resnet32", {}, ((70.91,), 0.14, None, None)),
    ("baseline-cifar100", "resnet32,resnet32", {}, ((70.91,), 0.14, None, None)),
    ("baseline-cifar100", "resnet32,resnet110", {}, ((70.91, 75.29), None, None, None)),
    # What MCL does not have is taken from MCL-OKD, but not both side by side.
    ("baseline-cifar100", "densenet_40_12,vgg16", {}, ((70.83, 74.82), None, None, None)),
    ("lmcl-cifar100", "resnet56,resnet56", {}, ((77.51,), None, None, 73.15)),
    ("lmcl-cifar100", "resnet32,resnet110", {}, ((75.82, 79.71), None, None, None)),
    ("lmcl-cifar100", f"{SHUFFLE},{SHUFFLE}", {}, ((77.25,), None, None, 70.93)),
    ("lmcl-cifar100", f"{SHUFFLE},resnet110", {}, ((76.85, 79.17), None, None, None)),
    ("mcl-cifar100", "wrn_16_2,wrn_16_2", {}, ((74.56,), 0.11, None, 72.55)),
    ("mcl-x4-cifar100", "wrn_16_2", {}, ((75.79,), 0.07, None, 72.55)),
    ("mcl-x4-cifar100", "wrn_16_2", {"logit_distill": "last"}, ((76.34,), 0.22, None, 72.55)),
    ("mcl-x4-logit-cifar100", "hcgnet_a2", {}, ((82.47,), 0.20, None, 79.00)),
    ("dml-cifar100", "resnet32", {}, ((75.08,), None, 77.03, 71.09)),
    ("cl-ilr-cifar100", "resnet110", {}, ((78.84,), None, 81.34, 76.38)),
    ("one-x4-cifar100", "vgg16", {}, ((74.78,), None, 74.88, 74.82)),
    ("okddip-cosine-cifar100", "hcgnet_a1", {}, ((78.46,), None, 79.03, 77.54)),
    ("mcl-okd-cifar100", "densenet_40_12", {}, ((73.96,), None, 76.45, 70.83)),
    ("mcl-okd-cifar100", "vgg16", {"num_negatives": 16384}, ((76.89,), None, 77.64, 74.82)),
    ("pcl-cifar100", "resnet32", {}, ((74.14,), 0.16, None, None)),
    ("pcl-cifar100", "wrn_20_8", {}, ((80.51,), 0.49, None, None)),
]
# What says how a run computes, each with another value.
FREE = {
    "seed": 7,
    "data_root": "elsewhere",
    "workers": 3,
    "channels_last": "on",
    "cuda_graphs": True,
    "compile_peers": True,
    "memory": "checkpoint",
    "checkpoint_every": 5,
    "non_finite": "skip",
    "eval_batch_size": 100,
    "device": "cuda:1",
}
# Another value for each setting that decides the outcome.
OTHER: dict[str, Any] = {
    "topology": ["shared_stem", "tree", "independent"],
    "split_stage": [0, 1, 2],
    "data": ["cifar10", "digits"],
    "image_size": [24],
    "train_per_class": [100],
    "epochs": [3, 299, 301],
    "batch_size": [64, 130],
    "sampler": ["balanced", "shuffle"],
    "images_per_class": [1, 4],
    "augment": [False],
    "lr": [0.05, 0.1000001],
    "momentum": [0.8],
    "nesterov": [False, True],
    "weight_decay": [0.0, 1e-4],
    "schedule": ["cosine", "multistep"],
    "warmup_epochs": [5],
    "milestones": [(150,), (151, 225)],
    "lr_decay": [0.2],
    "clip_grad_norm": [5.0],
    "amp": ["bf16", "fp16"],
    "projection_dim": [64],
    "bilevel_every": [0, 51],
    "inner_steps": [1],
    "outer_steps": [2],
    # The best epoch on the test set is sought among those evaluated.
    "eval_every": [2],
}
# Settings that a run of the recipe does not use.
UNUSED = {
    "lmcl-cifar100": {"milestones", "lr_decay", "split_stage"},
    "mcl-x4-cifar100": {"milestones", "lr_decay", "bilevel_every", "inner_steps", "outer_steps"},
    "pcl-cifar100": {
        "images_per_class",
        "projection_dim",
        "bilevel_every",
        "inner_steps",
        "outer_steps",
    },
    "mcl-okd-cifar100": {
        "images_per_class",
        "milestones",
        "lr_decay",
        "bilevel_every",
        "inner_steps",
        "outer_steps",
    },
    "baseline-cifar100": {
        "split_stage",
        "images_per_class",
        "projection_dim",
        "milestones",
        "lr_decay",
        "bilevel_every",
        "inner_steps",
        "outer_steps",
    },
}


def find(name: str, **changes: Any) -> Published | None:
    return published(TrainConfig.from_values(recipe.load(name) | changes))


def cohort_like(name: str, networks: str) -> list[str]:
    """One network stands for as many as the recipe has."""
    count = len(recipe.load(name)["cohort"])
    return networks.split(",") if "," in networks else [networks] * count


@pytest.mark.parametrize(("name", "networks", "changes", "expected"), KNOWN)
def test_shown_in_the_published_setting(name, networks, changes, expected):
    found = find(name, cohort=cohort_like(name, networks), **changes)
    assert found is not None
    assert (found.peers, found.spread, found.ensemble, found.baseline) == expected
    assert re.search(r"arXiv \d{4}\.\d{5}", found.source)


def test_how_a_run_computes_does_not_matter():
    for name, value in FREE.items():
        assert find("mcl-cifar100", **{name: value}) == find("mcl-cifar100") is not None, name
    assert find("mcl-cifar100", peers_parallel="streams") is not None
    assert find("mcl-cifar100", memory="sequential", offload="peers") is not None
    assert find("mcl-cifar100", backend="reference", bank_storage="pinned") is not None


def options_changed(config: TrainConfig) -> Iterator[tuple[str, Any]]:
    """Another value for every option of a method."""
    for name, value in dataclasses.asdict(config.options).items():
        if isinstance(value, bool):
            yield name, not value
        elif isinstance(value, int):
            yield name, value * 2 or 1
        elif isinstance(value, float):
            yield name, value / 2
        else:
            yield name, {"batch": "bank", "none": "all", "float32": "float16"}.get(value, value)


@pytest.mark.parametrize("name", UNUSED)
def test_no_other_setting_is_taken_for_the_published_one(name):
    assert OTHER.keys() | FREE.keys() | {"peers_parallel", "offload"} == (
        field_types(TrainConfig).keys() - {"method", "cohort"}
    )
    config = TrainConfig.from_values(recipe.load(name))
    values, tried = config.to_values(), set()
    assert published(config) is not None
    every = [(field, value) for field, others in OTHER.items() for value in others]
    for field, value in (*every, *options_changed(config)):
        if values[field] in (value, list(value) if isinstance(value, tuple) else value):
            continue
        # What goes with another value, so that it is not refused.
        needed = {"multistep": {"milestones": [150, 225]}, "balanced": {"images_per_class": 2}}
        other = values | needed.get(value if isinstance(value, str) else "", {}) | {field: value}
        tried.add(field)
        found = published(TrainConfig.from_values(other))
        assert (found is not None) == (field in UNUSED[name]), (field, value)
    assert OTHER.keys() <= tried


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mcl-x4-cifar100", {"cohort": ["hcgnet_a2"] * 4}),
        ("mcl-x4-cifar100", {"cohort": ["wrn_16_2"] * 3}),
        ("mcl-x4-cifar100", {"cohort": ["wrn_16_2"]}),
        ("mcl-x4-cifar100", {"cohort": ["wrn_16_2"] * 4, "logit_distill": "all"}),
        ("mcl-x4-logit-cifar100", {"cohort": ["resnet32"] * 4}),
        ("mcl-logit-cifar100", {}),
        ("mcl-cifar100", {"cohort": ["resnet8"] * 2}),
        ("mcl-cifar100", {"loss": "bank", "sampler": "shuffle"}),
        ("baseline-cifar100", {"cohort": ["vgg16", "resnet56"]}),
        ("baseline-cifar100", {"cohort": ["resnet8", "resnet32"]}),
        ("lmcl-cifar100", {"cohort": ["resnet110", "resnet32"]}),
        ("lmcl-cifar100", {"cohort": ["resnet32"] * 3}),
        ("mcl-okd-cifar100", {"cohort": ["vgg16"] * 4}),
        ("mcl-okd-cifar100", {"num_negatives": 16384}),
        ("one-cifar100", {}),
        ("one-cifar100", {"cohort": ["resnet32"] * 4}),
        ("okddip-cifar100", {}),
        ("okddip-networks-cifar100", {}),
        ("kdcl-cifar100", {}),
        ("ffl-cifar100", {}),
        ("afd-cifar100", {}),
        ("pcl-cifar100", {"cohort": ["vgg16"] * 3}),
        ("pcl-cifar100", {"cohort": ["resnet32"] * 4}),
        ("pcl-cifar10", {}),
        ("dml-cifar100", {"cohort": ["resnet32"] * 2}),
    ],
)
def test_not_shown(name, changes):
    assert find(name, **changes) is None


def differing(name: str, **changes: Any) -> dict[str, tuple[Any, Any]]:
    return differing_settings(TrainConfig.from_values(recipe.load(name) | changes))


def test_what_keeps_a_number_from_being_shown():
    assert differing("mcl-cifar100") == differing("mcl-cifar100", seed=3, device="cpu") == {}
    found = differing("mcl-cifar100", epochs=200, amp="bf16", kl_temperature=4.0)
    assert found == {"epochs": (200, 300), "amp": ("bf16", "off"), "kl_temperature": (4.0, 3.0)}
    # Settings that one of the two does not use differ by what makes them used.
    found = differing("mcl-cifar100", schedule="multistep", milestones=[150], lr_decay=0.2)
    assert found == {"schedule": ("multistep", "cosine")}
    # Of two published settings of these networks the nearer one.
    four = {"cohort": ["wrn_16_2"] * 4}
    assert differing("mcl-x4-logit-cifar100", **four, epochs=3) == {"epochs": (3, 300)}
    assert differing("mcl-x4-cifar100", **four, epochs=3) == {"epochs": (3, 300)}
    assert differing("baseline-cifar100", cohort=["resnet32"], lr=0.2) == {"lr": (0.2, 0.1)}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mcl-cifar100", {"cohort": ["resnet8"] * 2, "epochs": 3}),
        ("mcl-cifar100", {"data": "cifar10"}),
        ("kdcl-cifar100", {"epochs": 3}),
        ("baseline-cifar100", {"cohort": ["resnet8", "resnet32"], "epochs": 3}),
    ],
)
def test_nothing_is_said_where_no_number_is_known(name, changes):
    assert differing(name, **changes) == {}


def test_settings_of_another_recipe():
    """A comparison gives the settings of one recipe to all its methods."""
    values = recipe.load("lmcl-cifar100")
    common = {k: v for k, v in values.items() if k in field_types(TrainConfig)}
    # The published baseline draws its batches without regard to classes.
    for method, shown in (("mcl", True), ("baseline", False), ("dml", False)):
        config = TrainConfig.from_values(common | {"method": method})
        assert (published(config) is not None) == shown


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d*\.\d+", text)]


@pytest.mark.parametrize("table", tables(), ids=lambda t: t.recipe)
def test_every_number_is_in_its_recipe(table):
    """Beside its network, and the table has all that the recipe has."""
    text = (recipe.folder() / f"{table.recipe}.yaml").read_text()
    # What PCL reports of other methods is of another setting.
    text = text if table.recipe.startswith("pcl") else text.partition("PCL")[0]
    names = "|".join(models.available())
    entry = rf"\b((?:{names})(?:,(?:{names}))?) +(\d[\d. &>()+-]*)"
    entries = {n: numbers(rest) for n, rest in re.findall(entry, text)}
    rows = {c: row for t in tables() if t.recipe == table.recipe for c, row in t.rows.items()}
    shown = {",".join(c) if "," in next(iter(entries)) else c[0]: row for c, row in rows.items()}
    # Those two of PCL are not the networks of this package.
    absent = {"vgg16", "densenet_40_12"} if table.recipe.startswith("pcl") else set()
    assert entries.keys() - shown.keys() == absent
    for name, row in shown.items():
        wanted = [row.baseline, *row.peers, row.spread, row.ensemble]
        assert entries[name] == [number for number in wanted if number is not None], name


def test_baselines_are_those_of_the_recipe():
    text = (recipe.folder() / "baseline-cifar100.yaml").read_text()
    entries = re.findall(r"(\w+) +(\d\d\.\d\d)(?: \+- (\.\d+))?", text)
    assert len(entries) == 12
    for name, mean, spread in entries:
        found = find("baseline-cifar100", cohort=[name])
        assert found is not None
        assert found.peers == (float(mean),)
        assert found.spread == (float(spread) if spread else None)
