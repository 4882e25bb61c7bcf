"""Two installs of mclfast against each other, call by call: is one slower than the other?

    python scripts/compare_checkouts.py OLD_PYTHON NEW_PYTHON --out FOLDER

Each Python runs the losses of its own mclfast in a process of its own. The processes take turns,
a few calls each, in an order that changes; the figure of a case is the median of new / old over the
turns. Threads sleep while the other process has its turn: spinning ones would slow it down.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

import mclfast

#: Shapes (networks, stages, batch) of the layer-wise loss; width 128.
SHAPES = ((2, 3, 128), (4, 3, 128), (4, 4, 512))
WEIGHTS = (0.1, 1.0, 0.1, 1.0)
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


def unit_rows(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator)
    return torch.nn.functional.normalize(x, dim=-1).requires_grad_()


def cases() -> dict[str, Callable[[], object]]:
    """Forward and backward of each case by name, in the calls of this mclfast."""
    found: dict[str, Callable[[], object]] = {}
    for m, stages, batch in SHAPES:
        e, labels = unit_rows(m, stages, batch, 128), torch.arange(batch) // 2
        pairs = torch.rand(m * stages, m * stages, batch)
        name = f"layerwise {m},{stages},{batch}"
        found[f"{name} fused"] = lambda a=(e, labels, pairs): torch.autograd.grad(fused(*a), a[0])
        found[f"{name} rows"] = lambda a=(e, labels, pairs): torch.autograd.grad(rows(*a), a[0])
    x, labels = unit_rows(512, 128), torch.arange(512) // 2
    found["supcon 512"] = lambda: torch.autograd.grad(mclfast.supcon_loss(x, labels), x)
    return found


def fused(e: Tensor, labels: Tensor, pairs: Tensor) -> Tensor:
    if hasattr(mclfast, "layerwise_mcl_objective"):
        return mclfast.layerwise_mcl_objective(e, labels, pairs, weights=WEIGHTS).loss
    # The name of before the package was laid out by subject.
    old: Callable[..., object] = mclfast.layerwise_mcl_loss
    return old(e, labels, pairs, coefficients=WEIGHTS).loss  # type: ignore[attr-defined]


def rows(e: Tensor, labels: Tensor, pairs: Tensor) -> Tensor:
    call = getattr(mclfast, "layerwise_mcl_terms", mclfast.layerwise_mcl_loss)
    loss: Tensor = call(e, labels, pairs).weighted_sum(*WEIGHTS)
    return loss


def serve() -> None:
    """Answers each line, a case and a number of calls, with milliseconds per call."""
    torch.set_num_threads(2)
    calls = cases()
    for call in calls.values():
        call()
    print(json.dumps(list(calls)), flush=True)
    for line in sys.stdin:
        name, count = json.loads(line)
        start = time.perf_counter()
        for _ in range(count):
            calls[name]()
        print(1e3 * (time.perf_counter() - start) / count, flush=True)


class Server:
    """The process of one Python."""

    def __init__(self, python: str) -> None:
        self._process = subprocess.Popen(
            [python, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **QUIET},
        )
        self.names: list[str] = json.loads(self._read())

    def time(self, name: str, count: int) -> float:
        """Milliseconds per call, over some calls."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, count]) + "\n")
        self._process.stdin.flush()
        return float(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("checkouts: a process that measures has ended")
        return line


def main() -> None:
    """Measures in turn, prints the ratios and writes them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old", help="the Python of the old install")
    parser.add_argument("new", help="the Python of the new install")
    parser.add_argument("--turns", type=int, default=40, help="turns of each case (default: 40)")
    parser.add_argument("--out", type=Path, help="folder for checkouts.json")
    options = parser.parse_args()
    servers = {"old": Server(options.old), "new": Server(options.new)}
    found = []
    for name in servers["new"].names:
        servers["old"].time(name, 1)
        count = max(1, round(60 / servers["new"].time(name, 1)))
        ratios, times = [], []
        for turn in range(options.turns):
            order = ("old", "new") if turn % 2 else ("new", "old")
            took = {which: servers[which].time(name, count) for which in order}
            ratios.append(took["new"] / took["old"])
            times.append(took["old"])
        low, middle, high = quantiles(ratios, n=4)
        found.append(
            {
                "case": name,
                "new_over_old": middle,
                "quartiles": [low, high],
                "old_ms": median(times),
            }
        )
        print(f"{name:28} new / old {middle:.3f}  ({low:.2f} to {high:.2f})", flush=True)
    if options.out is not None:
        from mclfast._base.files import write_json
        from mclfast.bench.report import environment

        write_json(options.out / "checkouts.json", {"environment": environment(), "cases": found})


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
