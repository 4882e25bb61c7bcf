"""``mclfast plan``: the memory that a run needs, and the settings that fit, without training."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from typing import Any

from mclfast.cli.settings import run_settings

HELP = "predict the memory of a training run and the settings that fit, without training"

_EITHER = ("memory", "offload", "amp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``mclfast plan`` except the settings, which depend on the method."""
    parser.add_argument("-h", "--help", action="store_true", help="show all settings and exit")
    parser.add_argument(
        "--recipe", metavar="NAME", help="name of a recipe, or a YAML file with settings"
    )
    parser.add_argument("--batch", metavar="N", help="the same as --batch-size")
    parser.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="memory of the device, such as 8GiB (default: the free memory of --device)",
    )
    parser.add_argument("--json", action="store_true", help="print bytes as JSON")


def run(known: argparse.Namespace, rest: list[str]) -> int:
    """Runs the command.

    Returns:
        1 if no choice fits, else 0.
    """
    from mclfast import recipe

    values: dict[str, Any] = recipe.load(known.recipe) if known.recipe else {}
    values |= run_settings(known, rest, values)
    if known.batch is not None:
        if any(given.partition("=")[0] == "--batch-size" for given in rest):
            raise ValueError("batch: expected one of --batch and --batch-size, got both")
        values["batch_size"] = known.batch
    if values.get("offload") == "peers":
        # The only mode that can offload peers.
        values.setdefault("memory", "sequential")

    from mclfast._base.optional import optional_import
    from mclfast.config import TrainConfig
    from mclfast.plan import report
    from mclfast.plan.chooser import MODES
    from mclfast.plan.planner import choices, make_plan

    shuffled = _needs_shuffle(values)
    if shuffled:
        values["sampler"] = "shuffle"
    TrainConfig.from_values(values)
    asked = {name: [values.pop(name)] for name in _EITHER if name in values}
    if asked.get("memory") == ["auto"]:
        asked["memory"] = list(MODES)
    config = TrainConfig.from_values(values)
    tqdm = optional_import("tqdm", extra="train")
    device, memory = _device(config.device, known.device_memory)
    if device == "cpu":
        # Few CPUs are fast in half precision.
        asked.setdefault("amp", ["off"])
    bar = partial(tqdm.tqdm, desc="rehearsing", leave=False, disable=not sys.stderr.isatty())
    plan = make_plan(config, device, memory, choices(**asked), track=bar)
    if known.json:
        print(json.dumps(report.as_values(plan), indent=2))
    else:
        print(report.text(plan))
        if shuffled:
            print(
                f"sampler: planned as shuffle, as images_per_class is no divisor of "
                f"batch_size {config.batch_size}; give both to train"
            )
    return 0 if any(row.fits for row in plan.rows) else 1


def _needs_shuffle(values: dict[str, Any]) -> bool:
    """Whether the default number of images per class is no divisor of the batch size.

    The plan then assumes shuffled batches, as memory does not depend on the sampler.
    """
    from mclfast._base.settings import coerce
    from mclfast.config import TrainConfig

    if {"sampler", "images_per_class"} & values.keys():
        return False
    batch = coerce("batch_size", int, values.get("batch_size", TrainConfig.batch_size))
    return bool(batch % TrainConfig.images_per_class)


def _device(name: str, memory: str | None) -> tuple[str, int]:
    """Type of the device, which may be missing on this machine, and bytes of its memory.

    Args:
        name: device as in the settings.
        memory: size given on the command line; None for the free memory of the device.
    """
    import torch

    from mclfast._base.machine import free_memory, select_device
    from mclfast._base.sizes import parse_bytes

    limit = None if memory is None else parse_bytes(memory, "device_memory")
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        if limit is None:
            raise ValueError(
                f"device_memory: expected a size for {name}, as no GPU is here, got none"
            )
        return "cuda", limit
    device = select_device(name)
    return device.type, free_memory(device) if limit is None else limit
