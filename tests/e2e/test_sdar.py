"""SDAR in the engine == its reference decoder, token for token, in fp32."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.rig import engine, run_outputs
from tests.e2e.sdar import SdarOracle, sdar_cases

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", params=[4, 8, 16, 32])
def served(request: pytest.FixtureRequest, wild_sdar: Path) -> Iterator[Any]:
    settings = {"block_length": request.param}
    with engine(wild_sdar, settings) as llm:
        yield llm, settings, SdarOracle(wild_sdar)


def test_mixed_batch_equals_reference(served: Any) -> None:
    llm, settings, oracle = served
    cases = sdar_cases(settings["block_length"], seed=1)
    outputs = run_outputs(llm, cases)
    assert [list(o.outputs[0].token_ids) for o in outputs] == [oracle.tokens(case, settings) for case in cases]
    expected = [oracle.generation(case, settings) for case in cases]
    took = [o.kv_transfer_params["dllm"] for o in outputs]
    assert [(n["nfe"], n["nfe_refresh"]) for n in took] == [(e.nfe, 0) for e in expected]
