"""Two tensor-parallel ranks give the tokens of one."""

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.constrained import beside_edited, expected
from tests.e2e.logprobs import check_logprobs, run_asking
from tests.e2e.rig import Oracle, engine, mixed_cases, random_graph, run, short, speculation, step_all

pytestmark = [pytest.mark.engine, pytest.mark.slow("ranks"), pytest.mark.xdist_group("both cores")]


def test_two_ranks_equal_reference(oracle: Oracle, wild: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"block_length": 8}
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    cases = short(mixed_cases(8, seed=8))
    with engine(wild, settings, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        assert run(llm, cases) == [oracle.tokens(case, settings) for case in cases]


def test_two_ranks_with_drafts_equal_reference(
    mild_oracle: Oracle, mild: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks propose, accept, edit logits and meet constraints alike, though each has its own copy of the state."""
    settings: dict[str, Any] = {"block_length": 8}
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    cases, graph = short(mixed_cases(8, seed=8)), random_graph(4, 6, 8)
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "max_model_len": 256}
    with engine(mild, settings, speculative_config=speculation(graph, 6), **options) as llm:
        outputs = run_asking(llm, cases)
        mixed = beside_edited(cases, seed=3, asked=[{"choice": ["yes", "no"]}, {"regex": "[a-z]{3,9}"}], max_tokens=24)
        answers = step_all(llm, mixed)
    for i, each in enumerate(mixed):
        assert answers[str(i)] == expected(mild_oracle, each.case, settings, each.asked), each
    check_logprobs(outputs, [mild_oracle.generation(case, settings).log_probs for case in cases])
    drafted = [mild_oracle.speculative(case, settings, graph, 6) for case in cases]
    assert [list(o.outputs[0].token_ids) for o in outputs] == [mild_oracle.tokens(case, settings) for case in cases]
    assert [o.kv_transfer_params["dllm"]["accepted"] for o in outputs] == [e.num_accepted for e in drafted]
    assert any(e.num_accepted for e in drafted)
