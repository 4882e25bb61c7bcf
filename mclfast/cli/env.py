"""``mclfast env``: versions and backends, and why any of them is missing."""

from __future__ import annotations

import argparse

HELP = "versions and backends, for a bug report"


def add_arguments(_: argparse.ArgumentParser) -> None:
    """No options."""


def run(_: argparse.Namespace, __: list[str]) -> int:
    from mclfast import env

    print(env.report())
    return 0
