"""Requests under a constraint beside free ones: drafts or not, torch or ops, they end as the plain decoder has it."""

import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch

from tests.constraint.brute import random_regex
from tests.draft.test_exact import (
    CPU,
    DREAM,
    EOS,
    LLADA,
    MASK,
    REFERENCE_RULES,
    SDAR,
    VOCAB,
    Request,
    SyntheticModel,
    drafter_of,
)
from tests.draft.test_exact_cases import ALTERNATIVES, CHAIN, request
from tests.unmask.edited import Shown, check_shown, note_shown
from vllm_dllm.constraint.answer import Answer
from vllm_dllm.constraint.automaton import Automaton
from vllm_dllm.constraint.compile import TokenBytes, compile_tokens
from vllm_dllm.constraint.regex import ByteAutomaton, build_table, parse_table
from vllm_dllm.denoiser import Denoiser
from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.names import PolicyName
from vllm_dllm.reference import block_causal, decode
from vllm_dllm.reference.constraint import Constraint
from vllm_dllm.reference.decode import Generation, KvPolicy
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.draws import native_draws
from vllm_dllm.state.records import NO_LOGPROBS
from vllm_dllm.state.settle import Ledger, native_settle
from vllm_dllm.unmask.head import LogitsHead
from vllm_dllm.unmask.logprobs import LogprobHead
from vllm_dllm.unmask.schedule import UnmaskRules
from vllm_dllm.unmask.walk import native_walk

TEXTS = {0: b"a", 2: b"b", 4: b"ab", 5: b"ba", 6: b"aab", 7: b"b", 8: b"bb", 9: b"c"}
OTHER_END = 12
TOKENS = TokenBytes.of(TEXTS, VOCAB, [EOS, OTHER_END])
FREE = None
NUM_TOP = 3


@functools.cache
def table_of(regex: str) -> ByteAutomaton:
    return parse_table(build_table(regex))


@functools.cache
def compiled(regex: str) -> Automaton:
    return compile_tokens(table_of(regex), TOKENS)


@dataclass(frozen=True)
class Asked:
    """A request, what its answer has to match, and how many tokens of it the reply has."""

    request: Request
    regex: str | None
    length: int

    def automaton(self) -> Automaton:
        assert self.regex is not None
        return compiled(self.regex)

    def constraint(self) -> Constraint | None:
        """The reference's automaton, token by token."""
        if self.regex is None:
            return None
        table = table_of(self.regex)
        step: list[dict[int, int]] = []
        for state in range(len(table.step)):
            step.append({})
            for token, text in TEXTS.items():
                reached = state
                for byte in text:
                    reached = int(table.step[reached, table.class_of[byte]])
                if reached != table.dead:
                    step[state][token] = reached
        accepting = frozenset(torch.from_numpy(table.is_accepting).nonzero().flatten().tolist())
        return Constraint(step, accepting, (EOS, OTHER_END), self.length)

    def text(self, tokens: Sequence[int]) -> str | None:
        """What a reply says; None where something follows an end token."""
        reply = list(tokens[: self.length])
        ends = [place for place, token in enumerate(reply) if token in (EOS, OTHER_END)]
        text = reply[: ends[0]] if ends else reply
        if len(ends) != len(reply) - len(text) or any(token not in TEXTS for token in text):
            return None
        return b"".join(TEXTS[token] for token in text).decode()


def denoise(
    model: SyntheticModel,
    asked: Sequence[Asked],
    graph: DraftGraph | None,
    budget: int,
    *,
    num_blocks: int,
    is_native: bool,
    rules: UnmaskRules,
    shown: dict[int, list[Shown]] | None = None,
) -> tuple[list[list[int]], int]:
    """Decode all blocks of all requests, each in its own time; returns what they generated, and all forwards.

    With `shown` all ask for log-probabilities, which are put there, by request.
    """
    block_length, num_reqs = model.block_length, len(asked)
    state = CanvasState(num_reqs, block_length, MASK, CPU, rules)
    tokens: list[list[int]] = []
    for slot, each in enumerate(asked):
        tail = each.request.tail
        end = num_blocks * block_length
        answer = None
        if each.regex is not None:
            answer = Answer(each.automaton(), len(tail), len(tail) + each.length, end, 0, block_length)
        params = each.request.params(rules, block_length, end)
        state.add_request(slot, replace(params, num_logprobs=NO_LOGPROBS if shown is None else NUM_TOP), answer)
        state.canvas[slot, : len(tail)] = torch.tensor(tail, dtype=torch.int64)
        tokens.append([])
    state.apply_staged_writes()
    head = LogitsHead(torch.clone, VOCAB, MASK, is_native=is_native)
    ops = (native_walk, native_settle, native_draws) if is_native else ()
    logprob_head = LogprobHead(torch.clone, VOCAB, MASK)
    denoiser = Denoiser(state, drafter_of(graph, is_native=is_native), head, *ops, logprob_head=logprob_head)
    forwards = 0
    while slots := [slot for slot in range(num_reqs) if len(tokens[slot]) < num_blocks * block_length]:
        start = torch.tensor([len(tokens[slot]) for slot in slots])
        blocks = Blocks(torch.tensor(slots), torch.tensor(slots).numpy(), start)
        nodes = denoiser.nodes(blocks, budget if graph is not None else 0)
        forwards += len(slots)
        done = denoiser.advance(blocks, nodes, model.block_logits(nodes.canvas.flatten(0, 1)).flatten(0, 1))
        known = torch.maximum(start, torch.tensor([len(asked[slot].request.tail) for slot in slots]))
        emission = denoiser.settle(blocks, nodes, done, Ledger(len(slots), known, torch.zeros_like(start)))
        if shown is not None:
            note_shown(shown, slots, emission)
        assert (done.num_unmasked > 0).all(), "a step unmasks something"
        for row, slot in enumerate(slots):
            if done.is_finished[row]:
                tokens[slot] += done.canvas[row].tolist()
    return [each[len(own.request.tail) :] for each, own in zip(tokens, asked, strict=True)], forwards


def reference(model: SyntheticModel, asked: Asked, num_blocks: int, rules: UnmaskRules) -> Generation:
    options = asked.request.reference(model.block_length)
    options["gen_length"] = num_blocks * model.block_length - len(asked.request.tail)
    policy = options["policy"]
    prompt = torch.tensor(asked.request.tail, dtype=torch.int64)
    if rules is SDAR:
        return block_causal.generate(model, prompt, constraint=asked.constraint(), **options)
    options["policy"] = replace(policy, steps=policy.steps and policy.steps * num_blocks)
    kv, of_family = KvPolicy("dual"), REFERENCE_RULES[rules]
    return decode.generate(model, prompt, kv=kv, rules=of_family, constraint=asked.constraint(), **options)


def ask(name: PolicyName, number: int, rules: UnmaskRules, block_length: int, size: int) -> Asked:
    rng = random.Random(number)
    own = request(name, number, rules)
    own = replace(own, steps=min(own.steps, block_length))
    room = size - len(own.tail)
    if number % 3 == 2:
        return Asked(own, FREE, room)
    while True:
        asked = Asked(own, random_regex(rng, 4), room - rng.choice([0, 0, 1, 3]))
        if asked.automaton().distance[0] <= asked.length:
            return asked


@pytest.mark.parametrize("is_native", [False, True], ids=["torch", "ops"])
@pytest.mark.parametrize("rules", [LLADA, DREAM, SDAR], ids=["llada", "dream", "sdar"])
@pytest.mark.parametrize("seed", range(3))
def test_drafts_change_no_token_and_every_answer_matches(rules: UnmaskRules, is_native: bool, seed: int):
    block_length, num_blocks = (8, 4, 8)[seed], (1, 3, 2)[seed]
    model = SyntheticModel(block_length, seed, (0.5, 3.0, 12.0)[seed])
    names = (*get_args(PolicyName), "credit", "threshold", "static", "credit")
    asked = [ask(name, 20 * seed + n, rules, block_length, block_length * num_blocks) for n, name in enumerate(names)]
    common = {"num_blocks": num_blocks, "is_native": is_native, "rules": rules}
    plain, forwards = denoise(model, asked, None, 0, **common)
    expected = [reference(model, own, num_blocks, rules) for own in asked]
    for own, tokens, its in zip(asked, plain, expected, strict=True):
        assert tokens == its.tokens.tolist(), own
        if own.regex is not None:
            assert own.text(tokens) is not None
            assert re.fullmatch(own.regex, own.text(tokens)), own
    for graph, budget in ((CHAIN, 7), (ALTERNATIVES, 5)):
        shown: dict[int, list[Shown]] = {}
        drafted, fewer = denoise(model, asked, graph, budget, **common, shown=shown)
        assert drafted == plain
        assert fewer < forwards
        for slot, its in enumerate(expected):
            check_shown(shown[slot], plain[slot], its.log_probs, NUM_TOP)


def test_free_requests_are_as_without_the_others():
    model = SyntheticModel(8, 1, 3.0)
    asked = [ask(name, n, LLADA, 8, 16) for n, name in enumerate(get_args(PolicyName))]
    common = {"num_blocks": 2, "is_native": True, "rules": LLADA}
    together, _ = denoise(model, asked, ALTERNATIVES, 5, **common)
    free = [own for own in asked if own.regex is None]
    alone, _ = denoise(model, free, ALTERNATIVES, 5, **common)
    assert alone == [tokens for own, tokens in zip(asked, together, strict=True) if own.regex is None]


def test_a_step_that_would_break_the_answer_takes_fewer_positions():
    """A model that is sure of an `a` at both places, where the answer is `ab` or `ba`."""
    model = SyntheticModel(2, 0, 0.0)
    model.context.zero_()
    model.own.fill_(-20.0)
    model.own[:, 0] = 20.0
    asked = Asked(Request("threshold", 0.9, 2, 0.0, 0, 1.0, 0), "ab|ba", 2)
    tokens, forwards = denoise(model, [asked], None, 0, num_blocks=1, is_native=False, rules=LLADA)
    assert (tokens, forwards) == ([[0, 2]], 2)  # the first one, and in the next step the only one that is left
    free, forwards = denoise(
        model, [Asked(asked.request, FREE, 2)], None, 0, num_blocks=1, is_native=False, rules=LLADA
    )
    assert (free, forwards) == ([[0, 0]], 1)


def test_what_follows_from_the_rest_is_certain_and_taken_at_once():
    """A constraint with one answer: confidence is of what is allowed, so all positions go in one step."""
    asked = Asked(Request("threshold", 0.99, 4, 0.0, 0, 1.0, 0), "cccc", 4)
    model = SyntheticModel(4, 3, 1.0)
    tokens, forwards = denoise(model, [asked], None, 0, num_blocks=1, is_native=True, rules=LLADA)
    assert (tokens, forwards) == ([[9, 9, 9, 9]], 1)
