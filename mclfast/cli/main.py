"""Runs ``mclfast train | plan | compare | eval | export | transfer | replay | bench | env``."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from mclfast._base.terminal import printable_streams
from mclfast._version import __version__
from mclfast.cli import bench, compare, env, eval, export, plan, replay, train, transfer
from mclfast.cli.settings import OneLineParser
from mclfast.ops.backends import BackendUnavailableError

_COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "plan": plan,
    "compare": compare,
    "eval": eval,
    "export": export,
    "transfer": transfer,
    "replay": replay,
    "bench": bench,
    "env": env,
}

# The options of these commands depend on the method; they parse the rest of the line themselves.
_WITH_SETTINGS = ("train", "plan", "compare")

# Errors of a wrong setting, a missing file or a missing package, shown in one line. Any other error
# is a defect of this package and keeps its traceback.
_USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, BackendUnavailableError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: command and options; None for those of the process.

    Returns:
        The exit status.
    """
    try:
        try:
            with printable_streams():
                return _run(sys.argv[1:] if arguments is None else arguments)
        finally:
            # Flushed here, as an error while Python exits cannot be caught.
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output wanted no more of it, as ``head`` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(arguments: Sequence[str]) -> int:
    parser = OneLineParser(prog="mclfast", description=sys.modules["mclfast"].__doc__)
    parser.add_argument("--version", action="version", version=f"mclfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        text = module.HELP
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            allow_abbrev=False,
            add_help=name not in _WITH_SETTINGS,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=command)
    known, rest = parser.parse_known_args([_with_dashes(a) for a in arguments])
    known.command_line = shlex.join(["mclfast", *arguments])
    if rest and known.command not in _WITH_SETTINGS:
        known.parser.error(f"{rest[0]}: unknown argument")
    try:
        with _one_line_warnings(known.command):
            status: int = known.run(known, rest)
        return status
    except KeyboardInterrupt as error:
        print(f"\nmclfast {known.command}: interrupted", file=sys.stderr)
        return getattr(error, "status", 130)
    except BrokenPipeError:
        raise
    except _USER_ERRORS as error:
        if os.environ.get("MCLFAST_TRACEBACK") == "1":
            raise
        text = " ".join(str(error).split())
        print(f"mclfast {known.command}: error: {text}", file=sys.stderr)
        return 2


@contextmanager
def _one_line_warnings(command: str) -> Iterator[None]:
    """Prints what a command warns of as it prints errors; other warnings keep Python's form."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, RuntimeWarning):
                text = " ".join(str(message).split())
                print(f"mclfast {command}: warning: {text}", file=sys.stderr)
            else:
                usual(message, category, *rest, **more)

        warnings.showwarning = show
        yield


def _with_dashes(argument: str) -> str:
    """Turns --data_root into --data-root, as recipes and Python spell settings with underscores."""
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else argument
