"""What an engine that may draft does more in a step without drafts, by counting: times differ from engine to engine."""

import pytest

from benchmarks.armed import count
from tests.e2e.engines import stop_shared_engine
from tests.e2e.rig import CHECKPOINT

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines")]

MOST_CALLS = 70
"""Python calls that being armed may cost a step of one request, in the median, of some 2,000."""


def test_a_step_without_drafts_costs_hardly_more_than_unarmed() -> None:
    stop_shared_engine()
    off = count(str(CHECKPOINT), 32, 1, None)
    armed = count(str(CHECKPOINT), 32, 1, {"method": "spiffy", "budget": "auto"})
    assert armed["torch ops"] <= off["torch ops"], (off, armed)
    assert off["Python calls"] < armed["Python calls"] <= off["Python calls"] + MOST_CALLS, (off, armed)
