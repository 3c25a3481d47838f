"""Policies in torch code are what their plain statements say: alone, beside all others, with drafts and without."""

import random

import pytest

from tests.draft.test_exact import SyntheticModel
from tests.draft.test_exact_cases import ALTERNATIVES, CHAIN
from tests.unmask.torch_policies import RULES, Own, decode, drawn, plain
from vllm_dllm.unmask.registry import BUILT_IN


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
