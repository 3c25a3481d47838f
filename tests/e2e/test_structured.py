"""Requests under a constraint beside free ones, in engines with drafts and without: all equal the reference (fp32)."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.constraint_fuzz import run as run_fuzz
from benchmarks.constraint_fuzz import shape_of
from benchmarks.fuzz.asked import KINDS
from tests.e2e.constrained import ASKED, CHOICE, Asking, check_text, expected, params_of
from tests.e2e.rig import Case, Oracle, mixed_cases, random_graph, shared_engine, speculation, step_all
from tests.e2e.sdar import SdarOracle, sdar_cases
from tests.suite.order import configurations
from vllm_dllm.constraint.step import ConstrainedStep

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines")]

MAX_MODEL_LEN = 256

ALWAYS = [("llada", 5)]
USUAL = [("llada", 0), ("sdar", 5)]
SLOW = [("sdar", 0)]


@pytest.fixture(params=configurations("structured", ALWAYS, USUAL, SLOW))
def served(request: pytest.FixtureRequest, mild: Path, mild_sdar: Path) -> Any:
    family, budget = request.param
    block_length = 8 if family == "llada" else 4
    checkpoint = mild if family == "llada" else mild_sdar
    drafts = {"speculative_config": speculation(random_graph(12, 12, block_length), budget)} if budget else {}
    llm = shared_engine(checkpoint, {"block_length": block_length}, max_model_len=MAX_MODEL_LEN, **drafts)
    oracle = (Oracle if family == "llada" else SdarOracle)(checkpoint, max_model_len=MAX_MODEL_LEN)
    return llm, oracle, {"block_length": block_length}


def asking(oracle: Oracle, settings: dict[str, Any], seed: int) -> list[tuple[Case, dict[str, Any] | None]]:
    cases = (sdar_cases if isinstance(oracle, SdarOracle) else mixed_cases)(settings["block_length"], seed=seed)
    asked = [ASKED[i % len(ASKED)] for i in range(len(cases))]
    long = [dataclasses.replace(case, max_tokens=61, steps=None) for case in cases]
    return [(many if what else case, what) for case, many, what in zip(cases, long, asked, strict=True)]


@pytest.mark.always
def test_every_answer_meets_its_constraint_and_equals_the_reference(served: Any) -> None:
    llm, oracle, settings = served
    pairs = asking(oracle, settings, seed=3)
    prompts = [{"prompt_token_ids": list(case.prompt)} for case, _ in pairs]
    outputs = llm.generate(prompts, [params_of(*pair) for pair in pairs], use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    for own, (case, asked) in zip(tokens, pairs, strict=True):
        if asked is not None:
            text = check_text(own, asked)
            if "json" in asked or "json_object" in asked:
                assert isinstance(json.loads(text), dict)
            if "choice" in asked:
                assert text in CHOICE
        assert own == expected(oracle, case, settings, asked), (case, asked)


@pytest.mark.always
@pytest.mark.parametrize("count", [24, pytest.param(240, marks=pytest.mark.slow("fuzz"))])
def test_generated_requests_meet_their_constraints_with_drafts_and_without(served: Any, count: int) -> None:
    """A part of `python -m benchmarks.constraint_fuzz`, which judges by other means than our automata."""
    llm, _, _ = served
    fuzz = run_fuzz(llm, shape_of(llm), seed=count, numbers=range(count), in_flight=16, prompts=[])
    assert not fuzz.faults
    assert sum(fuzz.outcomes[kind] for kind in KINDS) >= count / 2


def test_preempted_answers_go_on_where_they_were(served: Any) -> None:
    llm, oracle, settings = served
    pairs = asking(oracle, settings, seed=6)[:7]
    preempted = []

    def preempt(number: int, llm: Any) -> None:
        if number % (settings["block_length"] + 5) == 5:
            preempted.append(len(llm.llm_engine.engine_core.engine_core.scheduler.running))
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)

    cases = [Asking(case, asked) for case, asked in pairs]
    tokens = step_all(llm, cases, preempt)
    assert sum(preempted) >= 4, "too few were preempted"
    assert tokens == {str(i): expected(oracle, case, settings, asked) for i, (case, asked) in enumerate(pairs)}


def test_one_that_the_model_gives_nothing_allowed_ends_alone(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its second block, of which the head is told that no token is allowed: as where each is NaN."""
    llm, oracle, settings = served
    pairs, broken = asking(oracle, settings, seed=3)[:5], Case(prompt=(5, 6, 7), max_tokens=45)
    allowed = ConstrainedStep.allowed

    def nothing(self: ConstrainedStep) -> tuple[Any, Any]:
        place, sets = allowed(self)
        place[[each.limit - each.begin == 45 and each.block_start > each.begin for each in self.answers]] = len(sets)
        return place, np.concatenate([sets, np.zeros_like(sets[:1])])

    monkeypatch.setattr(ConstrainedStep, "allowed", nothing)
    every = [*pairs, (broken, {"regex": "[a-z]{30,}"})]
    prompts = [{"prompt_token_ids": list(case.prompt)} for case, _ in every]
    *others, last = llm.generate(prompts, [params_of(*pair) for pair in every], use_tqdm=False)
    assert last.outputs[0].finish_reason == "error"
    tokens = [list(output.outputs[0].token_ids) for output in others]
    assert tokens == [expected(oracle, case, settings, asked) for case, asked in pairs]
    monkeypatch.undo()
    (again,) = llm.generate(prompts[-1:], [params_of(*every[-1])], use_tqdm=False)
    assert list(again.outputs[0].token_ids) == expected(oracle, broken, settings, every[-1][1])


@pytest.mark.xdist_group(f"structured {USUAL[0]}")
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"regex": "("}, "no regular expression that can be built"),
        ({"regex": "[a-z]{1000}"}, "the shortest answer that meets structured_outputs"),
        ({"grammar": "root ::= a"}, "no regular language, allowed are json, json_object, regex and choice"),
        ({"json": {"$ref": "#"}}, "leads back to itself: a recursive schema is no regular language"),
        ({"json": {"type": "string", "format": "uri"}}, "format is 'uri', allowed are date"),
        ({"json": "{"}, "'{' is no JSON ("),
        ({"choice": []}, "choice is [], allowed are lists of one text and more"),
        ({"regex": "(a|b)*a(a|b){15}"}, "has more than 20000 states"),
    ],
)
def test_what_cannot_be_enforced_is_refused_and_disturbs_nobody(
    mild: Path, asked: dict[str, Any], message: str
) -> None:
    llm = shared_engine(mild, {"block_length": 8}, max_model_len=MAX_MODEL_LEN)
    case = Case(prompt=(5, 6, 7), max_tokens=16)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        llm.generate({"prompt_token_ids": [5, 6]}, params_of(case, asked), use_tqdm=False)
    assert "structured_outputs" in str(caught.value)
    output = llm.generate({"prompt_token_ids": [5, 6, 7]}, params_of(case, {"choice": CHOICE}), use_tqdm=False)
    assert check_text(list(output[0].outputs[0].token_ids), {"choice": CHOICE}) in CHOICE
