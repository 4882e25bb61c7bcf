"""The design of a comparison: methods with their settings, and the seeds.

A design is read from options and a plan file. A plan file is YAML; every comparison writes its
design as one, ``plan.yaml``::

    seeds: 3                      # 0, 1, 2; or a list
    defaults: {data: digits, cohort: [resnet20, resnet20], epochs: 20}
    methods:                      # or a list of names
      baseline: {}
      lmcl: {bilevel_every: 50}
      lmcl-shared: {method: lmcl, topology: shared_stem}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mclfast._base.checks import describe, unknown_name
from mclfast._base.files import read_yaml, write_text
from mclfast._base.optional import optional_import
from mclfast._base.settings import coerce, field_types
from mclfast.config import TrainConfig

BASELINE = "baseline"
#: Keys of a plan file; a comparison adds the command that made it.
_KEYS = ("seeds", "defaults", "methods", "command")


@dataclass(frozen=True)
class Design:
    """The entries of a comparison and the seeds that each of them runs with.

    Attributes:
        configs: settings of each entry by its label, in the order of the report; their own seed is
            not used.
        seeds: seeds of the runs; every entry runs once with each seed.
    """

    configs: dict[str, TrainConfig]
    seeds: tuple[int, ...]

    def baseline_of(self, label: str) -> str | None:
        """Label of the entry that an entry is measured against.

        This is the first entry that trains the same networks on the same data without interaction.

        Args:
            label: label of the entry.

        Returns:
            The label; None if there is no such entry, or if it is the entry itself.
        """
        mine = self.configs[label]
        found = (
            other
            for other, c in self.configs.items()
            if c.method == BASELINE and (c.cohort, c.data) == (mine.cohort, mine.data)
        )
        first = next(found, None)
        return None if first == label else first


def make_design(
    file: Path | None,
    methods: str | None,
    seeds: str | None,
    settings: Mapping[str, Any],
    overrides: Sequence[str],
    recipe: Mapping[str, Any] | None = None,
) -> Design:
    """Makes the design from a plan file and from options, which replace what the file says.

    A setting given in several places is taken from the first of: ``overrides``, the file's entry of
    the method, ``settings``, the file's ``defaults``, ``recipe``.

    Args:
        file: plan file; None for options alone.
        methods: labels of entries separated by commas; a label that is not in the file is the name
            of a method. None for all entries of the file.
        seeds: number n of seeds, for the seeds 0 to n - 1, or several seeds separated by commas;
            None for those of the file.
        settings: settings of all entries.
        overrides: settings of single entries, as ``LABEL.setting=value``.
        recipe: settings of a recipe. Options of its method apply only to entries of that method.
            If there are no entries, the recipe's method is the only one.

    Raises:
        ValueError: an argument or the file holds a mistake, named in one line.
    """
    given = _read(file) if file else {}
    recipe_method, common, special = _recipe(recipe)
    chosen = _entries(given.get("methods", {})) or ({recipe_method: {}} if recipe else {})
    if methods is not None:
        names = [name.strip() for name in methods.split(",")]
        if not all(names):
            raise ValueError(f"methods: expected names separated by commas, got {methods!r}")
        if twice := {n for n in names if names.count(n) > 1}:
            raise ValueError(f"methods: expected each once, got {min(twice)} twice")
        chosen = {name: chosen.get(name, {}) for name in names}
    if not chosen:
        raise ValueError("methods: expected names by --methods, or a --plan or --recipe, got none")
    for label in chosen:
        # The label becomes the name of a folder.
        if not re.fullmatch(r"\w[\w.+-]*", label):
            raise ValueError(f"methods: expected a name fit for a folder, got {label!r}")
    own = {label: dict(values) for label, values in chosen.items()}
    for text in overrides:
        label, name, value = _override(text, own)
        own[label][name] = value
    shared = {**common, **_mapping("defaults", given.get("defaults", {})), **settings}
    configs = {}
    for label, values in own.items():
        if "seed" in shared or "seed" in values:
            raise ValueError("seed: expected --seeds for the whole comparison, got a setting")
        found = {"method": label, **shared, **values}
        if found["method"] == recipe_method:
            found = {**special, **found}
        try:
            configs[label] = TrainConfig.from_values(found)
        except ValueError as error:
            # Names the entry if the mistake may be among its own settings.
            where = f" (settings of {label})" if values else ""
            raise ValueError(f"{error}{where}") from None
    return Design(configs, _seeds(given.get("seeds", 3) if seeds is None else seeds))


def _recipe(values: Mapping[str, Any] | None) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Method of a recipe, its settings for all methods, and the options of its method."""
    values = values or {}
    # Checked before it is split, as a name that neither part knows would be lost.
    method = TrainConfig.from_values(values).method
    types = field_types(TrainConfig)
    common = {k: v for k, v in values.items() if k in types and k != "method"}
    return method, common, {k: v for k, v in values.items() if k not in types}


def _read(file: Path) -> dict[str, Any]:
    values = read_yaml(file, "plan")
    for key in values:
        if key not in _KEYS:
            raise unknown_name("plan", key, _KEYS)
    return values


def _mapping(argument: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{argument}: expected `setting: value` lines, got {describe(value)}")
    return value


def _entries(value: Any) -> dict[str, dict[str, Any]]:
    if isinstance(value, list):
        for label in value:
            if isinstance(label, (dict, list)):
                raise ValueError(
                    "methods: expected names in a list, or `name: {setting: value}` lines, got a "
                    f"list with a {describe(label)}"
                )
        value = dict.fromkeys(value)
    if isinstance(value, dict):
        # YAML reads a name of digits as a number.
        value = {str(label): settings for label, settings in value.items()}
    entries = _mapping("methods", value)
    return {label: _mapping(f"methods.{label}", v) for label, v in entries.items()}


def _override(text: str, labels: Mapping[str, Any]) -> tuple[str, str, str]:
    target, equals, value = text.partition("=")
    # The last dot counts: a label may hold dots, a setting does not.
    label, dot, name = target.rpartition(".")
    if not (equals and dot):
        raise ValueError(f"set: expected METHOD.setting=value, got {text!r}")
    if label not in labels:
        raise unknown_name("set", label, labels)
    return label, name.replace("-", "_"), value


def _seeds(value: Any) -> tuple[int, ...]:
    several = isinstance(value, list) or (isinstance(value, str) and "," in value)
    if several:
        seeds = coerce("seeds", tuple[int, ...], value)
    else:
        count = coerce("seeds", int, value)
        if count < 1:
            raise ValueError(f"seeds: expected a number >= 1, got {count}")
        seeds = tuple(range(count))
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected different numbers >= 0, got {value!r}")
    return seeds


def write_design(path: Path, design: Design, command: str) -> None:
    """Writes a design as a plan file with all settings, including the defaults of this version.

    Args:
        path: file to write.
        design: design of the comparison.
        command: command line that made the comparison.
    """
    yaml = optional_import("yaml", extra="train")
    values = {label: c.to_values() for label, c in design.configs.items()}
    for entry in values.values():
        del entry["seed"]
    common = field_types(TrainConfig).keys() - {"seed", "method"}
    first = next(iter(values.values()))
    defaults = {
        name: first[name]
        for name in first
        if name in common and all(v[name] == first[name] for v in values.values())
    }
    methods = {
        label: {k: v for k, v in entry.items() if k not in defaults}
        for label, entry in values.items()
    }
    content = {
        "command": command,
        "seeds": list(design.seeds),
        "defaults": defaults,
        "methods": methods,
    }
    write_text(path, yaml.safe_dump(content, sort_keys=False))
