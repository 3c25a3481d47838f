"""The reference decoder of SDAR against a scalar loop that keeps no keys and values, and its policies' counts."""

import math

import pytest
import torch

from vllm_dllm.noise import gumbel, stream_keys
from vllm_dllm.reference.block_causal import generate
from vllm_dllm.reference.ends import Ends
from vllm_dllm.reference.policy import SDAR, Block, UnmaskPolicy, dynamic_count, entropy_bounded_count
from vllm_dllm.reference.qwen import Qwen, block_causal
from vllm_dllm.reference.sampling import Sampling

MASK = 3
PROMPT = [7, 11, MASK, 19, 30, 4, 8]  # holds the mask token, which is an ordinary token there
NO_MASK = {"forbidden_ids": (MASK,)}


def sample(logits: list[float], position: int, num_masked: int, sampling: Sampling) -> tuple[int, float, float]:
    """Draw a token in scalars; returns it, its probability and the entropy, all after temperature and top_k."""
    logits = [-math.inf if v == MASK else x / (sampling.temperature or 1.0) for v, x in enumerate(logits)]
    if sampling.temperature > 0 and sampling.top_k:
        least = sorted(logits, reverse=True)[sampling.top_k - 1]
        logits = [x if x >= least else -math.inf for x in logits]
    total = sum(math.exp(x) for x in logits)
    probs = [math.exp(x) / total for x in logits]
    key = stream_keys(torch.tensor(sampling.seed), torch.tensor(position), torch.tensor(num_masked))
    noise = gumbel(key, torch.arange(len(probs))).tolist() if sampling.temperature > 0 else [0.0] * len(probs)
    token = max(range(len(probs)), key=lambda v: math.log(probs[v]) + noise[v] if probs[v] > 0 else -math.inf)
    return token, probs[token], -sum(p * math.log(p) for p in probs if p > 0)


def chosen_positions(drawn: dict[int, tuple[int, float, float]], count: int, policy: UnmaskPolicy) -> list[int]:
    """Apply a published strategy; `count` is `num_transfer_tokens` of the step."""
    by_confidence = sorted(drawn, key=lambda p: (-drawn[p][1], p))
    if policy.name == "sequential":
        return sorted(drawn)[:count]
    if policy.name == "dynamic":
        high = [p for p in drawn if drawn[p][1] > policy.threshold]
        return high if len(high) >= count else by_confidence[:count]
    if policy.name == "entropy_bounded":
        by_entropy, spent, taken = sorted(drawn, key=lambda p: (drawn[p][2], p)), 0.0, 0
        for p in by_entropy:
            spent += drawn[p][2]
            taken += spent < policy.entropy_bound
        return by_entropy[: max(1, taken)]
    return by_confidence[:count]


@torch.no_grad()
def block_diffusion_generate(
    model: Qwen, prompt: list[int], gen_length: int, block_length: int, policy: UnmaskPolicy, sampling: Sampling
) -> tuple[list[int], int]:
    """SDAR's loop with one masked forward over everything per step; returns the tokens and the denoising forwards."""
    num_blocks = math.ceil((len(prompt) + gen_length) / block_length)
    steps = policy.steps or block_length
    per_step = [block_length // steps + (i < block_length % steps) for i in range(steps)]
    if policy.name == "entropy_bounded":
        per_step *= block_length
    x, nfe = prompt + [MASK] * (num_blocks * block_length - len(prompt)), 0
    masked = set(range(len(prompt), len(x)))
    for b in range(len(prompt) // block_length, num_blocks):
        end = (b + 1) * block_length
        for count in per_step:
            open_positions = sorted(p for p in masked if p < end)
            if not open_positions:
                break
            rows = model(torch.tensor(x[:end]), visible=block_causal(end, block_length))[0].double().tolist()
            drawn = {p: sample(rows[p], p, len(open_positions), sampling) for p in open_positions}
            nfe += 1
            for p in chosen_positions(drawn, count, policy):
                x[p] = drawn[p][0]
                masked.remove(p)
    return x[len(prompt) :], nfe


POLICIES = {
    "sequential": UnmaskPolicy("sequential"),
    "sequential-3": UnmaskPolicy("sequential", steps=3),
    "static": UnmaskPolicy("static", confidence_dtype=torch.float64),
    "static-3": UnmaskPolicy("static", steps=3, confidence_dtype=torch.float64),
    "dynamic": UnmaskPolicy("dynamic", threshold=0.5, confidence_dtype=torch.float64),
    "dynamic-2": UnmaskPolicy("dynamic", steps=2, threshold=0.8, confidence_dtype=torch.float64),
    "entropy_bounded": UnmaskPolicy("entropy_bounded", entropy_bound=1.5, confidence_dtype=torch.float64),
}
SAMPLINGS = {
    "greedy": Sampling(**NO_MASK),
    "sampled": Sampling(temperature=0.6, top_k=5, seed=9, **NO_MASK),
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_equals_block_diffusion_generate(sdar, policy, sampling):
    for prompt_len, gen_length, block_length in ((7, 9, 4), (6, 4, 4), (4, 8, 4), (1, 5, 8), (7, 3, 2)):
        if policy.steps and (policy.steps > block_length or (policy.name == "dynamic" and block_length % policy.steps)):
            continue
        prompt = PROMPT[:prompt_len]
        lengths = {"gen_length": gen_length, "block_length": block_length}
        generated = generate(sdar, torch.tensor(prompt), policy=policy, sampling=sampling, **lengths)
        expected = block_diffusion_generate(sdar, prompt, policy=policy, sampling=sampling, **lengths)
        assert (generated.tokens.tolist(), generated.nfe) == expected
        assert torch.equal(generated.history[-1], generated.tokens)
        assert (generated.nfe, generated.nfe_refresh) == (len(generated.history), 0)
        num_blocks = math.ceil((prompt_len + gen_length) / block_length) - prompt_len // block_length
        assert generated.nfe_commit == num_blocks - 1


def test_the_prompts_end_takes_part_in_the_first_block(sdar):
    """Positions of the partial block are neither decoded nor counted: five masks of eight, two blocks."""
    prompt = torch.tensor(PROMPT[:3])
    policy = UnmaskPolicy("static", steps=2)
    generated = generate(sdar, prompt, gen_length=6, block_length=8, policy=policy, sampling=Sampling(**NO_MASK))
    assert len(generated.tokens) == 13
    unmasked = [(region != MASK).sum().item() for region in generated.history]
    assert unmasked == [4, 5, 9, 13]


def test_an_end_token_ends_with_the_step_that_makes_it_certain(sdar):
    prompt, lengths = torch.tensor(PROMPT), {"gen_length": 12, "block_length": 4}
    whole = generate(sdar, prompt, sampling=Sampling(**NO_MASK), **lengths)
    assert len(whole.tokens) == 13  # a partial block of three leaves one position of the first block
    stop = whole.tokens[2].item()
    assert stop not in whole.tokens[:1]
    stopped = generate(sdar, prompt, sampling=Sampling(**NO_MASK), ends=Ends((stop, 99)), **lengths)
    assert torch.equal(stopped.tokens[:3], whole.tokens[:3])
    is_certain = [(region[:3] != MASK).all() for region in whole.history]
    assert stopped.nfe == 1 + is_certain.index(True)
    assert (stopped.nfe_commit, stopped.history.shape[1]) == (1, 5)


@pytest.mark.parametrize(
    ("confidence", "scheduled", "count"),
    [([0.9, 0.85, 0.2], 1, 1), ([0.9, 0.86, 0.2], 1, 2), ([0.9, 0.86, 0.2], 3, 3), ([0.1, 0.1], 1, 1)],
)
def test_dynamic_is_strict_and_takes_the_schedules_share(confidence, scheduled, count):
    assert dynamic_count(torch.tensor(confidence, dtype=torch.float64), 0.85, scheduled) == count


@pytest.mark.parametrize(
    ("entropy", "count"),
    [([0.1, 0.1, 0.1], 3), ([0.125, 0.125, 0.125], 2), ([0.25, 0.125], 1), ([2.0, 3.0], 1), ([0.0, 0.0, 0.5], 2)],
)
def test_entropies_add_up_below_the_bound(entropy, count):
    """The second and third of these reach 0.375 exactly, which is not below."""
    assert entropy_bounded_count(torch.tensor(entropy, dtype=torch.float64), 0.375) == count


def test_dynamic_needs_steps_that_divide():
    with pytest.raises(ValueError, match="steps is 3 for blocks of 4 under policy 'dynamic'"):
        Block(0, 4, 4, 3, UnmaskPolicy("dynamic", steps=3), Sampling(), SDAR, eos_id=1)
