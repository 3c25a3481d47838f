"""Requests under a constraint beside free ones, in engines with drafts and without: all equal the reference (fp32)."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.e2e.rig import CHECKPOINT, Case, Oracle, mixed_cases, random_graph, shared_engine, speculation, step_all
from tests.e2e.sdar import SdarOracle, sdar_cases
from tests.suite.order import configurations
from vllm_dllm.constraint.json_object import json_object_automaton
from vllm_dllm.constraint.regex import ByteAutomaton, byte_automaton
from vllm_dllm.constraint.schema import schema_regex
from vllm_dllm.reference import block_causal, decode
from vllm_dllm.reference.constraint import Constraint
from vllm_dllm.reference.decode import KvPolicy

pytestmark = pytest.mark.engine

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["name", "age"],
}
CHOICE = ["yes", "no", "yes, (and) more"]
ASKED: list[dict[str, Any] | None] = [
    {"regex": "(ab|[0-9]{2,5})( [a-z]+){0,3}"},
    {"json": SCHEMA},
    None,
    {"choice": CHOICE},
    {"json_object": True},
    {"regex": "[a-z0-9 ]*"},
    None,
]
MAX_MODEL_LEN = 256
ENDS = (1, 6)
"""EOS, and what ends a turn of LLaDA besides."""

USUAL = [("llada", 0), ("llada", 5), ("sdar", 5)]
SLOW = [("sdar", 0)]


def automaton_of(asked: dict[str, Any]) -> ByteAutomaton:
    if "json" in asked:
        return byte_automaton(schema_regex(asked["json"]))
    if "json_object" in asked:
        return json_object_automaton()
    return byte_automaton(asked.get("regex") or "|".join(re.escape(each) for each in asked["choice"]))


def token_bytes() -> dict[int, bytes]:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    of_character = {character: byte for byte, character in bytes_to_unicode().items()}
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    vocabulary = tokenizer.get_vocab().items()
    return {i: bytes(of_character[c] for c in text) for text, i in vocabulary if i not in special}


def constraint_of(asked: dict[str, Any], length: int, ends: tuple[int, ...]) -> Constraint:
    """The reference's automaton, token by token."""
    table, texts = automaton_of(asked), token_bytes()
    step: list[dict[int, int]] = []
    for state in range(len(table.step)):
        reached = {token: _run(table, state, text) for token, text in texts.items()}
        step.append({token: after for token, after in reached.items() if after != table.dead})
    accepting = frozenset(torch.from_numpy(table.is_accepting).nonzero().flatten().tolist())
    return Constraint(step, accepting, ends, length)


def _run(table: ByteAutomaton, state: int, text: bytes) -> int:
    for byte in text:
        state = int(table.step[state, table.class_of[byte]])
    return state


def expected(oracle: Oracle, case: Case, settings: dict[str, Any], asked: dict[str, Any] | None) -> list[int]:
    if asked is None:
        return oracle.tokens(case, settings)
    ends = ENDS[:1] if isinstance(oracle, SdarOracle) else ENDS
    options = oracle._options(case, settings) | {"constraint": constraint_of(asked, case.max_tokens, ends)}
    prompt = torch.tensor(case.prompt)
    if isinstance(oracle, SdarOracle):
        found = block_causal.generate(oracle.model, prompt, **options)
    else:
        found = decode.generate(oracle.model, prompt, kv=KvPolicy("dual"), **options)
    return found.tokens.tolist()[: case.max_tokens]


@pytest.fixture(params=configurations("structured", USUAL, SLOW))
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


def params_of(case: Case, asked: dict[str, Any] | None) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    return case.sampling_params(structured_outputs=asked and StructuredOutputsParams(**asked))


@dataclasses.dataclass(frozen=True)
class Asking:
    """A case with what its answer has to meet, as `step_all` takes it."""

    case: Case
    asked: dict[str, Any] | None

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.case.prompt

    def sampling_params(self) -> Any:
        return params_of(self.case, self.asked)


def check_text(tokens: list[int], asked: dict[str, Any]) -> str:
    texts = token_bytes()
    reply = tokens[: min((tokens.index(end) for end in ENDS if end in tokens), default=None)]
    assert set(tokens[len(reply) :]) <= {*ENDS}, "an end token and something behind it"
    text = b"".join(texts[token] for token in reply)
    assert automaton_of(asked).accepts(text), (text, asked)
    return text.decode()


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
