"""Policies in torch code are what their plain statements say: alone, beside all others, with drafts and without."""

import random

import pytest
import torch

from tests.draft.test_exact import EOS, MASK, VOCAB, SyntheticModel
from tests.draft.test_exact_cases import ALTERNATIVES, CHAIN
from tests.ops.walks import random_params
from tests.unmask.torch_policies import EOT, RULES, Own, decode, drawn, plain
from vllm_dllm.ops.vocab_stats import RowIds
from vllm_dllm.reference.rules import Look
from vllm_dllm.unmask.registry import BUILT_IN
from vllm_dllm.unmask.schedule import UnmaskRules
from vllm_dllm.unmask.stats import torch_stats
from vllm_dllm.unmask.torch_policy import Seen

LENGTH = 8


def test_each_policy_has_a_plain_statement() -> None:
    assert set(RULES) == set(BUILT_IN)


@pytest.mark.parametrize("policy", RULES)
def test_decodes_are_those_of_the_plain_statement(policy: str) -> None:
    """Some batches of random models, beside native policies; drafts are accepted and change nothing."""
    rng, accepted, steps = random.Random(policy), 0, 0
    for seed in range(12):
        model = SyntheticModel([8, 16, 16][seed // 2 % 3], seed, [0.5, 3.0, 8.0][seed % 3])
        requests = [*(drawn(policy, rng) for _ in range(4)), Own("threshold"), Own("credit", threshold=0.4)]
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


def test_a_void_step_leaves_no_trace() -> None:
    model = SyntheticModel(LENGTH, 1, 3.0)
    requests = [Own(policy, steps=4) for policy in BUILT_IN]
    assert [each.tokens for each in decode(model, requests, void_first=True)] == [
        each.tokens for each in decode(model, requests)
    ]


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
