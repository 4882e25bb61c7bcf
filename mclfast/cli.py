"""The command line: ``mclfast train | eval | export | env``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mclfast._version import __version__

# What a wrong setting, a missing file or a missing package raises. Anything else is a defect of
# ours and keeps its traceback.
_USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = _Parser(prog="mclfast", description=sys.modules["mclfast"].__doc__)
    parser.add_argument("--version", action="version", version=f"mclfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text, add, run in (
        ("train", "train a cohort, or a lone network", _add_train, _train),
        ("eval", "accuracy of an exported backbone, or of all those of a run", _add_eval, _eval),
        ("export", "write the bare backbone of a peer of a run", _add_export, _export),
        ("env", "versions and backends, for a bug report", _add_env, _env),
    ):
        command = commands.add_parser(
            name, help=text, description=text, allow_abbrev=False, add_help=name != "train"
        )
        add(command)
        command.set_defaults(run=run, parser=command)
    # Which options `train` has depends on the method, so it reads the rest itself.
    known, rest = parser.parse_known_args(arguments)
    if rest and known.command != "train":
        known.parser.error(f"{rest[0]}: unknown argument")
    try:
        status: int = known.run(known, rest)
        return status
    except KeyboardInterrupt:
        print(f"\nmclfast {known.command}: interrupted", file=sys.stderr)
        return 130
    except _USER_ERRORS as error:
        if os.environ.get("MCLFAST_TRACEBACK") == "1":
            raise
        text = " ".join(str(error).split())
        print(f"mclfast {known.command}: error: {text}", file=sys.stderr)
        return 2


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-h", "--help", action="store_true", help="show all settings and exit")
    parser.add_argument("--recipe", help="name of a recipe, or a YAML file with settings")
    parser.add_argument("--run-dir", type=Path, help="folder of the run (default: under runs/)")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with an interrupted run")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a run that is already in the folder"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def _train(known: argparse.Namespace, rest: list[str]) -> int:
    from mclfast import recipe
    from mclfast.config import TrainConfig
    from mclfast.train import CONFIG

    values: dict[str, Any] = {}
    if known.recipe:
        values |= recipe.load(known.recipe)
    if known.resume:
        if not (known.resume / CONFIG).is_file():
            raise FileNotFoundError(f"resume: expected a run with {CONFIG} in {known.resume}")
        values |= recipe.load(str(known.resume / CONFIG))
    values |= _settings(known, rest, values)
    config = TrainConfig.from_values(values)
    run_dir = known.resume or known.run_dir or default_run_dir(config)
    if not known.resume and not known.overwrite:
        _refuse_old_run(run_dir)
    return _train_and_report(
        config, run_dir, replace=not known.resume, progress=not known.no_progress
    )


def _settings(known: argparse.Namespace, rest: list[str], values: dict[str, Any]) -> dict[str, Any]:
    """The settings given on the command line; which exist depends on the method among them."""
    from mclfast._checks import unknown_name
    from mclfast.config import TrainConfig, field_help, field_types
    from mclfast.methods import method_class

    first = _Parser(prog="mclfast train", add_help=False, allow_abbrev=False)
    first.add_argument("--method", default=values.get("method", TrainConfig.method))
    method = first.parse_known_args(rest)[0].method
    options = method_class(method).Options

    parser = _Parser(
        prog="mclfast train", add_help=False, parents=[known.parser], conflict_handler="resolve",
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description=known.parser.description, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    for title, cls, defaults in (
        ("settings", TrainConfig, TrainConfig),
        (f"settings of the method {method}", options, options()),
    ):
        group = parser.add_argument_group(title)
        for name in field_types(cls):
            group.add_argument(
                f"--{name.replace('_', '-')}", dest=name, metavar="X",
                help=f"{field_help(cls)[name]} (default: {_shown(getattr(defaults, name))})",
            )  # fmt: skip
    if known.help:
        parser.print_help()
        parser.exit(0)
    given, unknown = parser.parse_known_args(rest)
    if unknown:
        names = [*field_types(TrainConfig), *field_types(options)]
        flag = unknown[0].split("=")[0]
        raise unknown_name("setting", flag.removeprefix("--").replace("-", "_"), names)
    fields = {*field_types(TrainConfig), *field_types(options)}
    return {k: v for k, v in vars(given).items() if k in fields}


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()


def default_run_dir(config: Any) -> Path:
    """``runs/<data>-<method>-<cohort>-seed<n>``."""
    cohort = "+".join(config.cohort)
    return Path("runs") / f"{config.data}-{config.method}-{cohort}-seed{config.seed}"


def _refuse_old_run(run_dir: Path) -> None:
    from mclfast.train import CONFIG, RESULT

    if (run_dir / CONFIG).exists():
        finished = (run_dir / RESULT).exists()
        remedy = "" if finished else f"--resume {run_dir}, "
        raise ValueError(
            f"run_dir: expected a new folder, got {run_dir} with "
            f"{'a finished' if finished else 'an unfinished'} run; use {remedy}--overwrite or "
            "another --run-dir"
        )


def _remove_old_run(run_dir: Path) -> None:
    """Removes what a run writes, so that a new one does not mix with it."""
    from mclfast.export import DESCRIPTION, WEIGHTS
    from mclfast.train import CHECKPOINT, CONFIG, CURVES, METRICS, RESULT

    for name in (CHECKPOINT, RESULT, CURVES, METRICS, CONFIG):
        (run_dir / name).unlink(missing_ok=True)
    for name in (DESCRIPTION, WEIGHTS):
        for path in run_dir.glob(f"peer*/{name}"):
            path.unlink()


def _train_and_report(config: Any, run_dir: Path, *, replace: bool, progress: bool) -> int:
    from mclfast.models import parameter_count
    from mclfast.train import CHECKPOINT, CURVES, METRICS, build

    trainer = build(config, run_dir)
    if replace:
        # Only now: settings that cannot work cost no old run.
        _remove_old_run(run_dir)
    d = trainer.data
    print(
        f"{d.name}: {len(d.train)} training and {len(d.test)} test images, {d.num_classes} "
        f"classes, {d.in_channels} x {d.image_size} x {d.image_size}; device {trainer.device}"
    )
    try:
        result = trainer.fit(progress=progress)
    except KeyboardInterrupt:
        print(f"\ninterrupted; go on with: mclfast train --resume {run_dir}", file=sys.stderr)
        return 130
    print("peer  network     parameters  test accuracy (own classifier, last epoch)")
    for i, (name, peer) in enumerate(zip(config.cohort, trainer.cohort.peers, strict=True)):
        count = parameter_count(peer.backbone)
        print(f"{i:<5} {name:<11} {count:>10,}  {result.peers[i]:.2f} %")
    if len(result.peers) > 1:
        print(f"mean of peers {sum(result.peers) / len(result.peers):.2f} %, ", end="")
        print(f"ensemble {result.ensemble:.2f} %")
    print(
        f"published protocol (best of all heads and epochs on the test set): "
        f"{result.published_protocol:.2f} %"
    )
    print(f"curves      {run_dir / CURVES}")
    print(f"metrics     {run_dir / METRICS}")
    print(f"checkpoint  {run_dir / CHECKPOINT}")
    print("backbones   " + ", ".join(str(run_dir / f"peer{i}") for i in range(len(result.peers))))
    return 0


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="folder of an exported backbone, or of a run")
    parser.add_argument("--data-root", help="folder with the data set, where it has moved")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def _eval(known: argparse.Namespace, _: list[str]) -> int:
    from mclfast.data import load as load_data
    from mclfast.evaluate import accuracy
    from mclfast.export import DESCRIPTION, load_backbone
    from mclfast.train import select_device

    device = select_device(known.device)
    folders = [known.path]
    if not (known.path / DESCRIPTION).exists():
        folders = sorted(p.parent for p in known.path.glob(f"peer*/{DESCRIPTION}"))
    if not folders:
        raise FileNotFoundError(
            f"path: expected {DESCRIPTION} in {known.path} or in its peer folders, found none"
        )
    for folder in folders:
        exported = load_backbone(folder)
        about = exported.description
        needed = {"data", "data_root", "train_per_class", "image_size", "eval_batch_size"}
        if missing := (needed | {"accuracy"}) - about.keys():
            raise ValueError(
                f"path: expected {', '.join(sorted(missing))} in {folder / DESCRIPTION}, got none"
            )
        data = load_data(
            about["data"],
            root=known.data_root or about["data_root"],
            train_per_class=about["train_per_class"],
            image_size=about["image_size"] if about["data"] == "folder" else None,
        )
        found = accuracy(
            exported.network.to(device), data, batch_size=about["eval_batch_size"]
        )
        recorded = about["accuracy"]
        shown = "nothing" if recorded is None else f"{recorded:.4f} %"
        print(
            f"{folder}: {about['network']} on {about['data']}: {found:.4f} % of "
            f"{len(data.test)} test images (recorded in training: {shown})"
        )
    return 0


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, help="folder of a run, finished or not")
    parser.add_argument("--peer", type=int, default=0, help="which peer (default: 0)")
    parser.add_argument("--out", type=Path, help="folder to write (default: RUN_DIR/peerN)")


def _export(known: argparse.Namespace, _: list[str]) -> int:
    from mclfast import checkpoint, recipe
    from mclfast.config import TrainConfig
    from mclfast.train import CHECKPOINT, CONFIG, build

    if not (known.run_dir / CONFIG).is_file():
        raise FileNotFoundError(f"run_dir: expected a run with {CONFIG} in {known.run_dir}")
    config = TrainConfig.from_values(
        recipe.load(str(known.run_dir / CONFIG)) | {"device": "cpu"}
    )
    if not 0 <= known.peer < len(config.cohort):
        raise ValueError(f"peer: expected 0 to {len(config.cohort) - 1}, got {known.peer}")
    trainer = build(config)
    trainer.load_state(checkpoint.load(known.run_dir / CHECKPOINT))
    folder = trainer.export(known.peer, known.out or known.run_dir / f"peer{known.peer}")
    print(f"{config.cohort[known.peer]} written to {folder}")
    return 0


def _add_env(_: argparse.ArgumentParser) -> None:
    """No options."""


def _env(_: argparse.Namespace, __: list[str]) -> int:
    from mclfast import env

    print(env.report())
    return 0
