"""Published CIFAR-100 accuracies, for the settings in which a comparison can run here.

All are from 300 epochs with the recipe of the respective paper, and most from a protocol that
selects on the test set (see ``source``): the column "published protocol" is the one to compare.
"""

from __future__ import annotations

from dataclasses import dataclass

from mclfast.config import TrainConfig

DATA = "cifar100"


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
    "set; MCL-OKD itself with batch 64 and learning rate 0.05, the others 128 and 0.1; where ONE "
    "and OKDDip branch off there is not known"
)
_PCL = "PCL (AAAI 2021, arXiv 2006.04147): three branches that share all but the last stage"

# One network alone; two, independent; four, with stem and first stage in common.
_MCL_TABLE = {
    "resnet32": ((70.91, 0.14), (72.96, 0.28), (74.04, 0.07)),
    "resnet56": ((73.15, 0.23), (74.48, 0.23), (75.74, 0.16)),
    "resnet110": ((75.29, 0.16), (77.12, 0.20), (78.82, 0.14)),
    "wrn_16_2": ((72.55, 0.24), (74.56, 0.11), (75.79, 0.07)),
    "wrn_40_2": ((76.89, 0.29), (77.51, 0.42), (78.84, 0.22)),
}
# The same four with logit distillation of the last.
_MCL_LOGIT = {
    "wrn_16_2": (76.34, 0.22),
    "wrn_40_2": (80.02, 0.45),
    "wrn_28_4": (81.68, 0.31),
}
_ALONE = {n: alone for n, (alone, *_) in _MCL_TABLE.items()} | {"wrn_28_4": (79.17, None)}
_LMCL_TABLE: dict[tuple[str, ...], tuple[float, ...]] = {
    ("resnet32", "resnet32"): (75.82,),
    ("resnet56", "resnet56"): (77.51,),
    ("resnet110", "resnet110"): (79.48,),
    ("wrn_16_2", "wrn_16_2"): (77.31,),
    ("wrn_40_2", "wrn_40_2"): (80.96,),
    ("resnet32", "resnet110"): (75.82, 79.71),
    ("resnet56", "resnet110"): (77.04, 79.56),
    ("wrn_16_2", "wrn_40_2"): (76.88, 80.24),
    ("wrn_40_2", "wrn_28_4"): (80.42, 82.61),
    ("resnet56", "wrn_40_2"): (77.54, 80.72),
    ("resnet110", "wrn_28_4"): (80.02, 82.84),
}
# Top-1 error of a student and of the ensemble, by method; the first is one network alone.
_OKD_TABLE = {
    "resnet32": (28.91, {
        "dml": (24.92, 22.97), "cl-ilr": (25.40, 24.03), "one": (25.74, 24.03),
        "okddip": (25.76, 23.73), "mcl-okd": (24.52, 22.00),
    }),
    "resnet110": (23.62, {
        "dml": (21.51, 19.12), "cl-ilr": (21.16, 18.66), "one": (22.19, 20.23),
        "okddip": (21.05, 19.40), "mcl-okd": (20.39, 18.29),
    }),
}  # fmt: skip
_PCL_TABLE = {"resnet32": (74.14, 0.16), "resnet110": (79.98, 0.55)}


def published(config: TrainConfig) -> Published | None:
    """The published result for a setting; None where data, cohort or topology are others."""
    if config.data != DATA:
        return None
    first, alike = config.cohort[0], len(set(config.cohort)) == 1
    if config.method == "baseline":
        return _baseline(config)
    if config.method == "lmcl":
        found = _LMCL_TABLE.get(config.cohort)
        if found is None or config.topology != "independent":
            return None
        alone = _ALONE[first][0] if alike else None
        return Published(found, None, None, alone, _LMCL)
    if not alike:
        return None
    shared = (config.topology, config.split_stage)
    size = len(config.cohort)
    if config.method == "mcl":
        return _mcl(first, size, shared, config.options.logit_distill)
    if config.method == "pcl":
        if size == 3 and shared == ("shared_stem", 2) and first in _PCL_TABLE:
            mean, spread = _PCL_TABLE[first]
            return Published((mean,), spread, None, None, _PCL)
        return None
    alone, rows = _OKD_TABLE.get(first, (0.0, {}))
    wanted = "tree" if config.method == "cl-ilr" else "shared_stem"
    splits = (1, 2) if config.method in ("one", "okddip") else (1,)
    fits = size == 4 and shared[0] == wanted and shared[1] in splits
    if config.method in rows and fits:
        student, ensemble = (round(100 - error, 2) for error in rows[config.method])
        return Published((student,), None, ensemble, round(100 - alone, 2), _OKD)
    return None


def _baseline(config: TrainConfig) -> Published | None:
    if config.topology != "independent" or any(n not in _ALONE for n in config.cohort):
        return None
    alike = len(set(config.cohort)) == 1
    peers = tuple(_ALONE[n][0] for n in (config.cohort[:1] if alike else config.cohort))
    return Published(peers, _ALONE[config.cohort[0]][1] if alike else None, None, None, _MCL)


def _mcl(first: str, size: int, shared: tuple[str, int], distill: str) -> Published | None:
    found: tuple[float, float] | None = None
    if size == 2 and shared[0] == "independent" and distill == "none":
        found = _MCL_TABLE[first][1] if first in _MCL_TABLE else None
    elif size == 4 and shared == ("shared_stem", 1):
        if distill == "none" and first in _MCL_TABLE:
            found = _MCL_TABLE[first][2]
        elif distill == "last":
            found = _MCL_LOGIT.get(first)
    if found is None:
        return None
    return Published(found[:1], found[1], None, _ALONE[first][0], _MCL)
