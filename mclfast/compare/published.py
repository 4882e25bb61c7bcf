"""Published CIFAR-100 accuracies, for runs whose settings are those of the published runs.

The figures lie in ``recipes/published.yaml``, each table with the recipe that holds its settings.
Most figures are from a protocol that selects on the test set (see ``source``): the column
"published protocol" is the one to compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
        source: paper and table of the figure, and how the figure was selected.
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
        changes: values of settings that replace the recipe's for these networks.
    """

    recipe: str
    rows: Mapping[tuple[str, ...], Published]
    changes: Mapping[str, Any]


@cache
def tables() -> tuple[Table, ...]:
    """All published results but the ones of networks trained alone."""
    return tuple(_table(entry) for entry in recipe.published()["tables"])


def _table(entry: Mapping[str, Any]) -> Table:
    figures = recipe.published()
    alone = figures["alone"].get(entry.get("alone"), {})
    rows = {}
    for names, row in entry["rows"].items():
        first, *others = names.split(",")
        cohort = (first, *others) if others else (first,) * entry["peers"]
        accuracy = row["accuracy"]
        rows[cohort] = Published(
            peers=tuple(accuracy) if isinstance(accuracy, list) else (accuracy,),
            spread=row.get("spread"),
            ensemble=row.get("ensemble"),
            baseline=None if others or not alone else alone[first]["accuracy"],
            source=figures["sources"][entry["source"]],
        )
    return Table(entry["recipe"], rows, entry.get("changes", {}))


#: Where, and by which operations, a run computes.
_FREE = FREE_SETTINGS | {"backend", "bank_storage"}


def published(config: TrainConfig) -> Published | None:
    """The published result for a setting; None where anything that decides the outcome differs.

    Every setting counts but the seed and the ones that say where and by which operations a run
    computes; ``amp`` counts too, as the published runs have full precision. Settings of the loop
    that a run does not use, such as the milestones of a cosine schedule, may have any value.
    """
    return next((found for found, other in _candidates(config) if not other), None)


def differing_settings(config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The settings, (here, published), that keep a published result from being that of a run.

    Where several settings were published, the one with the fewest differences is taken. Empty where
    a result is shown, and where none is known of this method with these networks on this data set.
    """
    candidates = [other for _, other in _candidates(config)]
    nearest = min(candidates, key=len, default={})
    return {} if "data" in nearest else nearest


def _candidates(config: TrainConfig) -> Iterator[tuple[Published, dict[str, tuple[Any, Any]]]]:
    """Results of the method with the networks, and the settings that differ from theirs."""
    if config.method == "baseline":
        alone = _alone(config.cohort)
        if alone is not None:
            yield alone, _differences(config, "baseline-cifar100", {})
        return
    for table in tables():
        found = table.rows.get(config.cohort)
        if found is not None and _values(table.recipe)["method"] == config.method:
            yield found, _differences(config, table.recipe, table.changes)


def _alone(cohort: Sequence[str]) -> Published | None:
    """Networks that do not interact: figures of one source for all of them, or none."""
    networks = cohort[:1] if len(set(cohort)) == 1 else cohort
    figures = recipe.published()
    for source, rows in figures["alone"].items():
        if all(n in rows for n in networks):
            peers = tuple(rows[n]["accuracy"] for n in networks)
            spread = rows[networks[0]].get("spread") if len(networks) == 1 else None
            return Published(peers, spread, None, None, figures["sources"][source])
    return None


def _differences(
    config: TrainConfig, name: str, changes: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    theirs = TrainConfig.from_values({**_values(name), **changes})
    here, there = config.to_values(), theirs.to_values()
    # A setting that only one of the two uses shows as another one: the setting that makes it used.
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
