"""Two tensor-parallel ranks give the tokens of one."""

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.rig import Oracle, engine, mixed_cases, run

pytestmark = pytest.mark.engine


def test_two_ranks_equal_reference(oracle: Oracle, wild: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"block_length": 8}
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    cases = mixed_cases(8, seed=8)
    with engine(wild, settings, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        assert run(llm, cases) == [oracle.tokens(case, settings) for case in cases]
