"""Settings of a run: fields, coercions, checks, and the recipes that hold them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mclfast import Cohort, methods, models, recipe
from mclfast.cohort.topology import topology
from mclfast.config import TrainConfig, field_help, field_types

# Every field away from its default, with the types that YAML gives.
CHANGED: dict[str, Any] = {
    "method": "lmcl",
    "cohort": ["resnet20", "wrn_16_2", "resnet8"],
    "data": "folder",
    "topology": "tree",
    "split_stage": 0,
    "data_root": "somewhere/else",
    "image_size": 24,
    "workers": 3,
    "train_per_class": 5,
    "seed": 7,
    "epochs": 11,
    "batch_size": 64,
    "sampler": "shuffle",
    "images_per_class": 4,
    "augment": False,
    "lr": 0.07,
    "momentum": 0.8,
    "nesterov": False,
    "weight_decay": 1e-5,
    "schedule": "multistep",
    "milestones": [3, 9],
    "lr_decay": 0.2,
    "warmup_epochs": 4,
    "clip_grad_norm": 2.5,
    "amp": "bf16",
    "channels_last": "off",
    "compile_peers": False,
    "cuda_graphs": True,
    "peers_parallel": "stack",
    "memory": "sequential",
    "offload": "none",
    "checkpoint_every": 9,
    "non_finite": "skip",
    "projection_dim": 32,
    "bilevel_every": 5,
    "inner_steps": 3,
    "outer_steps": 2,
    "eval_every": 4,
    "eval_batch_size": 100,
    "device": "cpu",
    "temperature": 0.2,
    "kl_temperature": 4.0,
    "distill_temperature": 2.0,
    "vcl_weight": 0.3,
    "soft_vcl_weight": 0.4,
    "icl_weight": 0.5,
    "soft_icl_weight": 0.6,
    "matcher_dim": 16,
    "backend": "reference",
    "loss": "bank",
    "num_positives": 2,
    "num_negatives": 64,
    "shared_negatives": True,
    "bank_momentum": 0.9,
    "bank_dtype": "bfloat16",
    "bank_storage": "pinned",
}


NOT_FINITE = (float("inf"), float("nan"))
WEIGHTS = ("vcl_weight", "soft_vcl_weight", "icl_weight", "soft_icl_weight")


def read(**values: Any) -> TrainConfig:
    return TrainConfig.from_values(values)


def test_changed_values_cover_every_field():
    names = [*field_types(TrainConfig), *field_types(methods.method_class("lmcl").Options)]
    assert sorted(names) == sorted(CHANGED)
    defaults = TrainConfig().to_values()
    # "lmcl" is the default method, the other one has other options; peers in host memory and
    # compiled ones exclude several of these settings.
    assert [n for n in names if CHANGED[n] == defaults[n]] == ["method", "compile_peers", "offload"]


@pytest.mark.parametrize("values", [{}, CHANGED, {"method": "baseline", "data_root": None}])
def test_round_trip(values):
    config = TrainConfig.from_values(values)
    flat = config.to_values()
    assert {name: flat[name] for name in values} == values
    assert TrainConfig.from_values(flat) == config
    assert TrainConfig.from_values(yaml.safe_load(yaml.safe_dump(flat))) == config
    as_typed = {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in flat.items()}
    assert TrainConfig.from_values({k: str(v) for k, v in as_typed.items()}) == config


def test_every_setting_has_help_and_one_meaning():
    own = field_types(TrainConfig)
    for name in methods.available():
        options = methods.method_class(name).Options
        assert not own.keys() & field_types(options).keys()
        for cls in (TrainConfig, options):
            assert all(field_help(cls)[field] for field in field_types(cls))


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("cohort", "resnet8", ("resnet8",)),
        ("cohort", " resnet8 , wrn_16_2", ("resnet8", "wrn_16_2")),
        ("cohort", ["resnet20"], ("resnet20",)),
        ("milestones", "3,5", (3, 5)),
        ("milestones", "", ()),
        ("milestones", [3, "5"], (3, 5)),
        ("data_root", "none", None),
        ("data_root", None, None),
        ("data_root", Path("a") / "b", str(Path("a") / "b")),
        ("image_size", "None", None),
        ("image_size", "24", 24),
        ("epochs", "3", 3),
        ("epochs", 3.0, 3),
        ("lr", 1, 1.0),
        ("lr", "1e-3", 1e-3),
        ("clip_grad_norm", "none", None),
        ("augment", "no", False),
        ("augment", "TRUE", True),
        ("augment", 0, False),
        ("augment", True, True),
        ("amp", False, "off"),
        ("amp", "off", "off"),
        ("matcher_dim", "8", 8),
        ("temperature", "0.5", 0.5),
    ],
)
def test_coercion(name, given, expected):
    config = read(**{name: given})
    found = getattr(config.options if name in ("matcher_dim", "temperature") else config, name)
    assert found == expected
    assert type(found) is type(expected)


def test_amp_off_as_yaml_reads_it():
    values = yaml.safe_load("amp: off\nlr: 1e-1\ndata_root: null\ncohort: resnet8\n")
    assert values["amp"] is False and values["lr"] == "1e-1"
    config = TrainConfig.from_values(values)
    assert (config.amp, config.lr, config.data_root) == ("off", 0.1, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, r"^field: expected .*got 'epoch' \(did you mean 'epochs'\?\)"),
        ({"options": {}}, "^field: .*got 'options'"),
        (
            {"method": "baseline", "matcher_dim": 3},
            "^matcher_dim: expected a setting of method baseline, got one of method lmcl",
        ),
        ({"method": "lmcll"}, r"^method: expected .*; got 'lmcll' .*'lmcl'"),
        ({"method": ["lmcl"]}, r"^method: expected text, got \['lmcl'\]"),
        ({"cohort": "resnet8,resnet9"}, r"^cohort: .*got 'resnet9' \(did you mean"),
        ({"cohort": ""}, "^cohort: expected at least one network, got none"),
        ({"cohort": 3}, "^cohort: expected a list separated by commas, got 3"),
        ({"data": "digit"}, r"^data: .*got 'digit' \(did you mean 'digits'\?\)"),
        ({"data": 3}, "^data: expected text, got 3"),
        ({"epochs": "three"}, "^epochs: expected an integer, got 'three'"),
        ({"epochs": 2.5}, "^epochs: expected an integer, got 2.5"),
        ({"epochs": True}, "^epochs: expected an integer, got True"),
        ({"epochs": None}, "^epochs: expected an integer, got None"),
        ({"epochs": float("inf")}, "^epochs: expected an integer, got inf"),
        ({"epochs": float("nan")}, "^epochs: expected an integer, got nan"),
        ({"lr": "fast"}, "^lr: expected a number, got 'fast'"),
        ({"lr": [0.1]}, r"^lr: expected a number, got \[0.1\]"),
        ({"milestones": "3,x"}, "^milestones: expected an integer, got 'x'"),
        ({"augment": "maybe"}, "^augment: expected true or false, got 'maybe'"),
        ({"sampler": "random"}, "^sampler: expected one of balanced, shuffle; got 'random'"),
        ({"amp": True}, "^amp: expected one of off, bf16, fp16; got True"),
        ({"schedule": False}, "^schedule: expected one of cosine, multistep; got False"),
        (
            {"images_per_class": 7, "batch_size": 60},
            "^images_per_class: expected a divisor of batch_size 60, got 7",
        ),
        ({"momentum": 0, "nesterov": True}, "^momentum: expected a value > 0 with nesterov, got 0"),
        ({"schedule": "multistep"}, "^milestones: expected at least one epoch for multistep"),
        ({"clip_grad_norm": 0}, "^clip_grad_norm: expected a finite number > 0, got 0"),
        ({"milestones": [3, -1]}, "^milestones: expected a value >= 0, got -1"),
        ({"seed": 2**63}, r"^seed: expected a value < 2\*\*63"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        TrainConfig.from_values(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((n, 0) for n in ("epochs", "batch_size", "images_per_class", "projection_dim")),
        *((n, 0) for n in ("inner_steps", "eval_every", "eval_batch_size", "image_size")),
        ("train_per_class", 0),
        *((n, -1) for n in ("bilevel_every", "outer_steps", "weight_decay", "seed")),
        ("warmup_epochs", -1),
        *((n, v) for n in ("lr", "lr_decay") for v in (0, -0.1, *NOT_FINITE)),
        *(("weight_decay", v) for v in NOT_FINITE),
        *((n, v) for n in WEIGHTS for v in (-0.1, *NOT_FINITE)),
        ("matcher_dim", 0),
    ],
)
def test_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected an? .*> ?=? ?[01], got {value}"):
        read(**{name: value})


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, *NOT_FINITE])
def test_momentum_out_of_range(value):
    with pytest.raises(ValueError, match=rf"^momentum: expected a value in \[0, 1\), got {value}"):
        read(momentum=value)


@pytest.mark.parametrize("name", ["temperature", "kl_temperature", "distill_temperature"])
@pytest.mark.parametrize("value", [0.0, -1.0, 9e-7, 1.1e6, *NOT_FINITE])
def test_temperatures_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected a number in \[1e-6, 1e6\], got "):
        read(**{name: value})
    assert getattr(read(**{name: 1e-6}).options, name) == 1e-6
    assert getattr(read(**{name: 1e6}).options, name) == 1e6


def test_values_at_the_edge():
    config = read(momentum=0, nesterov=False, weight_decay=0, bilevel_every=0, outer_steps=0)
    assert (config.momentum, config.bilevel_every, config.outer_steps) == (0, 0, 0)
    # Only a balanced batch is made of whole groups.
    assert read(sampler="shuffle", batch_size=7, images_per_class=2).batch_size == 7


def test_config_from_python():
    config = TrainConfig(method="baseline", cohort=("resnet8",))
    assert type(config.options) is methods.method_class("baseline").Options
    with pytest.raises(ValueError, match="^epochs"):
        dataclasses.replace(config, epochs=0)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("cohort", "resnet8", ("resnet8",)),
        ("cohort", ["resnet8", "resnet20"], ("resnet8", "resnet20")),
        ("batch_size", "60", 60),
        ("epochs", 3.0, 3),
        ("augment", "no", False),
        ("amp", False, "off"),
        ("data_root", Path("a"), "a"),
        ("milestones", [3, 9], (3, 9)),
        ("lr", 1, 1.0),
    ],
)
def test_config_from_python_coerces(name, given, expected):
    found = getattr(TrainConfig(**{name: given}), name)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("amp", "fp8", "expected one of off, bf16, fp16; got 'fp8'"),
        ("schedule", "cosin", "expected one of cosine, multistep; got 'cosin'"),
        ("sampler", "balance", "expected one of balanced, shuffle; got 'balance'"),
        ("epochs", 2.5, "expected an integer, got 2.5"),
        ("augment", "maybe", "expected true or false, got 'maybe'"),
        ("batch_size", "six", "expected an integer, got 'six'"),
        ("cohort", ("resnet8", 3), "expected text, got 3"),
        ("method", ["lmcl"], r"expected text, got \['lmcl'\]"),
    ],
)
def test_config_from_python_refuses(name, value, message):
    with pytest.raises(ValueError, match=f"^{name}: {message}$"):
        TrainConfig(**{name: value})


def test_options_from_python():
    options = methods.LayerwiseMCL.Options(temperature="0.5", matcher_dim=8.0)
    assert (options.temperature, options.matcher_dim) == (0.5, 8)
    assert TrainConfig(options=options).options is options
    with pytest.raises(ValueError, match="^matcher_dim: expected an integer, got 2.5"):
        methods.LayerwiseMCL.Options(matcher_dim=2.5)
    with pytest.raises(TypeError, match="^options: expected LayerwiseMCL.Options .*lmcl, got dict"):
        TrainConfig(options={"x": 3})
    with pytest.raises(TypeError, match="^options: .*baseline, got LayerwiseMCL.Options"):
        TrainConfig(method="baseline", options=options)
    with pytest.raises(TypeError, match="^options: expected LayerwiseMCL.Options, got dict"):
        methods.LayerwiseMCL([[4]], {"x": 3})


def test_recipes_ship():
    assert {"baseline-cifar100", "lmcl-cifar100"} <= set(recipe.available())


@pytest.mark.parametrize("name", recipe.available())
def test_recipe_is_a_valid_config(name):
    values = recipe.load(name)
    config = TrainConfig.from_values(values)
    assert values == {k: v for k, v in config.to_values().items() if k in values}
    assert recipe.load(str(recipe.folder() / f"{name}.yaml")) == values


def test_lmcl_recipe_is_the_published_run():
    # The published CIFAR-100 settings (arXiv 2207.11518).
    published = {
        "data": "cifar100",
        "epochs": 300,
        "batch_size": 128,
        "images_per_class": 2,
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 5e-4,
        "schedule": "cosine",
        "temperature": 0.1,
        "kl_temperature": 3.0,
        "vcl_weight": 0.1,
        "icl_weight": 0.1,
        "soft_vcl_weight": 1.0,
        "soft_icl_weight": 1.0,
        "bilevel_every": 50,
        "inner_steps": 2,
        "outer_steps": 1,
        "projection_dim": 128,
    }
    found = TrainConfig.from_values(recipe.load("lmcl-cifar100")).to_values()
    assert {name: found[name] for name in published} == published


SGD_CIFAR = {
    "epochs": 300,
    "batch_size": 128,
    "lr": 0.1,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 5e-4,
}
SGD_IMAGENET = SGD_CIFAR | {"batch_size": 256, "weight_decay": 1e-4, "schedule": "multistep"}
MCL_TERMS = {"vcl_weight": 0.1, "icl_weight": 0.1, "soft_vcl_weight": 1.0, "soft_icl_weight": 1.0}
IN_BATCH = (
    SGD_CIFAR
    | MCL_TERMS
    | {
        "schedule": "cosine",
        "sampler": "balanced",
        "images_per_class": 2,
        "loss": "batch",
        "temperature": 0.1,
        "kl_temperature": 3.0,
        "projection_dim": 128,
        "logit_distill": "none",
    }
)
BANKS = (
    SGD_IMAGENET
    | MCL_TERMS
    | {
        "epochs": 90,
        "milestones": [30, 60],
        "loss": "bank",
        "num_positives": 1,
        "num_negatives": 8192,
        "bank_momentum": 0.5,
        "temperature": 0.07,
        "kl_temperature": 3.0,
    }
)
RAMP = {"distill_temperature": 3.0, "rampup_epochs": 80}
PCL = RAMP | {"distill_weight": 1.0, "average_decay": 0.999}
STEPS = SGD_CIFAR | {
    "sampler": "shuffle",
    "schedule": "multistep",
    "milestones": [150, 225],
    "lr_decay": 0.1,
}
LOGIT = {"distill_temperature": 3.0}
LAST_STAGE = {"topology": "shared_stem", "split_stage": 2}
OKD = {
    "nce_weight": 0.025,
    "ce_weight": 1.0,
    "distill_weight": 1.0,
    "distill_temperature": 3.0,
    "bank_momentum": 0.5,
    "projection_dim": 128,
    "nesterov": True,
    "topology": "shared_stem",
}
# Settings of the published runs, and the parameters of their networks in training.
PUBLISHED = {
    "mcl-cifar100": (IN_BATCH, 2 * 472_756),
    "mcl-x4-cifar100": (IN_BATCH, 1_819_552),
    "mcl-imagenet": (BANKS, 2 * 11_689_512),
    "mcl-x4-imagenet": (BANKS, 44_708_832),
    "baseline-imagenet": (
        SGD_IMAGENET | {"epochs": 100, "milestones": [30, 60, 90], "nesterov": False},
        21_797_672,
    ),
    "mcl-okd-imagenet": (
        SGD_IMAGENET
        | OKD
        | {"epochs": 100, "batch_size": 128, "lr": 0.05, "schedule": "cosine"}
        | {"num_negatives": 16384, "temperature": 0.07},
        83_146_976,
    ),
    "mcl-okd-cifar100": (
        SGD_CIFAR
        | OKD
        | {"batch_size": 64, "lr": 0.05, "schedule": "cosine", "sampler": "shuffle"}
        | {"num_negatives": 256, "temperature": 0.1},
        1_819_552,
    ),
    "mcl-logit-cifar100": (IN_BATCH | LOGIT | {"logit_distill": "all"}, 2 * 472_756),
    "mcl-x4-logit-cifar100": (IN_BATCH | LOGIT | {"logit_distill": "last"}, 2_712_864),
    "mcl-x4-logit-imagenet": (BANKS | LOGIT | {"logit_distill": "last"}, 44_708_832),
    "lmcl-imagenet": (
        BANKS
        | {"epochs": 100, "milestones": [30, 60, 90], "vcl_weight": 0.01, "icl_weight": 0.01}
        | {"bilevel_every": 500, "inner_steps": 2, "outer_steps": 1, "distill_temperature": 3.0},
        2 * 21_797_672,
    ),
    "baseline-cifar100": (SGD_CIFAR | {"sampler": "shuffle", "schedule": "cosine"}, 472_756),
    "pcl-cifar100": (STEPS | PCL | LAST_STAGE, 1_212_384 - (3 * 64 * 100 + 100)),
    "ffl-cifar100": (
        STEPS | RAMP | LAST_STAGE | {"weight_decay": 1e-4, "fusion_weight_decay": 1e-5},
        832_920,
    ),
    "afd-cifar100": (
        STEPS | {"weight_decay": 1e-4, "discriminator_lr": 2e-5, "discriminator_weight_decay": 0.1},
        2 * 472_756,
    ),
    # Without the gate, of 4 x (32 + 1) + 8 parameters, and without the two projections.
    "one-x4-cifar100": (
        SGD_CIFAR | LAST_STAGE | {"schedule": "cosine", "rampup_epochs": 0, "sampler": "shuffle"},
        1_553_388 - 140,
    ),
    "okddip-cosine-cifar100": (
        SGD_CIFAR | LAST_STAGE | RAMP | {"schedule": "cosine", "sampler": "shuffle"},
        1_554_272 - 2 * 64 * 8,
    ),
    "okddip-networks-cifar100": (STEPS | RAMP | {"topology": "independent"}, 4 * 472_756),
    "kdcl-imagenet": (
        {"epochs": 100, "batch_size": 2048, "lr": 0.8, "warmup_epochs": 5, "weight_decay": 1e-4}
        | {"teacher": "linear", "topology": "independent"},
        25_557_032 + 11_689_512,
    ),
    "moco-mcl-imagenet": (
        {"epochs": 200, "batch_size": 256, "lr": 0.03, "momentum": 0.9, "nesterov": False}
        | {"weight_decay": 1e-4, "schedule": "multistep", "milestones": [120, 160]}
        | {"queue_size": 65536, "key_momentum": 0.999, "temperature": 0.07, "head": "linear"}
        | {"kl_temperature": 3.0, "projection_dim": 128, "augmentation": "moco-v1"}
        | dict.fromkeys(MCL_TERMS, 1.0),
        2 * 11_689_512,
    ),
    # Beside the three peers there is the classifier of all of them: 3 x 64 x 10 and 10.
    "pcl-cifar10": (STEPS | PCL | LAST_STAGE, 1_212_384 - 6 * 64 * 90 - 4 * 90 - 1_930),
    # Each peer after the first adds a last stage and a classifier.
    "pcl-imagenet": (
        SGD_IMAGENET | PCL | {"epochs": 90, "milestones": [30, 60]},
        11_689_512 + 2 * (8_393_728 + 513_000),
    ),
}


def test_the_settings_of_every_recipe_are_tested():
    # These five beside the logit methods, the sixth above.
    others = {f"{m}-cifar100" for m in ("dml", "cl-ilr", "one", "okddip", "kdcl", "lmcl")}
    assert PUBLISHED.keys() | others == set(recipe.available())


@pytest.mark.parametrize("name", recipe.available())
def test_recipe_names_a_source(name):
    text = (recipe.folder() / f"{name}.yaml").read_text()
    comment = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    assert re.search(r"arXiv \d{4}\.\d{5}|CVPR 2020", comment)
    # A number, or that there is none.
    assert re.search(r"\d\d\.\d|No (number|published accuracy)|no published accuracy", comment)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_is_the_published_run(name):
    published, parameters = PUBLISHED[name]
    config = TrainConfig.from_values(recipe.load(name))
    found = config.to_values()
    assert {key: found[key] for key in published} == published
    classes = {"cifar10": 10, "cifar100": 100, "imagefolder": 1000}[config.data]
    with torch.device("meta"):
        networks = [models.create(n, num_classes=classes) for n in config.cohort]
        shape = topology(
            config.topology, len(networks), len(networks[0].stages), split_stage=config.split_stage
        )
        cohort = Cohort(networks, auxiliary_heads=False, projection_dim=None, topology=shape)
    assert models.parameter_count(cohort) == parameters


def test_unknown_recipe():
    with pytest.raises(ValueError, match=r"^recipe: .*'lmcl-cifar10'.*did you mean"):
        recipe.load("lmcl-cifar10")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "got list"),
        (b"", "got NoneType"),
        (b"1: 2\n", "expected `field: value` lines"),
        (b"a: [1\nb: 2\n", "expected YAML"),
        (b"a: \xff\xfe\n", "expected YAML"),
        (b"a: !!python/object/apply:os.getcwd []\n", "expected YAML"),
    ],
)
def test_damaged_recipe(tmp_path, content, message):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^recipe: .*{message}") as caught:
        recipe.load(str(file))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_recipe_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="^recipe: expected a file .*absent.yaml"):
        recipe.load(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("mcl", "projection_dim"),
        ("lmcl", "matcher_dim"),
        ("mcl", "num_negatives"),
        ("mcl", "num_positives"),
        ("moco-mcl", "queue_size"),
    ],
)
def test_a_number_alone_does_not_ask_for_all_memory(method, name):
    values = {"method": method, name: 2**46}
    if name.startswith("num"):
        values |= {"loss": "bank", "sampler": "shuffle"}
    with pytest.raises(ValueError, match=f"^{name}: expected an integer <= .*got {2**46}"):
        TrainConfig.from_values(values)
