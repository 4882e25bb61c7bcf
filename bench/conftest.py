"""Options and parameters of the measurements under pytest-benchmark."""

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
