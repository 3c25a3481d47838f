"""Policies in torch code are what their plain statements say: alone, beside all others, with drafts and without."""

import random
import re
from dataclasses import replace

import pytest
import torch

from tests.constraint.brute import random_regex
from tests.constraint.test_denoise import Asked
from tests.constraint.test_denoise import denoise as constrained
from tests.draft.test_exact import EOS, MASK, VOCAB, SyntheticModel
from tests.draft.test_exact_cases import ALTERNATIVES, CHAIN
from tests.draft.test_look_ahead import ChainModel
from tests.draft.test_look_ahead import decode as look_ahead_decode
from tests.ops.walks import random_params
from tests.suite.parts import some_of
from tests.unmask.torch_policies import EOT, RULES, Own, decode, drawn, plain
from vllm_dllm.ops.vocab_stats import RowIds
from vllm_dllm.reference.rules import Look
from vllm_dllm.state.edits import LogitEdits
from vllm_dllm.unmask.registry import BUILT_IN, changes_tokens, needs_file
from vllm_dllm.unmask.schedule import UnmaskRules
from vllm_dllm.unmask.stats import torch_stats
from vllm_dllm.unmask.torch_policy import Seen

LENGTH = 8
SEEDS = (2, 5, 0, 1, 3, 4)[: some_of(6, part=3)]
"""The first two have both graphs, both ways, and edits."""


def test_each_policy_has_a_plain_statement() -> None:
    assert set(RULES) == set(BUILT_IN)


@pytest.mark.parametrize("policy", RULES)
def test_decodes_are_those_of_the_plain_statement(policy: str) -> None:
    """Some batches of random models, beside native policies; drafts are accepted and change nothing."""
    accepted, steps = 0, 0
    for seed in SEEDS:
        rng = random.Random(f"{policy} {seed}")
        model = SyntheticModel([8, 16, 16][seed // 2 % 3], seed, [0.5, 3.0, 8.0][seed % 3])
        requests = [*(drawn(policy, rng) for _ in range(5)), Own("threshold"), Own("credit", threshold=0.4)]
        if seed % 2:  # somebody whose positions may have to wait
            requests.append(Own("threshold", edits=LogitEdits(bad_words=((4, 4),))))
        alone = decode(model, requests[:1], num_blocks=2)
        without = decode(model, requests, num_blocks=2)
        graph, budget = [(CHAIN, 7), (ALTERNATIVES, 5)][seed % 2]
        with_drafts = decode(model, requests, graph, budget, num_blocks=2, is_native=seed % 4 < 2)
        assert alone[0] == without[0]
        for request, its, drafted in zip(requests, without, with_drafts, strict=True):
            assert drafted.tokens == its.tokens
            assert drafted.steps == its.steps
            if request.policy == policy:
                assert (its.tokens, its.steps) == plain(model, request, num_blocks=2)
                accepted, steps = accepted + drafted.accepted, steps + drafted.steps
    assert accepted > steps / 50


WITHOUT_NET = [policy for policy in BUILT_IN if not needs_file(policy)]
GROWING = [policy for policy in WITHOUT_NET if not changes_tokens(policy)]


@pytest.mark.parametrize("is_native", [False, True], ids=["torch", "ops"])
def test_under_a_constraint_answers_match_and_drafts_change_no_token(is_native: bool) -> None:
    rng, asked = random.Random(3), []
    for policy in GROWING:
        own = Own(policy, drawn(policy, rng).values, threshold=0.5, steps=4)
        tries = (Asked(own, random_regex(rng, 4), 2 * LENGTH) for _ in range(99))
        asked.append(next(each for each in tries if each.automaton().distance[0] <= each.length))
    asked += [Asked(own.request, None, 2 * LENGTH) for own in asked[:3]]
    common = {"num_blocks": 2, "is_native": is_native, "rules": UnmaskRules(eos_id=EOS, eot_id=EOT)}
    model = SyntheticModel(LENGTH, 4, 3.0)
    plain, _ = constrained(model, asked, None, 0, **common)
    assert constrained(model, asked, CHAIN, 7, **common)[0] == plain
    assert all(re.fullmatch(own.regex, own.text(tokens)) for own, tokens in zip(asked, plain, strict=True) if own.regex)
    free = decode(model, [own.request for own in asked[-3:]], num_blocks=2, rules=common["rules"])
    assert plain[-3:] == [each.tokens for each in free]


def test_barred_words_are_written_by_none() -> None:
    """Of two tokens that the model likes beside each other; drafts change nothing."""
    model = SyntheticModel(LENGTH, 5, 1.0)
    model.own[:, 4] += 4.0
    model.own[:, 8] += 3.0
    words = ((4, 4), (8, 8, 8))
    requests = [Own(policy, threshold=0.3, steps=2) for policy in GROWING]
    free = [each.tokens for each in decode(model, requests)]
    assert any(_has(tokens, word) for tokens in free for word in words)
    barred = [replace(own, edits=LogitEdits(bad_words=words)) for own in requests]
    found = [each.tokens for each in decode(model, [*barred, Own("threshold")])]
    assert not any(_has(tokens, word) for tokens in found[:-1] for word in words)
    assert [each.tokens for each in decode(model, [*barred, Own("threshold")], CHAIN, 7)] == found


def _has(tokens: list[int], word: tuple[int, ...]) -> bool:
    return any(tuple(tokens[i : i + len(word)]) == word for i in range(len(tokens)))


def test_a_void_step_leaves_no_trace() -> None:
    model = SyntheticModel(LENGTH, 1, 3.0)
    requests = [Own(policy, steps=4) for policy in BUILT_IN]
    assert [each.tokens for each in decode(model, requests, void_first=True)] == [
        each.tokens for each in decode(model, requests)
    ]


@pytest.mark.parametrize("policy", ["eotp", "learn2pd_eotp"])
def test_cuts_are_the_plain_statements_where_a_reply_may_end_in_many_places(policy: str) -> None:
    rng = random.Random(0)
    for seed in range(6):
        model = SyntheticModel(LENGTH, seed, 1.0)
        model.own[:, EOS] += 1.5
        requests = [drawn(policy, rng) for _ in range(4)]
        found = decode(model, requests, num_blocks=2)
        assert [(its.tokens, its.steps) for its in found] == [plain(model, own, num_blocks=2) for own in requests]


@pytest.mark.parametrize("at", [2, LENGTH - 1])
def test_a_reply_is_cut_where_eos_is_likeliest(at: int) -> None:
    """Behind it nothing is decided: neither in the block, nor in the next one, where the cut is at the block's end."""
    model = SyntheticModel(LENGTH, 1, 3.0)
    model.own[:, EOS] -= 99.0
    model.own[at, EOS] += 140.0
    whole, cut = decode(model, [Own("static", steps=LENGTH), Own("eotp", steps=LENGTH)], num_blocks=2)
    assert (whole.steps, cut.steps) == (2 * LENGTH, at + 2)
    assert cut.tokens[at:] == [EOS] * (2 * LENGTH - at)
    assert EOS not in cut.tokens[:at]


@pytest.mark.parametrize("top", [None, EOS, EOT, 7])
def test_confidence_without_end_tokens(top: int | None) -> None:
    """Also where one of them, or both, are all but certain, and nothing else is."""
    logits = 2 * torch.randn(2 * LENGTH, VOCAB, generator=torch.Generator().manual_seed(0))
    if top is not None:
        logits[::2, top] += 30.0
    logits[:, EOT] += 10.0 * (top == EOS)
    ends = torch.tensor([[EOS, EOT]]).expand(2 * LENGTH, -1)
    rows = torch_stats(logits.clone(), excluded_ids=[MASK], num_candidates=2, sampling=None, ids=RowIds(ends))
    canvas, step = torch.full((2, LENGTH), MASK), torch.zeros(2, dtype=torch.int64)
    rules = UnmaskRules(eos_id=EOS, eot_id=EOT)
    params = random_params(2, LENGTH, torch.Generator().manual_seed(0))
    is_masked = canvas == MASK
    seen = Seen(canvas, is_masked, is_masked, rows, rows.distribution(torch.ones(2)), step, params, rules, MASK)
    found = seen.confidence_without(eos_too=torch.tensor([True, False])).flatten()
    for row, one in enumerate(logits.double()):
        look = Look.of(one, MASK)
        left = look.probs.index_fill(0, torch.tensor([EOT, EOS] if row < LENGTH else [EOT]), 0.0)
        expected = (left / left.sum())[look.token]
        assert float(found[row]) == pytest.approx(float(expected), rel=1e-4, abs=1e-12)


def test_look_aheads_and_a_prompts_end_change_no_token() -> None:
    """In blocks that begin with the prompt's end, and whose next one is decided ahead."""
    num_over = 0
    for block_length, seed in ((4, 1), (8, 2)):
        model, rng = ChainModel(block_length, seed, 12.0), random.Random(seed)
        requests = [replace(drawn(policy, rng), tail=(2, 4, 6)[: i % 4]) for i, policy in enumerate(WITHOUT_NET)]
        plain = look_ahead_decode(model, requests, CHAIN, 0, 3, is_native=True)
        ahead = look_ahead_decode(model, requests, CHAIN, 7, 3, is_native=seed == 1)
        for request, row, other in zip(requests, plain, ahead, strict=True):
            assert other.tokens == row.tokens
            assert tuple(row.tokens[: len(request.tail)]) == request.tail
            # Forwards of canvases without masks, which these take, are not counted there.
            assert request.policy in {"editing", "indel"} or row.took[0] == other.took[:2].sum()
            assert (len(row.tokens), MASK in row.tokens) == (3 * block_length, False)
            num_over += other.num_over
    assert num_over > 10
