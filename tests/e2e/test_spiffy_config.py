"""An engine with Spiffy starts from a file, and mutated requests neither stop it nor change what it answers."""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.rig import NUM_SLOTS, Case, Oracle, engine, run
from vllm_dllm.config import REQUEST_PREFIX, RequestOptions
from vllm_dllm.draft.graph_file import default_graph, dump_graph

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines")]

SETTINGS = {"block_length": 8}
KNOWN = [
    Case(prompt=(5, 6, 7), max_tokens=16),
    Case(prompt=(8, 9), max_tokens=11, policy="factor", temperature=0.7, seed=3),
]

ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.5, 1e300, float("nan"), float("inf")),
    *(
        "",
        "0",
        "static",
        "factor",
        "threshold",
        "random",
        "\0",
        "\ud800",
        b"x",
        [],
        ["a"],
        [0],
        [-1],
        [None],
        {},
        {"a": 1},
    ),
]
FIELDS: dict[str, list[Any]] = dict.fromkeys(
    [
        *("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "min_tokens", "stop", "stop_token_ids", "n"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs", "prompt_logprobs", "bad_words"),
        *("ignore_eos", "extra_args", "structured_outputs"),
    ],
    ODD,
)
# What vLLM itself does not look at before it uses it: values of the right type.
FIELDS |= {"logit_bias": [{}, {1: 5.0}, {-1: 1.0}, {10**30: 1.0}], "allowed_token_ids": [[], [0], [-1], [10**30]]}
KEYS = [
    *(REQUEST_PREFIX + name for name in RequestOptions.model_fields),
    "dllm_",
    "dllm_drafts",
    "diffusion_x",
    "x",
    "",
    3,
]


@pytest.fixture(scope="module")
def llm(wild: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("spiffy")
    (folder / "graph.json").write_text(dump_graph(default_graph("static")))
    (folder / "spiffy.json").write_text('{"method": "spiffy", "draft_graph": "graph.json", "budget": 2}')
    with engine(wild, SETTINGS, speculative_config=str(folder / "spiffy.json")) as llm:
        yield llm


def test_a_file_starts_an_engine_that_decodes_as_without(llm: Any, oracle: Oracle) -> None:
    assert json.loads(json.dumps(llm.llm_engine.vllm_config.additional_config))["spiffy"]["config"]["budget"] == 2
    assert run(llm, KNOWN) == [oracle.tokens(case, SETTINGS) for case in KNOWN]


def test_a_request_may_leave_drafts_out(llm: Any, oracle: Oracle) -> None:
    case = KNOWN[0]
    proposed = []
    for own in ({}, {"dllm_speculation": False}, {"dllm_budget": 1}, {"dllm_budget": 0}):
        params = case.sampling_params()
        params.extra_args |= own
        (output,) = llm.generate([{"prompt_token_ids": list(case.prompt)}], params, use_tqdm=False)
        assert list(output.outputs[0].token_ids) == oracle.tokens(case, SETTINGS)
        proposed.append(output.kv_transfer_params["dllm"]["proposed"])
    most, none, fewer, zero = proposed
    assert none == zero == 0 < fewer < most


def mutated(rng: random.Random) -> dict[str, Any]:
    """Arguments of `SamplingParams`, one to three of them odd."""
    extra: dict[Any, Any] = {"dllm_policy": rng.choice(["static", "random", "threshold", "factor"])}
    values: dict[str, Any] = {"max_tokens": rng.choice([1, 4, 8]), "temperature": rng.choice([0.0, 0.7]), "seed": 1}
    values["extra_args"] = extra
    for _ in range(rng.choice([1, 1, 2, 3])):
        if rng.random() < 0.6:
            extra[rng.choice(KEYS)] = rng.choice(ODD)
        else:
            field = rng.choice(list(FIELDS))
            values[field] = rng.choice(FIELDS[field])
    return values


def admit(llm: Any, request_id: str, values: dict[str, Any]) -> bool:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    try:
        params = SamplingParams(**values)
    except (ValueError, TypeError, AttributeError, AssertionError, VLLMValidationError):  # what vLLM's own type does
        return False
    try:
        llm.llm_engine.add_request(request_id, {"prompt_token_ids": [5, 6, 7]}, params)
    except (ValueError, VLLMValidationError):
        return False
    return True


@pytest.mark.parametrize("num_mutations", [256, pytest.param(2000, marks=pytest.mark.slow("fuzz"))])
def test_mutated_requests_work_or_are_refused(llm: Any, oracle: Oracle, num_mutations: int) -> None:
    rng = random.Random(5)
    expected = [oracle.tokens(case, SETTINGS) for case in KNOWN]
    outcomes = {True: 0, False: 0}
    numbers = iter(range(num_mutations))
    while chunk := list(itertools.islice(numbers, 8 * NUM_SLOTS)):
        for number in chunk:
            outcomes[admit(llm, str(number), mutated(rng))] += 1
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
        assert run(llm, KNOWN) == expected
    assert min(outcomes.values()) > num_mutations / 20, outcomes
