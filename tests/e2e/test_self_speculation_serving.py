"""Self-speculation over HTTP by two tensor-parallel ranks, each with its part of the adapter."""

import itertools
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.e2e.http import complete, server, wait_until
from tests.e2e.windows import MODE, Plain, WindowOracle, make_checkpoint, mixed

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("server"), pytest.mark.slow("servers")]

Served = tuple[openai.OpenAI, WindowOracle]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A client of a server, and the reference."""
    folder = tmp_path_factory.mktemp("server")
    make_checkpoint(folder / "checkpoint", has_adapter=True)
    oracle = WindowOracle(folder / "checkpoint")
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    options = ("--tensor-parallel-size", "2", "--block-size", "16")
    with server(folder / "log", MODE, *options, checkpoint=oracle.checkpoint, **binding) as client:
        yield client, oracle


def drafts_counted(client: openai.OpenAI) -> dict[str, float]:
    text = client._client.get(str(client.base_url).replace("/v1/", "/metrics")).text
    pattern = r'^vllm:dllm_draft_nodes_(\w+)_total\{.*exactness="exact".*\} (\S+)$'
    counted = {"proposed": 0.0, "accepted": 0.0}
    for name, value in re.findall(pattern, text, re.MULTILINE):
        counted[name] += float(value)
    return counted


def test_sixteen_mixed_requests_at_once_equal_autoregression(served: Served) -> None:
    client, oracle = served
    cases = mixed(seed=1)
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda case: complete(client, case), cases))
    assert [reply.choices[0].token_ids for reply in replies] == [oracle.tokens(case) for case in cases]
    took = [reply.kv_transfer_params["dllm"] for reply in replies]
    assert [numbers["nfe"] for numbers in took] == [oracle.speculative(case).nfe for case in cases]
    totals = {name: sum(numbers[name] for numbers in took) for name in ("proposed", "accepted")}
    assert totals["accepted"] > 100, "too few drafts come true"
    wait_until(lambda: drafts_counted(client) == totals)


def test_streams_what_windows_had_accepted(served: Served) -> None:
    client, oracle = served
    case = Plain(prompt=tuple(range(5, 16)), max_tokens=40)
    given: list[list[int]] = [
        chunk.choices[0].token_ids for chunk in complete(client, case, stream=True) if chunk.choices
    ]
    assert list(itertools.chain(*given)) == oracle.tokens(case)
    made = oracle.speculative(case)
    ends = {1, *itertools.accumulate((num + 1 for _, num in made.windows), initial=1), 40}
    assert {*itertools.accumulate(map(len, given))} <= ends, "a window arrives whole"
    assert len(given) > 2


@pytest.mark.parametrize(("name", "value"), [("dllm_policy", "static"), ("dllm_threshold", 0.9), ("dllm_steps", 8)])
def test_options_of_policies_are_refused(served: Served, name: str, value: Any) -> None:
    client, _ = served
    case = Plain(prompt=(5, 6), max_tokens=4)
    with pytest.raises(openai.BadRequestError, match=rf"{name} is .*, but the server's mode is 'self_speculation'"):
        complete(client, case, extra_body={"vllm_xargs": {name: value}})
    with pytest.raises(openai.BadRequestError, match="a token of the reply needs 1 of max_model_len 128; shorten"):
        complete(client, Plain(prompt=(5,) * 128, max_tokens=4))
