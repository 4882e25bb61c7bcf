"""Published CIFAR-100 accuracies, for runs whose settings are those of the published runs.

The settings are those of a recipe. Most figures are from a protocol that selects on the test set
(see ``source``): the column "published protocol" is the one to compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from mclfast import recipe
from mclfast.config import TrainConfig
from mclfast.methods import Method, method_class
from mclfast.train.state import FREE_SETTINGS


@dataclass(frozen=True)
class Published:
    """A published result.

    Attributes:
        peers: test accuracy in percent of each peer, or one figure for all of them.
        spread: standard deviation of it over runs, None where none is given.
        ensemble: accuracy of the ensemble, None where none is given.
        baseline: accuracy of one such network alone in the same source, None where none is given.
        source: where it is published and how it was selected.
    """

    peers: tuple[float, ...]
    spread: float | None
    ensemble: float | None
    baseline: float | None
    source: str


@dataclass(frozen=True)
class Table:
    """The results of one published setting.

    Attributes:
        recipe: name of the recipe that holds the setting.
        rows: results by cohort.
        changes: what differs from the recipe for these networks.
    """

    recipe: str
    rows: Mapping[tuple[str, ...], Published]
    changes: Mapping[str, Any] = field(default_factory=dict)


_MCL = (
    "MCL (arXiv 2104.12565), published code's README: mean of 3 runs, best of all networks and "
    "epochs on the test set"
)
_LMCL = (
    "layer-wise MCL (arXiv 2207.11518), published code's README: best of all classifiers and "
    "epochs on the test set"
)
_OKD = (
    "MCL-OKD (arXiv 2006.04093): four branches; best of branches, ensemble and epochs on the test "
    "set; MCL-OKD itself with batch 64 and learning rate 0.05, the others 128 and 0.1; the "
    "ensemble of CL-ILR is of three branches"
)
_PCL = "PCL (AAAI 2021, arXiv 2006.04147): three branches that share all but the last stage"

# One network alone; two, independent; four, with stem and first stage in common.
_MCL_TABLE = {
    "resnet32": ((70.91, 0.14), (72.96, 0.28), (74.04, 0.07)),
    "resnet56": ((73.15, 0.23), (74.48, 0.23), (75.74, 0.16)),
    "resnet110": ((75.29, 0.16), (77.12, 0.20), (78.82, 0.14)),
    "wrn_16_2": ((72.55, 0.24), (74.56, 0.11), (75.79, 0.07)),
    "wrn_40_2": ((76.89, 0.29), (77.51, 0.42), (78.84, 0.22)),
    "hcgnet_a1": ((77.42, 0.16), (78.62, 0.26), (79.50, 0.15)),
    "shufflenet_v2_x0_5_cifar": ((67.39, 0.35), (69.55, 0.22), (70.92, 0.28)),
    "shufflenet_v2_x1_0_cifar": ((70.93, 0.24), (73.26, 0.18), (75.18, 0.25)),
}
# The same four with logit distillation of the last.
_MCL_LOGIT = {
    "wrn_16_2": (76.34, 0.22),
    "wrn_40_2": (80.02, 0.45),
    "wrn_28_4": (81.68, 0.31),
    "shufflenet_v2_x1_0_cifar": (77.02, 0.32),
    "hcgnet_a2": (82.47, 0.20),
}
_ALONE: dict[str, tuple[float, float | None]] = {
    **{n: alone for n, (alone, *_) in _MCL_TABLE.items()},
    "wrn_28_4": (79.17, None),
    "hcgnet_a2": (79.00, None),
}
_LMCL_TABLE: dict[tuple[str, ...], tuple[float, ...]] = {
    ("resnet32", "resnet32"): (75.82,),
    ("resnet56", "resnet56"): (77.51,),
    ("resnet110", "resnet110"): (79.48,),
    ("wrn_16_2", "wrn_16_2"): (77.31,),
    ("wrn_40_2", "wrn_40_2"): (80.96,),
    ("shufflenet_v2_x0_5_cifar", "shufflenet_v2_x0_5_cifar"): (72.61,),
    ("shufflenet_v2_x1_0_cifar", "shufflenet_v2_x1_0_cifar"): (77.25,),
    ("hcgnet_a1", "hcgnet_a1"): (81.66,),
    ("hcgnet_a2", "hcgnet_a2"): (83.14,),
    ("resnet32", "resnet110"): (75.82, 79.71),
    ("resnet56", "resnet110"): (77.04, 79.56),
    ("wrn_16_2", "wrn_40_2"): (76.88, 80.24),
    ("wrn_40_2", "wrn_28_4"): (80.42, 82.61),
    ("resnet56", "wrn_40_2"): (77.54, 80.72),
    ("resnet110", "wrn_28_4"): (80.02, 82.84),
    # Named without a width there; at 76.85 it cannot be the half one, which has 72.61 at most.
    ("shufflenet_v2_x1_0_cifar", "resnet110"): (76.85, 79.17),
    ("shufflenet_v2_x1_0_cifar", "wrn_40_2"): (77.06, 80.29),
}
# Top-1 error of a student and of the ensemble, by method; the first is one network alone.
_OKD_TABLE = {
    "densenet_40_12": (
        29.17,
        {
            "dml": (27.34, 26.02),
            "cl-ilr": (27.38, 26.19),
            "one": (29.01, 28.67),
            "okddip": (28.75, 27.51),
            "mcl-okd": (26.04, 23.55),
        },
    ),
    "resnet32": (
        28.91,
        {
            "dml": (24.92, 22.97),
            "cl-ilr": (25.40, 24.03),
            "one": (25.74, 24.03),
            "okddip": (25.76, 23.73),
            "mcl-okd": (24.52, 22.00),
        },
    ),
    "vgg16": (
        25.18,
        {
            "dml": (24.14, 23.27),
            "cl-ilr": (23.58, 22.96),
            "one": (25.22, 25.12),
            "okddip": (24.86, 24.52),
            "mcl-okd": (23.11, 22.36),
        },
    ),
    "resnet110": (
        23.62,
        {
            "dml": (21.51, 19.12),
            "cl-ilr": (21.16, 18.66),
            "one": (22.19, 20.23),
            "okddip": (21.05, 19.40),
            "mcl-okd": (20.39, 18.29),
        },
    ),
    "hcgnet_a1": (
        22.46,
        {
            "dml": (18.98, 17.86),
            "cl-ilr": (19.04, 18.35),
            "one": (22.30, 21.64),
            "okddip": (21.54, 20.97),
            "mcl-okd": (18.72, 17.54),
        },
    ),
}
# Its VGG-16 and DenseNet-40-12 are left out: in the only known code they are other networks than
# here (VGG-16 with two hidden linear layers more, DenseNet with 264 parameters less).
_PCL_TABLE = {"resnet32": (74.14, 0.16), "resnet110": (79.98, 0.55), "wrn_20_8": (80.51, 0.49)}
# Their number of negatives is larger (MCL-OKD, published code).
_MANY_NEGATIVES = ("vgg16", "hcgnet_a1")
# The methods it compares with, as it trains them.
_OKD_RECIPES = {
    "dml": "dml-cifar100",
    "cl-ilr": "cl-ilr-cifar100",
    "one": "one-x4-cifar100",
    "okddip": "okddip-cosine-cifar100",
}


def _mcl(column: int, count: int) -> dict[tuple[str, ...], Published]:
    return {
        (n,) * count: Published((row[column][0],), row[column][1], None, row[0][0], _MCL)
        for n, row in _MCL_TABLE.items()
    }


def _okd(method: str, networks: Iterable[str]) -> dict[tuple[str, ...], Published]:
    rows: dict[tuple[str, ...], Published] = {}
    for n in networks:
        alone, errors = _OKD_TABLE[n]
        student, ensemble, baseline = (round(100 - e, 2) for e in (*errors[method], alone))
        rows[(n,) * 4] = Published((student,), None, ensemble, baseline, _OKD)
    return rows


#: All but those of networks trained alone.
TABLES = (
    Table("mcl-cifar100", _mcl(1, 2)),
    Table("mcl-x4-cifar100", _mcl(2, 4)),
    Table(
        "mcl-x4-logit-cifar100",
        {
            (n,) * 4: Published((mean,), spread, None, _ALONE[n][0], _MCL)
            for n, (mean, spread) in _MCL_LOGIT.items()
        },
    ),
    Table(
        "lmcl-cifar100",
        {
            c: Published(peers, None, None, _ALONE[c[0]][0] if c[0] == c[1] else None, _LMCL)
            for c, peers in _LMCL_TABLE.items()
        },
    ),
    *(Table(name, _okd(method, _OKD_TABLE)) for method, name in _OKD_RECIPES.items()),
    Table("mcl-okd-cifar100", _okd("mcl-okd", _OKD_TABLE.keys() - set(_MANY_NEGATIVES))),
    Table("mcl-okd-cifar100", _okd("mcl-okd", _MANY_NEGATIVES), {"num_negatives": 16384}),
    Table(
        "pcl-cifar100",
        {
            (n,) * 3: Published((mean,), spread, None, None, _PCL)
            for n, (mean, spread) in _PCL_TABLE.items()
        },
    ),
)
_ALONE_RECIPE = "baseline-cifar100"
#: Where, and by which operations, a run computes.
_FREE = FREE_SETTINGS | {"backend", "bank_storage"}


def published(config: TrainConfig) -> Published | None:
    """The published result for a setting; None where anything that decides the outcome differs.

    That is every setting but the seed and those that say where and by which operations a run
    computes; ``amp`` counts, as the published runs have full precision. Settings of the loop that
    a run does not use, such as the milestones of a cosine schedule, may have any value.
    """
    return next((found for found, other in _candidates(config) if not other), None)


def differing_settings(config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The settings, (here, published), that keep a published result from being that of a run.

    Of the published setting with the fewest of them; empty where a result is shown, and where none
    is known of this method with these networks on this data set.
    """
    candidates = [other for _, other in _candidates(config)]
    nearest = min(candidates, key=len, default={})
    return {} if "data" in nearest else nearest


def _candidates(config: TrainConfig) -> Iterator[tuple[Published, dict[str, tuple[Any, Any]]]]:
    """Results of the method with the networks, and the settings that differ from theirs."""
    if config.method == "baseline":
        alone = _alone(config)
        if alone is not None:
            yield alone, _differences(config, _ALONE_RECIPE, {})
        return
    for table in TABLES:
        found = table.rows.get(config.cohort)
        if found is not None and _values(table.recipe)["method"] == config.method:
            yield found, _differences(config, table.recipe, table.changes)


def _alone(config: TrainConfig) -> Published | None:
    """Of networks that do not interact: figures of one source for all of them, or none."""
    networks = config.cohort[:1] if len(set(config.cohort)) == 1 else config.cohort
    if all(n in _ALONE for n in networks):
        peers = tuple(_ALONE[n][0] for n in networks)
        spread = _ALONE[networks[0]][1] if len(networks) == 1 else None
        return Published(peers, spread, None, None, _MCL)
    if all(n in _OKD_TABLE for n in networks):
        peers = tuple(round(100 - _OKD_TABLE[n][0], 2) for n in networks)
        return Published(peers, None, None, None, _OKD)
    return None


def _differences(
    config: TrainConfig, name: str, changes: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    theirs = TrainConfig.from_values({**_values(name), **changes})
    here, there = config.to_values(), theirs.to_values()
    # What only one of the two settings uses differs as well, by what makes it used.
    used = _deciding(config) & _deciding(theirs)
    return {k: (here[k], there[k]) for k in here if k in used and here[k] != there[k]}


@cache
def _values(name: str) -> dict[str, Any]:
    return recipe.load(name)


def _deciding(config: TrainConfig) -> set[str]:
    """The settings that decide the outcome of a run, but the networks and the seed."""
    method, unused = method_class(config.method), {"cohort", "seed"} | _FREE
    if config.sampler == "shuffle":
        unused.add("images_per_class")
    if config.topology == "independent":
        unused.add("split_stage")
    if config.schedule == "cosine":
        unused |= {"milestones", "lr_decay"}
    if not method.projections:
        unused.add("projection_dim")
    if method.meta_parameters is Method.meta_parameters:
        unused |= {"bilevel_every", "inner_steps", "outer_steps"}
    return config.to_values().keys() - unused
