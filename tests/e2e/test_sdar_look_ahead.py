"""Drafts across the end of SDAR's blocks change forwards and no token: engine with == without == reference, in fp32."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.rig import engine, random_graph, run_outputs, speculation
from tests.e2e.sdar import SdarOracle, make_wild_sdar, sdar_cases

pytestmark = pytest.mark.engine

CONFIGS = [(4, 6, 6, 1), (4, 12, 12, None), (8, 12, 5, None), (8, 12, 10, 1)]


@pytest.fixture(scope="module")
def mild_sdar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a random SDAR model that can be foreseen a little."""
    path = tmp_path_factory.mktemp("mild_sdar") / "checkpoint"
    make_wild_sdar(path, mixing=0.05)
    return path


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def served(request: pytest.FixtureRequest, mild_sdar: Path) -> Iterator[Any]:
    block_length, num_nodes, budget, tokens_per_step = request.param
    graph = random_graph(num_nodes, num_nodes, block_length, tokens_per_step)
    settings = {"block_length": block_length}
    with engine(mild_sdar, settings, speculative_config=speculation(graph, budget), max_model_len=1024) as llm:
        yield llm, settings, graph, budget, SdarOracle(mild_sdar, 1024)


def test_mixed_batch_equals_reference(served: Any) -> None:
    llm, settings, graph, budget, oracle = served
    cases = sdar_cases(settings["block_length"], seed=settings["block_length"])
    outputs = run_outputs(llm, cases)
    assert [list(o.outputs[0].token_ids) for o in outputs] == [oracle.tokens(case, settings) for case in cases]
    expected = [oracle.speculative(case, settings, graph, budget) for case in cases]
    took = [o.kv_transfer_params["dllm"] for o in outputs]
    assert [(n["nfe"], n["nfe_refresh"], n["accepted"], n["proposed"]) for n in took] == [
        (e.nfe, e.nfe_refresh, e.num_accepted, e.num_proposed) for e in expected
    ]
