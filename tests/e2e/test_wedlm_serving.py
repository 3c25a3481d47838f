"""WeDLM over HTTP by two tensor-parallel ranks, with drafts and without."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.e2e.http import complete, server
from tests.e2e.wedlm import SlidingOracle, WindowCase, make_wild, mixed
from vllm_dllm.state.edits import NO_EDITS

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("server"), pytest.mark.slow("servers")]

Served = tuple[openai.OpenAI, SlidingOracle]
SPIFFY: dict[str, Any] = {"method": "spiffy", "budget": 4}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A client of a server, and the reference."""
    folder = tmp_path_factory.mktemp("server")
    make_wild(folder / "checkpoint", has_biases=True)
    oracle = SlidingOracle(folder / "checkpoint")
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    options = ("--tensor-parallel-size", "2", "--block-size", "16", "--speculative-config", json.dumps(SPIFFY))
    with server(folder / "log", {}, *options, checkpoint=oracle.checkpoint, **binding) as client:
        yield client, oracle


def test_mixed_requests_at_once_equal_the_decoder(served: Served) -> None:
    """Every other one goes without drafts."""
    client, oracle = served
    cases = [case for case in mixed(seed=1) if case.edits == NO_EDITS]
    cases += [dataclasses.replace(case, temperature=0.0) for case in cases]

    def send(number: int) -> Any:
        case = cases[number]
        own = {**case.sampling_params().extra_args, **({"dllm_speculation": False} if number % 2 else {})}
        return complete(client, case, extra_body={"vllm_xargs": own})

    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(send, range(len(cases))))
    assert [reply.choices[0].token_ids for reply in replies] == [oracle.tokens(case) for case in cases]
    took = [reply.kv_transfer_params["dllm"]["nfe"] for reply in replies]
    assert took[1::2] == [oracle.made(case).nfe for case in cases[1::2]]
    for nfe, case in zip(took[::2], cases[::2], strict=True):
        most = oracle.made(case).nfe
        assert nfe <= most if case.temperature else nfe == oracle.drafted(case, SPIFFY["budget"]).nfe
    assert sum(took[::2]) < sum(oracle.made(case).nfe for case in cases[::2])


def test_streams_what_was_at_the_front(served: Served) -> None:
    client, oracle = served
    case = WindowCase(prompt=tuple(range(5, 16)), max_tokens=40, entropy_bound=2.0)
    given: list[list[int]] = [
        chunk.choices[0].token_ids for chunk in complete(client, case, stream=True) if chunk.choices
    ]
    assert list(itertools.chain(*given)) == oracle.tokens(case)
    ends = {min(end, 40) for end in itertools.accumulate(final for _, final in oracle.made(case).steps)}
    assert {*itertools.accumulate(map(len, given))} <= ends | {0}, "what is at the front arrives whole"
    assert len(given) > 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"vllm_xargs": {"dllm_policy": "static"}}, "dllm_policy is 'static', but this model decides a window"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "structured_outputs is set"),
    ],
)
def test_what_windows_have_not_is_refused(served: Served, body: dict[str, Any], message: str) -> None:
    client, _ = served
    with pytest.raises(openai.BadRequestError, match=message):
        complete(client, WindowCase(prompt=(5, 6), max_tokens=4), extra_body=body)
