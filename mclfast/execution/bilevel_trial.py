"""Whether networks can take bilevel steps, found out before a run starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from mclfast._base.modules import modes_kept
from mclfast._base.random import rng_restored
from mclfast.bilevel.twice import MissingDerivative, check_twice
from mclfast.cohort.cohort import Cohort
from mclfast.cohort.functions import networks_for
from mclfast.config import TrainConfig
from mclfast.execution import layout


def check_networks(
    cohort: Cohort, images: Tensor, config: TrainConfig, one_at_a_time: bool
) -> None:
    """Raises where an operation of the networks in training cannot be differentiated twice.

    Args:
        cohort: peers to try; they stay as they are.
        images: a few images [B, C, H, W].
        config: settings of the run.
        one_at_a_time: whether bilevel steps run one peer at a time.

    Raises:
        ValueError: the text names the operation and the setting.
    """
    with (
        modes_kept(cohort),
        rng_restored(),
        layout.plain_calls(cohort),
        refused_by_setting(config, cohort),
    ):
        cohort.train()
        network, _ = networks_for(cohort, images, one_at_a_time=one_at_a_time)
        params = dict(cohort.named_parameters())
        for part in network if isinstance(network, list) else [network]:
            check_twice(part, params)


@contextmanager
def refused_by_setting(config: TrainConfig, cohort: Cohort | None = None) -> Iterator[None]:
    """Errors on a missing second derivative name the setting that asks for it.

    Args:
        config: settings of the run.
        cohort: peers whose modules are named where one has the name of the operation.
    """
    try:
        yield
    except MissingDerivative as error:
        modules = cohort.named_modules() if cohort is not None else ()
        kind = error.operation.replace("_", "").lower()
        where = [name for name, module in modules if type(module).__name__.lower() == kind]
        place = f" in {where[0]}" if where else ""
        raise ValueError(
            "bilevel_every: expected 0 for networks and objectives that cannot be differentiated "
            f"twice, got {config.bilevel_every} with {error.operation}{place}"
        ) from error
