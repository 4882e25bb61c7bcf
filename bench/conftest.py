"""The option --preset of the benchmarks under pytest-benchmark, and a test for each case."""

from __future__ import annotations

import pytest

from mclfast.bench.cases import PRESETS, PROVIDERS, preset


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--preset", default="small", choices=PRESETS, help="which shapes are measured")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "provider"} <= set(metafunc.fixturenames):
        points = [
            pytest.param(case, provider, id=f"{case.name}-{provider.name}")
            for case in preset(metafunc.config.getoption("--preset"))
            for provider in PROVIDERS[case.op]
        ]
        metafunc.parametrize(("case", "provider"), points)
