"""Blocks of which tokens are given: with drafts and without, all policies take the reference's steps."""

import random
from dataclasses import replace
from typing import get_args

import pytest
import torch

from tests.draft.test_exact import DREAM, LLADA, MASK, REFERENCE_RULES, SDAR, VOCAB, SyntheticModel, denoise
from tests.draft.test_exact_cases import ALTERNATIVES, BLOCK_LENGTH, request
from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.names import PolicyName
from vllm_dllm.reference import block_causal, decode
from vllm_dllm.reference.decode import KvPolicy
from vllm_dllm.unmask.schedule import UnmaskRules


def drawn(rng: random.Random, length: int) -> tuple[int | None, ...]:
    share = rng.choice([0.1, 0.5, 0.9, 1.0])
    tokens = [token for token in range(VOCAB) if token != MASK]
    return tuple(rng.choice(tokens) if rng.random() < share else None for _ in range(length))


@pytest.mark.parametrize("is_native", [False, True], ids=["torch", "ops"])
@pytest.mark.parametrize(("graph", "budget"), [(None, 0), (ALTERNATIVES, 5)], ids=["plain", "drafts"])
@pytest.mark.parametrize("rules", [LLADA, DREAM, SDAR], ids=["llada", "dream", "sdar"])
def test_given_tokens_stay_and_the_rest_is_the_references(
    rules: UnmaskRules, graph: DraftGraph | None, budget: int, is_native: bool
) -> None:
    rng, num_accepted = random.Random(5), 0
    names: list[PolicyName] = [*get_args(PolicyName)] * 3
    for seed, sharpness in ((0, 0.5), (1, 12.0)):
        model, requests = SyntheticModel(BLOCK_LENGTH, seed, sharpness), []
        for idx, name in enumerate(names):
            made = request(name, idx, rules)
            requests.append(replace(made, given=drawn(rng, BLOCK_LENGTH - len(made.tail))))
        tokens, forwards, accepted = denoise(model, requests, graph, budget, is_native=is_native, rules=rules)
        for i, each in enumerate(requests):
            prompt, options = torch.tensor(each.tail, dtype=torch.int64), each.reference(BLOCK_LENGTH)
            if rules is SDAR:
                expected = block_causal.generate(model, prompt, given=each.given, **options)  # type: ignore[arg-type]
            else:
                reference = REFERENCE_RULES[rules]
                expected = decode.generate(
                    model, prompt, rules=reference, kv=KvPolicy("dual"), given=each.given, **options
                )  # type: ignore[arg-type]
            assert tokens[i] == [*each.tail, *expected.tokens.tolist()], each
            assert forwards[i] + accepted[i] == expected.nfe, each
            kept = tokens[i][len(each.tail) :]
            assert all(given in (None, token) for given, token in zip(each.given, kept, strict=True))
        num_accepted += sum(accepted)
    assert num_accepted > 10 or graph is None
