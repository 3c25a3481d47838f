"""An answer is the same where decoding stops at its end, for every family and policy; masks behind an end count."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from vllm_dllm.names import PolicyName
from vllm_dllm.reference import block_causal, decode
from vllm_dllm.reference.decode import Generation, KvPolicy
from vllm_dllm.reference.ends import Ends
from vllm_dllm.reference.policy import DREAM, FAST_DLLM, LLADA, NEMOTRON, SDAR, Rules, UnmaskPolicy
from vllm_dllm.reference.sampling import Sampling

MASK, BLOCK = 3, 8
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
FAMILIES = {"llada": LLADA, "dream": DREAM, "sdar": SDAR, "nemotron": NEMOTRON, "fast_dllm": FAST_DLLM}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, make_model: Any, make_qwen: Any) -> tuple[Any, Rules]:
    name = request.param
    rules = replace(FAMILIES[name], sub_block_length=FAMILIES[name].sub_block_length and 4)
    architecture = "DreamModel" if name == "dream" else "SDARForCausalLM"
    return (make_model() if name == "llada" else make_qwen(architecture=architecture)), rules


def decoded(family: tuple[Any, Rules], prompt: torch.Tensor, **options: Any) -> Generation:
    model, rules = family
    if rules.attention == "bidirectional":
        return decode.generate(model, prompt, block_length=BLOCK, rules=rules, kv=KvPolicy("dual"), **options)
    return block_causal.generate(model, prompt, block_length=BLOCK, rules=rules, **options)


@pytest.mark.parametrize("num_seeds", [2, pytest.param(4, marks=pytest.mark.slow("cases"))])
@pytest.mark.parametrize("policy", POLICIES)
def test_stopping_at_the_end_changes_no_token_before_it(family: Any, policy: PolicyName, num_seeds: int) -> None:
    generator = torch.Generator().manual_seed(POLICIES.index(policy))
    spared = 0
    for seed in range(num_seeds):
        prompt = torch.randint(4, 37, (int(torch.randint(1, 12, (), generator=generator)),), generator=generator)
        options = {
            "gen_length": 3 * BLOCK,
            "policy": UnmaskPolicy(policy, threshold=0.2, confidence_dtype=torch.float64),
            "sampling": Sampling(temperature=0.8 * (seed % 2), seed=seed, forbidden_ids=(MASK,)),
        }
        published = decoded(family, prompt, **options)
        ids = tuple(torch.randint(4, 37, (3,), generator=generator).tolist())
        for ends in (Ends(ids), Ends(ids, min_tokens=5), Ends(max_tokens=2 * BLOCK + 3), Ends(ids, 7, BLOCK + 1)):
            stopped = decoded(family, prompt, ends=ends, **options)
            answer = ends.cut(published.tokens.tolist())
            assert stopped.tokens[: len(answer)].tolist() == answer
            assert stopped.nfe <= published.nfe
            known = stopped.history[-1][: len(answer)]
            assert (known != MASK).all()
            if len(stopped.history) > 1:  # and it stops at once
                is_masked = stopped.history[-2] == MASK
                assert not ends.reached(stopped.history[-2], is_masked)
            spared += published.nfe - stopped.nfe
    assert spared > 0


def test_masks_behind_an_end_still_decide_what_is_before_it(make_model: Any) -> None:
    """So a refresh of a bidirectional model has them all, and an end that is known early shortens no sequence."""
    model, prompt = make_model(), torch.arange(5, 10)
    known = [9, 8, MASK, 7, 1]  # EOS at the end, and a mask before it, whose token is still open
    with torch.no_grad():
        whole = model(torch.tensor([*prompt.tolist(), *known, *[MASK] * 11]))[0]
        cut = model(torch.tensor([*prompt.tolist(), *known]))[0]
    at = len(prompt) + 2
    whole[:, MASK] = cut[:, MASK] = -torch.inf
    assert whole[at].argmax() != cut[at].argmax()
