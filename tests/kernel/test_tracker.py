"""The whole tracker, scenario by scenario, against a real af_key and the embedded Linux kernel."""

from __future__ import annotations

import pytest
from scenarios import SCENARIOS, Scenario, run

from pfkey import Kernel


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_scenario(scenario: Scenario, kernel: Kernel) -> None:
    run(scenario, kernel)
