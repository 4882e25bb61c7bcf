"""What a finished run reached."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunResult:
    """What a finished run reached.

    Attributes:
        peers: final test accuracy in percent of each peer's own classifier, at the last epoch.
        ensemble: of the mean of the peers' logits, at the last epoch.
        published_protocol: best accuracy of any classifier of any peer at any evaluated epoch on
            the test set, as the published code reports it. It selects on the test set: for
            comparison only.
        seconds: training and evaluation time, over all resumed parts.
        history: one record per epoch.
    """

    peers: tuple[float, ...]
    ensemble: float
    published_protocol: float
    seconds: float
    history: list[dict[str, float]]


def result_of(history: list[dict[str, float]], peers: int) -> RunResult:
    """The result of a run of that many peers, from its records."""
    row = history[-1]
    return RunResult(
        peers=tuple(row[f"acc_peer{i}"] for i in range(peers)),
        ensemble=row["acc_ensemble"],
        published_protocol=row["acc_best_head_so_far"],
        seconds=row["seconds"],
        history=history,
    )
