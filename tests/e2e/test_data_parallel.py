"""Two data-parallel engines on a CPU: requests to one of them alone are answered, while the other has nothing to do."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.http import complete, server
from tests.e2e.rig import Oracle, mixed_cases, short

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("server")]

SETTINGS = {"block_length": 8}
DEADLINE_S = 120


@pytest.mark.slow("servers")
def test_requests_to_one_rank_alone_are_answered(tmp_path: Path, trained: Oracle) -> None:
    cases = short(mixed_cases(8, seed=2))
    ranks = ("--data-parallel-size", "2", "--api-server-count", "1")
    with server(tmp_path / "log", SETTINGS, *ranks) as client, ThreadPoolExecutor(len(cases)) as pool:
        for rank in ("1", "0"):

            def ask(case: Any, rank: str = rank) -> Any:
                return complete(client, case, extra_headers={"X-data-parallel-rank": rank}, timeout=DEADLINE_S)

            replies = list(pool.map(ask, cases))
            assert [reply.choices[0].token_ids for reply in replies] == [trained.tokens(c, SETTINGS) for c in cases]
        text = client._client.get(str(client.base_url).replace("/v1/", "/metrics")).text
    counts = dict(
        re.findall(r'^vllm:request_success_total\{engine="(\d)",finished_reason="length",.* (\S+)$', text, re.M)
    )
    assert counts == {"0": f"{len(cases)}.0", "1": f"{len(cases)}.0"}, "some went to the other rank"
