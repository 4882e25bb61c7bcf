"""How the package hangs together: lines, imports between files and folders, the way of a batch.

    python scripts/house.py [CHECKOUT]

CHECKOUT is a folder with mclfast/ in it, this one by default; the way of a batch is followed in the
mclfast that Python imports. Imports inside functions and under TYPE_CHECKING count.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

#: Folders of a checkout and the names that they are packaged under.
FOLDERS = {"mclfast": "mclfast", "bench": "mclfast.bench"}

Graph = dict[str, set[str]]


def files_of(root: Path) -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            if name not in FOLDERS.values() or path.name == "__init__.py":
                found[name] = path
    return found


def imported(tree: ast.AST, files: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a syntax tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield from ({inner, node.module} & files.keys() if inner not in files else {inner})


def graph_of(files: dict[str, Path]) -> Graph:
    """The imports of each module; the package's own list of names is left out."""
    graph = {
        name: set(imported(ast.parse(path.read_text(encoding="utf-8")), files)) - {name}
        for name, path in files.items()
    }
    graph.pop("mclfast")
    return {name: found - {"mclfast"} for name, found in graph.items()}


def circles_of(graph: Graph) -> list[list[str]]:
    """Groups of modules that reach one another, largest first."""
    reach = {name: reached(graph, name) for name in graph}
    groups = {frozenset(b for b in reach[a] if a in reach[b]) for a in graph if a in reach[a]}
    return sorted((sorted(group) for group in groups), key=len, reverse=True)


def reached(graph: Graph, start: str) -> set[str]:
    """All modules that a module reaches along imports."""
    found: set[str] = set()
    todo = [start]
    while todo:
        for name in graph[todo.pop()] - found:
            found.add(name)
            todo.append(name)
    return found


def longest_chain(graph: Graph) -> list[str]:
    """The longest chain of imports; circles count as one link."""
    group = {name: circle[0] for circle in circles_of(graph) for name in circle}
    head: Graph = {group.get(name, name): set() for name in graph}
    for name, found in graph.items():
        own = group.get(name, name)
        head[own] |= {group.get(other, other) for other in found} - {own}
    best: dict[str, list[str]] = {}

    def chain(name: str) -> list[str]:
        if name not in best:
            best[name] = [name, *max(map(chain, sorted(head[name])), key=len, default=[])]
        return best[name]

    return max(map(chain, sorted(head)), key=len)


def rooms_of(graph: Graph) -> Graph:
    """The same between folders; a module beside them counts as a room of its own."""
    rooms: Graph = {}
    for name, found in graph.items():
        own = rooms.setdefault(room(name), set())
        own |= {room(other) for other in found} - {room(name)}
    return rooms


def room(name: str) -> str:
    return ".".join(name.split(".")[:2])


def walk_of(call: Callable[[], object]) -> tuple[int, int]:
    """Files of the package that a call passes through, and calls of functions in them."""
    package = os.path.dirname(os.path.abspath(sys.modules["mclfast"].__file__ or ""))
    files: set[str] = set()
    calls = 0

    def seen(frame: object, event: str, _: object) -> None:
        nonlocal calls
        name = frame.f_code.co_filename  # type: ignore[attr-defined]
        if event == "call" and name.startswith(package):
            files.add(name)
            calls += 1

    sys.setprofile(seen)
    try:
        call()
    finally:
        sys.setprofile(None)
    return len(files), calls


def batch_walk() -> list[str]:
    """The way of a batch: building a run of two ResNet-8 by L-MCL on digits, and one step of it."""
    import torch

    from mclfast import Batch
    from mclfast.config import TrainConfig
    from mclfast.train import build

    config = TrainConfig.from_values({"method": "lmcl", "device": "cpu"})
    made: list[object] = []
    built = walk_of(lambda: made.append(build(config)))
    trainer = made[0]
    rows = trainer.sampler.epoch(0)[:1]  # type: ignore[attr-defined]
    images, labels, index = next(iter(trainer.feed.batches(rows, first_step=0)))  # type: ignore[attr-defined]
    batch = Batch(labels, index, 0, 0)
    torch.manual_seed(0)
    step = trainer.train_step  # type: ignore[attr-defined]
    step(images, batch)
    taken = walk_of(lambda: step(images, batch))
    return [
        f"a run is built in {built[0]} files with {built[1]} calls",
        f"a training step passes {taken[0]} files with {taken[1]} calls",
    ]


def main() -> None:
    """Prints all figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("checkout", type=Path, nargs="?", default=here, help="folder of a checkout")
    root = parser.parse_args().checkout
    if not (root / "mclfast").is_dir():
        parser.error(f"checkout: expected a folder with mclfast/ in it, got {root}")
    files = files_of(root)
    for prefix, title in (("mclfast", "mclfast/"), ("mclfast.bench", "bench/")):
        bench = prefix == "mclfast.bench"
        own = [p for n, p in files.items() if n.startswith("mclfast.bench") == bench]
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in own)
        loose = f", {len(list((root / 'mclfast').glob('*.py')))} loose" if not bench else ""
        print(f"{title}: {len(own)} files{loose}, {lines} lines")
    graph = graph_of(files)
    rooms = rooms_of(graph)
    print(f"rooms: {len(rooms)}, arrows between them: {sum(map(len, rooms.values()))}")
    sizes = [len(circle) for circle in circles_of(graph)]
    print(f"circles of files: {', '.join(map(str, sizes)) or 'none'}")
    sizes = [len(circle) for circle in circles_of(rooms)]
    print(f"circles of rooms: {', '.join(map(str, sizes)) or 'none'}")
    chain = longest_chain(graph)
    print(f"longest chain of imports: {len(chain)} files\n  " + "\n  ".join(chain))
    print("\n".join(batch_walk()))


if __name__ == "__main__":
    main()
