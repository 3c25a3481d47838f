"""Steps of a block-causal model as a captured CUDA graph would replay them, see `test_graphs`: commits store in it."""

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.rig import engine, random_graph, run, speculation
from tests.e2e.sdar import SdarOracle, sdar_cases
from tests.e2e.test_graphs import BLOCK_LENGTH, SETTINGS, EagerGraphs

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines")]


@pytest.mark.parametrize("budget", [pytest.param(None, marks=pytest.mark.slow("configurations")), 4])
def test_replayed_steps_equal_reference(mild_sdar: Path, budget: int | None) -> None:
    oracle, cases = SdarOracle(mild_sdar, 256), sdar_cases(BLOCK_LENGTH, seed=11)
    options: dict[str, Any] = {"max_model_len": 256}
    if budget is not None:
        options["speculative_config"] = speculation(random_graph(2, 6, BLOCK_LENGTH), budget)
    with engine(mild_sdar, SETTINGS, **options) as llm:
        graphs = EagerGraphs(llm, [1, 3, 7, 12, 24, 48, 80], is_mixed=True)
        assert run(llm, cases) == [oracle.tokens(case, SETTINGS) for case in cases]
        assert graphs.num_replays > 16
