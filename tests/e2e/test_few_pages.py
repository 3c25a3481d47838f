"""More requests than the cache, or a step, has room for. Engines of their own: two in a process share vLLM's state."""

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.growing import growing, preemptions
from tests.e2e.rig import Case, Oracle, engine, mixed_cases, model_state, run

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines")]

SETTINGS = {"block_length": 8}


def test_more_requests_than_pages(oracle: Oracle, wild: Path) -> None:
    """Requests wait for the pages of their whole generation; whoever runs is never short of one."""
    cases = mixed_cases(8, seed=7)
    num_pages = 12
    assert sum(-(-(len(case.prompt) + case.max_tokens) // 16) for case in cases) > 2 * num_pages
    with engine(wild, SETTINGS, num_gpu_blocks_override=num_pages) as llm:
        assert run(llm, cases) == [oracle.tokens(case, SETTINGS) for case in cases]
        grown = growing(cases)
        with preemptions(llm) as preempted:
            assert run(llm, grown) == [oracle.tokens(case, SETTINGS) for case in grown]
        assert preempted, "whoever grows is short of pages now and then, and takes them from the youngest"


def test_refreshes_of_64_requests_at_once_stay_in_the_budget(oracle: Oracle, wild: Path) -> None:
    """All begin a block together; the oldest go first, and no forward has a row that the scheduler did not count."""
    cases = [Case(prompt=tuple(range(4 + i, 44 + i)), max_tokens=16, steps=4, seed=i) for i in range(64)]
    with engine(wild, SETTINGS, max_num_seqs=64, max_num_batched_tokens=640) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        state, steps = model_state(llm), []
        budget = scheduler.max_num_scheduled_tokens
        assert budget < 64 * 56, "all refreshes fit"
        prepare = state.prepare_inputs

        def count(batch: Any, *arguments: Any) -> Any:
            steps.append((len(prepare(batch, *arguments)["input_ids"]), batch.num_tokens, batch.num_reqs))
            return prepare(batch, *arguments)

        state.prepare_inputs = count
        assert run(llm, cases) == [oracle.tokens(case, SETTINGS) for case in cases]
        assert all(rows == counted <= budget for rows, counted, _ in steps)
        assert sum(rows for rows, *_ in steps) == 64 * (2 * 56 + 2 * 8), "two blocks of two steps each"
        assert max(num_reqs for *_, num_reqs in steps) < 64
