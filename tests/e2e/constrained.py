"""Requests under a constraint: what they ask for, and what the reference decoder answers."""

import dataclasses
import re
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.e2e.edited import with_edits
from tests.e2e.rig import CHECKPOINT, Case, Oracle, step_all
from vllm_dllm.constraint.json_object import json_object_automaton
from vllm_dllm.constraint.regex import ByteAutomaton, byte_automaton
from vllm_dllm.constraint.schema import schema_regex
from vllm_dllm.reference.constraint import Constraint

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
ENDS = (1, 6)
"""EOS, and what ends a turn of LLaDA besides."""


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
    constraint = constraint_of(asked, case.max_tokens, oracle.end_ids)
    tokens: list[int] = oracle._generate(case, settings, constraint=constraint).tokens.tolist()
    return tokens[: case.max_tokens]


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


def beside_edited(cases: list[Case], seed: int, asked: Any = ASKED, max_tokens: int = 61) -> list[Asking]:
    """Return the cases: some with edits of their logits, some that ask for something in turn, and free ones."""
    mixed = []
    for i, case in enumerate(with_edits(cases, seed)):
        its = asked[i // 2 % len(asked)] if i % 2 else None
        mixed.append(Asking(dataclasses.replace(case, max_tokens=max_tokens, steps=None) if its else case, its))
    return mixed


def check_beside_edited(llm: Any, oracle: Oracle, settings: dict[str, Any], cases: list[Case], seed: int) -> None:
    """Run cases as `beside_edited` has them: tokens are the reference's, and answers meet what is asked for."""
    mixed = beside_edited(cases, seed)
    tokens = step_all(llm, mixed)
    for i, (case, asked) in enumerate((each.case, each.asked) for each in mixed):
        assert tokens[str(i)] == expected(oracle, case, settings, asked), (case, asked)
        if asked is not None:
            check_text(tokens[str(i)], asked)
    assert sum(each.asked is not None for each in mixed) >= 6
