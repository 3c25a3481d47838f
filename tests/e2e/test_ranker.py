"""An engine with an order ranker that nobody trained: other drafts, the reference's tokens."""

from pathlib import Path

import pytest

from tests.draft.example_graph import PROVENANCE
from tests.draft.rankers import make_ranker
from tests.e2e.ended import check_forwards
from tests.e2e.rig import Oracle, mixed_cases, random_graph, run_outputs, shared_engine, speculation
from vllm_dllm.draft.ranker_file import RankerFile, save_ranker

pytestmark = [pytest.mark.engine, pytest.mark.slow("configurations")]


def test_any_ranker_leaves_the_tokens(mild: Path, mild_oracle: Oracle, tmp_path: Path) -> None:
    graph, settings = random_graph(12, 12, 8, None), {"block_length": 8}
    save_ranker(RankerFile(make_ranker("small").weights, graph.readiness, PROVENANCE), tmp_path / "ranker.safetensors")
    config = speculation(graph, 5, ranker=str(tmp_path / "ranker.safetensors"))
    llm = shared_engine(mild, settings, speculative_config=config, max_model_len=1024, max_num_batched_tokens=8192)
    cases = mixed_cases(8, seed=8)
    outputs = run_outputs(llm, cases)
    assert [list(output.outputs[0].token_ids) for output in outputs] == [
        mild_oracle.tokens(case, settings) for case in cases
    ]
    took = [output.kv_transfer_params["dllm"] for output in outputs]
    check_forwards(mild_oracle, cases, settings, took)
    assert sum(n["accepted"] for n in took) > 0
    ranked = [n["proposed"] for n in took], [n["accepted"] for n in took]
    unranked = [mild_oracle.speculative(case, settings, graph, 5) for case in cases]
    assert ranked != ([e.num_proposed for e in unranked], [e.num_accepted for e in unranked])
