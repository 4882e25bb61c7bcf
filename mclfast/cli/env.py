"""``mclfast env``: versions and backends, and the reason if one of them is missing."""

from __future__ import annotations

import argparse

HELP = "versions and backends, for a bug report"


def add_arguments(_: argparse.ArgumentParser) -> None:
    """Adds nothing: ``mclfast env`` has no options."""


def run(_: argparse.Namespace, __: list[str]) -> int:
    """Runs the command; returns 0."""
    from mclfast import env

    print(env.report())
    return 0
