"""A sequence that grows by blocks: each block is the first one of a generation that is as long as the horizon."""

from typing import Any, get_args

import pytest
import torch

from vllm_dllm.names import PolicyName
from vllm_dllm.reference.decode import KvPolicy, generate
from vllm_dllm.reference.policy import DREAM, LLADA, UnmaskPolicy
from vllm_dllm.reference.sampling import Sampling

MASK, BLOCK, GEN = 3, 4, 16


@pytest.fixture(params=["llada", "dream"])
def family(request: pytest.FixtureRequest, make_model: Any, make_qwen: Any) -> Any:
    if request.param == "llada":
        return make_model(), LLADA
    return make_qwen(architecture="DreamModel"), DREAM


USUAL = [KvPolicy("prefix"), KvPolicy("dual", refresh_every=2)]
KV = [*USUAL, *(pytest.param(kv, marks=pytest.mark.slow("cases")) for kv in (KvPolicy(), KvPolicy("dual")))]


@pytest.mark.parametrize("kv", KV, ids=str)
@pytest.mark.parametrize("horizon", [1, 2])
def test_each_block_is_the_first_of_a_shorter_generation(family: Any, kv: KvPolicy, horizon: int) -> None:
    model, rules = family
    for seed, policy in enumerate(get_args(PolicyName)):
        prompt = torch.arange(5, 8 + seed)
        options = {
            "block_length": BLOCK,
            "kv": kv,
            "policy": UnmaskPolicy(policy, threshold=0.2, confidence_dtype=torch.float64),
            "sampling": Sampling(temperature=0.8 * (seed % 2), seed=seed, forbidden_ids=(MASK,)),
            "rules": rules,
        }
        grown = generate(model, prompt, gen_length=GEN, horizon=horizon, **options)
        known, nfe = prompt, 0
        while len(known) < len(prompt) + GEN:
            left = len(prompt) + GEN - len(known)
            one = generate(model, known, gen_length=min(horizon * BLOCK, left), **options)
            known = torch.cat((known, one.tokens[:BLOCK]))
            is_in_block = [(region[:BLOCK] == MASK).any() for region in one.history]
            nfe += 1 + sum(map(int, is_in_block))
        assert torch.equal(grown.tokens, known[len(prompt) :])
        assert grown.nfe == nfe
        whole = generate(model, prompt, gen_length=GEN, **options)
        assert torch.equal(
            generate(model, prompt, gen_length=GEN, horizon=GEN // BLOCK, **options).tokens, whole.tokens
        )


def test_it_is_another_generation_than_with_all_masks(make_model: Any) -> None:
    model, prompt = make_model(), torch.arange(5, 10)
    options = {"gen_length": GEN, "block_length": BLOCK, "sampling": Sampling(forbidden_ids=(MASK,))}
    whole, grown = generate(model, prompt, **options), generate(model, prompt, horizon=1, **options)
    assert not torch.equal(whole.tokens, grown.tokens)
