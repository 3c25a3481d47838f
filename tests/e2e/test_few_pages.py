"""More requests than the cache has room for. An engine of its own: two in one process share vLLM's global state."""

from pathlib import Path

import pytest

from tests.e2e.rig import Oracle, engine, mixed_cases, run

pytestmark = pytest.mark.engine

SETTINGS = {"block_length": 8}


def test_more_requests_than_pages(oracle: Oracle, wild: Path) -> None:
    """Requests wait for the pages of their whole generation; whoever runs is never short of one."""
    cases = mixed_cases(8, seed=7)
    num_pages = 12
    assert sum(-(-(len(case.prompt) + case.max_tokens) // 16) for case in cases) > 2 * num_pages
    with engine(wild, SETTINGS, num_gpu_blocks_override=num_pages) as llm:
        assert run(llm, cases) == [oracle.tokens(case, SETTINGS) for case in cases]
