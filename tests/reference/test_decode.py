"""The reference loop against a scalar one, its caches against the forwards they abbreviate."""

import pytest
import torch

from vllm_dllm.noise import STREAM, stream_keys, uniform
from vllm_dllm.reference.decode import KvPolicy, generate
from vllm_dllm.reference.model import LLaDA
from vllm_dllm.reference.policy import UnmaskPolicy
from vllm_dllm.reference.sampling import Sampling

MASK = 3
PROMPT = torch.tensor([7, 11, MASK, 19, 30])  # holds the mask token, which is an ordinary token there
LENGTHS = {"gen_length": 12, "block_length": 4}


def scalar_llada(model: LLaDA, prompt: list[int], steps: int, gen_length: int, block_length: int) -> list[int]:
    """LLaDA's loop in scalars, without an early exit; temperature 0."""
    sequence = prompt + [MASK] * gen_length
    masked = set(range(len(prompt), len(sequence)))
    num_blocks = gen_length // block_length
    per_block = steps // num_blocks
    for b in range(num_blocks):
        end = len(prompt) + (b + 1) * block_length
        for i in range(per_block):
            count = block_length // per_block + (1 if i < block_length % per_block else 0)
            probs = model(torch.tensor(sequence))[0].softmax(-1).tolist()
            best = {p: max(probs[p]) for p in masked if p < end}
            for p in sorted(best, key=lambda p: (-best[p], p))[:count]:
                sequence[p] = probs[p].index(best[p])
                masked.remove(p)
    return sequence[len(prompt) :]


@pytest.mark.parametrize("steps", [3, 6, 9, 12, 24])
def test_static_equals_scalar_loop(model, steps):
    generated = generate(model, PROMPT, **LENGTHS, policy=UnmaskPolicy(steps=steps))
    with torch.no_grad():
        assert generated.tokens.tolist() == scalar_llada(model, PROMPT.tolist(), steps, 12, 4)
    assert generated.nfe == generated.nfe_refresh == len(generated.history) == min(steps, 12)
    assert torch.equal(generated.history[-1], generated.tokens)


@pytest.mark.parametrize("policy", [UnmaskPolicy(), UnmaskPolicy("threshold", threshold=0.3), UnmaskPolicy("factor")])
def test_refresh_at_every_step_is_no_cache(model, policy):
    plain = generate(model, PROMPT, **LENGTHS, policy=policy)
    for name in ("prefix", "dual"):
        refreshed = generate(model, PROMPT, **LENGTHS, policy=policy, kv=KvPolicy(name, refresh_every=1))
        assert torch.equal(refreshed.history, plain.history)
        assert refreshed.nfe_refresh == refreshed.nfe == plain.nfe


@pytest.mark.parametrize(
    ("kv", "num_refreshes"),
    [
        (KvPolicy("dual"), 3),
        (KvPolicy("prefix"), 3),
        (KvPolicy("dual", refresh_every=2), 6),
        (KvPolicy("dual", refresh_every=3), 6),
        (KvPolicy("dual", refresh_every=4), 3),
    ],
)
def test_refreshes_are_counted(model, kv, num_refreshes):
    generated = generate(model, PROMPT, **LENGTHS, kv=kv)
    assert (generated.nfe, generated.nfe_refresh) == (12, num_refreshes)


def test_cached_steps_see_the_refreshed_sequence(model):
    """A block decoded in two steps: the second one reads the keys and values of the first, all masks, outside it."""
    lengths = {"gen_length": 8, "block_length": 4}
    generated = generate(model, PROMPT, **lengths, kv=KvPolicy("dual"), policy=UnmaskPolicy(steps=4))
    begin, end = len(PROMPT), len(PROMPT) + 4
    masks = torch.full((8,), MASK)
    with torch.no_grad():
        _, kv = model(torch.cat((PROMPT, masks)))
        after_first = generated.history[0]
        logits, _ = model(after_first[:4], begin, kv)
    best = logits.argmax(-1)
    is_masked = after_first[:4] == MASK
    assert is_masked.sum() == 2
    assert torch.equal(generated.history[1][:4], torch.where(is_masked, best, after_first[:4]))
    assert generated.history[1][4:].tolist() == [MASK] * (end - begin)


def test_prefix_and_dual_agree_in_the_last_block(model):
    """Nothing lies behind the last block, so both policies compute the same there."""
    lengths = {"gen_length": 8, "block_length": 8}
    runs = [generate(model, PROMPT, **lengths, kv=KvPolicy(name)) for name in ("prefix", "dual")]
    assert torch.equal(runs[0].history, runs[1].history)


def test_masks_of_the_prompt_stay(model):
    """The prompt's mask token is neither decoded nor counted, and it is an ordinary input."""
    generated = generate(model, PROMPT, **LENGTHS, sampling=Sampling(forbidden_ids=(MASK,)))
    assert MASK not in generated.tokens
    assert len(generated.history) == 12
    with torch.no_grad():
        sequence = torch.cat((PROMPT, torch.full((12,), MASK)))
        logits = model(sequence)[0][len(PROMPT) : len(PROMPT) + 4].index_fill(-1, torch.tensor([MASK]), -torch.inf)
    position = logits.softmax(-1).max(-1).values.argmax()
    assert generated.history[0][position] == logits[position].argmax()


@pytest.mark.parametrize("kv", [KvPolicy(), KvPolicy("prefix"), KvPolicy("dual")], ids=lambda kv: kv.name)
def test_random_policy_follows_the_noise(model, kv):
    """The confidence of a position is its stream's own number, drawn for the masks left in the block."""
    sampling = Sampling(seed=5, forbidden_ids=(MASK,))  # so that a mask in the history is an undecoded position
    history = generate(model, PROMPT, **LENGTHS, kv=kv, policy=UnmaskPolicy("random"), sampling=sampling).history
    before = torch.full((12,), MASK)
    for step, region in enumerate(history):
        begin, num_masked = step // 4 * 4, 4 - step % 4
        positions = len(PROMPT) + torch.arange(begin, begin + 4)
        keys = stream_keys(torch.tensor(5), positions, torch.tensor(num_masked))
        drawn = uniform(keys, torch.tensor(STREAM)).masked_fill(before[begin : begin + 4] != MASK, -1)
        assert (before != region).nonzero().flatten().tolist() == [begin + int(drawn.argmax())]
        before = region


def test_seed_decides_the_tokens(model):
    runs = [
        generate(model, PROMPT, **LENGTHS, sampling=Sampling(temperature=2.0, seed=seed)).tokens.tolist()
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_guidance_masks_the_prompt(model):
    """One step over one block: guided logits = u + (scale + 1) (c - u), two forwards."""
    generated = generate(
        model, PROMPT, gen_length=4, block_length=4, policy=UnmaskPolicy(steps=1), sampling=Sampling(cfg_scale=1.5)
    )
    with torch.no_grad():
        guided, _ = model(torch.cat((PROMPT, torch.full((4,), MASK))))
        unguided, _ = model(torch.full((9,), MASK))
    expected = (unguided + 2.5 * (guided - unguided))[len(PROMPT) :].argmax(-1)
    assert torch.equal(generated.tokens, expected)
    assert (generated.nfe, generated.nfe_refresh) == (2, 2)
    assert not torch.equal(expected, guided[len(PROMPT) :].argmax(-1))


def test_guidance_keeps_keys_and_values_of_both_sequences(model):
    """The second of two steps over a block: each sequence reads its own keys and values of the first."""
    policy, sampling = UnmaskPolicy(steps=4), Sampling(cfg_scale=1.5, forbidden_ids=(MASK,))
    generated = generate(
        model, PROMPT, gen_length=8, block_length=4, kv=KvPolicy("dual"), policy=policy, sampling=sampling
    )
    assert (generated.nfe, generated.nfe_refresh) == (8, 4)
    begin, first_canvas = len(PROMPT), generated.history[0][:4]
    with torch.no_grad():
        _, kv = model(torch.cat((PROMPT, torch.full((8,), MASK))))
        _, unguided_kv = model(torch.full((begin + 8,), MASK))
        guided, _ = model(first_canvas, begin, kv)
        unguided, _ = model(first_canvas, begin, unguided_kv)
    logits = unguided + 2.5 * (guided - unguided)
    logits[:, MASK] = -torch.inf
    expected = torch.where(first_canvas == MASK, logits.argmax(-1), first_canvas)
    assert torch.equal(generated.history[1][:4], expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: generate(m, PROMPT, gen_length=10, block_length=4),
            "gen_length is 10, no multiple of block_length 4",
        ),
        (lambda m: generate(m, PROMPT, **LENGTHS, policy=UnmaskPolicy(steps=4)), "steps is 4 for 3 blocks"),
        (lambda _: UnmaskPolicy("threshold", steps=4), "policy 'threshold' takes none"),
        (lambda _: UnmaskPolicy(confidence_eos_eot_inf=True), "needs eot_id"),
        (lambda _: KvPolicy("none", refresh_every=2), "refresh_every is 2 with KV policy 'none'"),
        (lambda _: KvPolicy("dual", refresh_every=0), "refresh_every is 0"),
    ],
)
def test_contradictions_are_refused(model, make, message):
    with pytest.raises(ValueError, match=message):
        make(model)
