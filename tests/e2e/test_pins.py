"""Answers that are given in part, in engines with drafts: all equal the reference, in fp32, tokens and forwards."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.constrained import ASKED, Asking, check_text, expected, params_of
from tests.e2e.edited import with_edits
from tests.e2e.pinned import with_given
from tests.e2e.rig import Case, Oracle, mixed_cases, random_graph, run_outputs, shared_engine, speculation, step_all
from tests.e2e.sdar import SdarOracle, sdar_cases
from tests.suite.order import configurations

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines")]

MAX_MODEL_LEN = 256
LLADA, SDAR = ("llada", 5), ("sdar", 5)


@pytest.fixture(params=configurations("structured", [LLADA, SDAR]))
def served(request: pytest.FixtureRequest, mild: Path, mild_sdar: Path) -> Any:
    """The engines of `test_structured.py`."""
    family, budget = request.param
    block_length = 8 if family == "llada" else 4
    checkpoint = mild if family == "llada" else mild_sdar
    drafts = {"speculative_config": speculation(random_graph(12, 12, block_length), budget)}
    llm = shared_engine(checkpoint, {"block_length": block_length}, max_model_len=MAX_MODEL_LEN, **drafts)
    oracle = (Oracle if family == "llada" else SdarOracle)(checkpoint, max_model_len=MAX_MODEL_LEN)
    return llm, oracle, {"block_length": block_length}


def cases_of(oracle: Oracle, settings: dict[str, Any], seed: int, max_tokens: int | None = None) -> list[Case]:
    is_sdar, block_length = isinstance(oracle, SdarOracle), settings["block_length"]
    cases = (sdar_cases if is_sdar else mixed_cases)(block_length, seed=seed)
    if max_tokens is not None:
        cases = [dataclasses.replace(case, max_tokens=max_tokens, steps=None) for case in cases]
    return with_given(with_edits(cases, seed), block_length, seed, has_suffixes=not is_sdar)


def test_given_tokens_stay_and_the_rest_equals_the_reference(served: Any) -> None:
    llm, oracle, settings = served
    cases = cases_of(oracle, settings, seed=21) + cases_of(oracle, settings, seed=22)
    outputs = run_outputs(llm, cases)
    for output, case in zip(outputs, cases, strict=True):
        tokens = list(output.outputs[0].token_ids)
        assert tokens == oracle.tokens(case, settings), case
        assert len(tokens) == case.max_tokens
        kept = [given in (None, token) for given, token in zip(case.given, tokens, strict=False)]
        assert all(kept)
        took = output.kv_transfer_params["dllm"]
        assert took["nfe"] + took["accepted"] == oracle.generation(case, settings).nfe, case


def test_what_is_all_given_takes_no_forward_that_decides(served: Any) -> None:
    llm, oracle, settings = served
    for length in (29, 32):  # with the prompt of 3, whole blocks of the one model, and of the other
        case = Case(prompt=(5, 6, 7), max_tokens=length, given=tuple(range(10, 10 + length)))
        (output,) = run_outputs(llm, [case])
        assert list(output.outputs[0].token_ids) == list(case.given)
        took, generation = output.kv_transfer_params["dllm"], oracle.generation(case, settings)
        assert took["nfe"] + took["accepted"] == generation.nfe
        is_whole = len(generation.tokens) == length
        assert (took["nfe"], took["nfe_refresh"]) == (0, 0) or not is_whole


def test_preempted_answers_begin_their_blocks_with_what_is_given(served: Any) -> None:
    llm, oracle, settings = served
    cases = cases_of(oracle, settings, seed=23, max_tokens=90)[:7]
    preempted = []

    def preempt(number: int, llm: Any) -> None:
        if number % (settings["block_length"] + 3) == 3:
            preempted.append(len(llm.llm_engine.engine_core.engine_core.scheduler.running))
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)

    tokens = step_all(llm, cases, preempt)
    assert sum(preempted) >= 4, "too few were preempted"
    assert tokens == {str(i): oracle.tokens(case, settings) for i, case in enumerate(cases)}


def constrained_cases(oracle: Oracle, settings: dict[str, Any]) -> list[Asking]:
    """Requests of which every third token of an answer that meets what they ask is given, in all of its blocks."""
    is_sdar = isinstance(oracle, SdarOracle)
    cases = (sdar_cases if is_sdar else mixed_cases)(settings["block_length"], seed=24)
    made = []
    for i, case in enumerate(cases[:7]):
        if (asked := ASKED[i]) is None:
            continue
        long = dataclasses.replace(case, max_tokens=61, steps=None)
        free = expected(oracle, dataclasses.replace(long, seed=long.seed // 2, temperature=0.9), settings, asked)
        given = tuple(token if place % 3 == i % 3 else None for place, token in enumerate(free))
        made.append(Asking(dataclasses.replace(long, given=given), asked))
    return made


def test_a_constraint_is_met_with_what_is_given(served: Any) -> None:
    llm, oracle, settings = served
    asking = constrained_cases(oracle, settings)
    tokens = step_all(llm, asking)
    for i, each in enumerate(asking):
        assert tokens[str(i)] == expected(oracle, each.case, settings, each.asked), each
        assert each.asked is not None
        check_text(tokens[str(i)], each.asked)


@pytest.mark.xdist_group(f"structured {LLADA}")
@pytest.mark.parametrize(
    ("options", "changes", "text"),
    [
        ({"dllm_canvas": [5, None, 6]}, {"max_tokens": 16}, "max_tokens is 16, but dllm_canvas has 3 tokens"),
        ({"dllm_canvas": []}, {}, "dllm_canvas is [], allowed are texts and lists of one token and more"),
        ({"dllm_canvas": ""}, {}, "dllm_canvas is '', allowed are texts and lists"),
        ({"dllm_canvas": [5, 376]}, {}, "dllm_canvas has 376 at position 1; allowed are token ids from 0 to 375"),
        ({"dllm_canvas": [5, "a"]}, {}, "dllm_canvas is [5, 'a'], allowed are null, texts, and lists of token ids"),
        ({"dllm_canvas": "<|mdm_mask*9999999|>"}, {}, "dllm_canvas has <|mdm_mask*9999999|> behind 0 tokens"),
        ({"dllm_canvas": "<|mdm_mask*0|>"}, {}, "dllm_canvas has <|mdm_mask*0|> behind 0 tokens, allowed are counts"),
        ({"dllm_canvas": [None] * 254}, {}, "whole blocks of"),
        ({"dllm_canvas": [5, None], "dllm_suffix": [5]}, {}, "dllm_canvas is set too"),
        ({"dllm_canvas": [5, None]}, {"bad_words": ["a"]}, "bad_words is set, of which a given token could complete"),
        ({"dllm_canvas": [5, None]}, {"min_tokens": 3}, "min_tokens is 3, allowed are numbers from 0 to 2"),
        ({"vllm_dllm_pins": [5]}, {}, "vllm_dllm_pins is set, which the front end sets itself"),
    ],
)
def test_what_cannot_be_given_is_refused_and_disturbs_nobody(
    mild: Path, options: dict[str, Any], changes: dict[str, Any], text: str
) -> None:
    drafts = {"speculative_config": speculation(random_graph(12, 12, 8), 5)}
    llm = shared_engine(mild, {"block_length": 8}, max_model_len=MAX_MODEL_LEN, **drafts)
    case = Case(prompt=(5, 6, 7), max_tokens=8)
    params = case.sampling_params(**{"extra_args": options, "max_tokens": None, **changes})
    with pytest.raises(ValueError, match=re.escape(text)):
        llm.generate({"prompt_token_ids": [5, 6]}, params, use_tqdm=False)
    assert len(run_outputs(llm, [case])[0].outputs[0].token_ids) == 8


@pytest.mark.xdist_group(f"structured {LLADA}")
def test_a_token_that_no_answer_has_is_refused_by_its_position(mild: Path) -> None:
    drafts = {"speculative_config": speculation(random_graph(12, 12, 8), 5)}
    llm = shared_engine(mild, {"block_length": 8}, max_model_len=MAX_MODEL_LEN, **drafts)
    (a,) = llm.get_tokenizer().encode("a", add_special_tokens=False)
    (b,) = llm.get_tokenizer().encode("b", add_special_tokens=False)
    for canvas, place in (([None, a, None, b, None, None], 3), ([b, *[None] * 5], 0), ([None] * 5 + [a], None)):
        params = params_of(Case((5,), 6, given=tuple(canvas)), {"regex": "a+"})
        if place is None:
            assert llm.generate({"prompt_token_ids": [5]}, params, use_tqdm=False)[0].outputs[0].text == "a" * 6
            continue
        with pytest.raises(ValueError, match=f"at position {place} "):
            llm.generate({"prompt_token_ids": [5]}, params, use_tqdm=False)


@pytest.mark.xdist_group(f"structured {SDAR}")
def test_a_suffix_needs_a_model_that_sees_what_is_behind(mild_sdar: Path) -> None:
    drafts = {"speculative_config": speculation(random_graph(12, 12, 4), 5)}
    llm = shared_engine(mild_sdar, {"block_length": 4}, max_model_len=MAX_MODEL_LEN, **drafts)
    with pytest.raises(ValueError, match="no position sees what lies behind its block"):
        run_outputs(llm, [Case((5,), 6, given=(*[None] * 6, 9))])
