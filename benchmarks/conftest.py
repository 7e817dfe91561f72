"""Options of the benchmark run, and its verdict at the end."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--enforce-budgets", action="store_true", help="a figure over its budget fails the run")
