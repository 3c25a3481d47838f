"""The reference decoders under Dream's rules against scalar loops with the published steps, and Dream's draws."""

import itertools
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from vllm_dllm.noise import STREAM, gumbel, stream_keys, uniform
from vllm_dllm.reference.decode import KvPolicy, generate
from vllm_dllm.reference.policy import DREAM, Block, Rules, UnmaskPolicy, timestep_counts, unmask
from vllm_dllm.reference.qwen import Qwen
from vllm_dllm.reference.sampling import Sampling, kept_tokens

MASK = 3
PROMPT = [7, 11, MASK, 19, 30]
EPS = 1e-3
ALGS = {"maskgit_plus": "static", "topk_margin": "margin", "entropy": "entropy"}
NO_MASK = {"forbidden_ids": (MASK,)}


def published_share(num_masked: int, step: int, steps: int) -> int:
    """Positions of a step; in float32 as published, the last step takes all."""
    times = torch.linspace(1, EPS, steps + 1)
    t, s = times[step], times[step + 1]
    return int(torch.tensor(num_masked) * (1 - s / t)) if step < steps - 1 else num_masked


class Choice:
    """What `sample_tokens` returns for one position, in scalars: a token and a confidence."""

    def __init__(self, logits: list[float], key: Tensor, alg: str, sampling: Sampling) -> None:
        logits = [-math.inf if v == MASK else x for v, x in enumerate(logits)]
        if sampling.temperature > 0:
            logits = [x / sampling.temperature for x in logits]
            logits = self.top_k(self.top_p(logits, sampling.top_p), sampling.top_k)
        total = sum(math.exp(x) for x in logits)
        probs = [math.exp(x) / total for x in logits]
        noise = gumbel(key, torch.arange(len(probs))).tolist() if sampling.temperature > 0 else [0.0] * len(probs)
        drawn = [math.log(p) + g if p > 0 else -math.inf for p, g in zip(probs, noise, strict=True)]
        self.token = max(range(len(probs)), key=lambda v: drawn[v])
        first, second = sorted(probs, reverse=True)[:2]
        self.confidence = {
            "maskgit_plus": probs[self.token],
            "topk_margin": first - second,
            "entropy": sum(p * math.log(p) for p in probs if p > 0),
        }[alg]

    def top_p(self, logits: list[float], top_p: float | None) -> list[float]:
        total, before, kept = sum(math.exp(x) for x in logits), 0.0, set()
        for v in sorted(range(len(logits)), key=lambda v: -logits[v]):
            if before <= (1.0 if top_p is None else top_p):
                kept.add(v)
            before += math.exp(logits[v]) / total
        return [x if v in kept else -math.inf for v, x in enumerate(logits)]

    def top_k(self, logits: list[float], top_k: int | None) -> list[float]:
        least = sorted(logits, reverse=True)[(top_k or len(logits)) - 1]
        return [x if x >= least else -math.inf for x in logits]


def choices(rows: Tensor, masked: list[int], first: int, alg: str, sampling: Sampling) -> dict[int, Choice]:
    """Choose for each masked position from shifted logits of the positions from `first` on."""
    keys = stream_keys(torch.tensor(sampling.seed), torch.tensor(masked), torch.tensor(len(masked)))
    return {p: Choice(rows[p - first].double().tolist(), keys[i], alg, sampling) for i, p in enumerate(masked)}


def best(chosen: dict[int, Choice], count: int) -> list[int]:
    return sorted(chosen, key=lambda p: (-chosen[p].confidence, p))[:count]


def shifted(rows: Tensor) -> Tensor:
    """The published shift: the first position of whatever was forwarded keeps its own row."""
    return torch.cat((rows[:1], rows[:-1]))


@torch.no_grad()
def diffusion_generate(model: Qwen, gen_length: int, steps: int, alg: str, sampling: Sampling) -> tuple[list[int], int]:
    """Dream's loop; returns the tokens and how many forwards unmasked something."""
    x = torch.tensor(PROMPT + [MASK] * gen_length)
    masked, nfe = list(range(len(PROMPT), len(x))), 0
    times = torch.linspace(1, EPS, steps + 1).tolist()
    for i in range(steps):
        if not masked:
            break
        chosen = choices(shifted(model(x)[0]), masked, 0, "maskgit_plus" if alg == "origin" else alg, sampling)
        if alg == "origin":
            drawn = {p: float(uniform(stream_keys(*map(torch.tensor, (sampling.seed, p, 0))), STREAM)) for p in masked}
            taken = [p for p in masked if i == steps - 1 or drawn[p] >= times[i + 1]]
        else:
            taken = best(chosen, published_share(len(masked), i, steps))
        for p in taken:
            x[p] = chosen[p].token
            masked.remove(p)
        nfe += bool(taken)
    return x[len(PROMPT) :].tolist(), nfe


SAMPLINGS = [
    Sampling(**NO_MASK),
    Sampling(temperature=0.7, seed=5, **NO_MASK),
    Sampling(temperature=1.3, seed=-4, top_p=0.8, top_k=6, top_p_first=True, **NO_MASK),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "filtered"])
@pytest.mark.parametrize("steps", [1, 4, 11, 17])
@pytest.mark.parametrize("alg", [*ALGS, "origin"])
def test_uncached_equals_diffusion_generate(dream, alg, steps, sampling):
    policy = UnmaskPolicy(ALGS.get(alg, alg), steps=steps, confidence_dtype=torch.float64)
    options = {"gen_length": 11, "block_length": 11, "policy": policy, "sampling": sampling, "rules": DREAM}
    generated = generate(dream, torch.tensor(PROMPT), **options)
    assert (generated.tokens.tolist(), generated.nfe) == diffusion_generate(dream, 11, steps, alg, sampling)
    refreshed = generate(dream, torch.tensor(PROMPT), kv=KvPolicy("dual", refresh_every=1), **options)
    assert torch.equal(refreshed.history, generated.history)


@torch.no_grad()
def block_generate(model: Qwen, kv_name: str, steps: int, threshold: float | None, sampling: Sampling) -> list[int]:
    """Fast-dLLM's Dream over three blocks of four; steps of each block, not used by the threshold."""
    x = torch.tensor(PROMPT + [MASK] * 12)
    for begin in range(len(PROMPT), len(x), 4):
        end = begin + 4
        masked = list(range(begin, end))
        rows, kv = model(x)
        x[begin] = choices(shifted(rows), masked, 0, "maskgit_plus", sampling)[begin].token
        masked.remove(begin)
        i = 1
        while masked:
            rows = shifted(model(x[begin : len(x) if kv_name == "prefix" else end], begin, kv)[0])
            chosen = choices(rows, masked, begin, "entropy" if threshold is None else "maskgit_plus", sampling)
            if threshold is None:
                taken = best(chosen, published_share(len(masked), i, steps) if i < steps else len(masked))
            else:
                ranked = best(chosen, len(masked))
                taken = [p for k, p in enumerate(ranked) if k == 0 or chosen[p].confidence >= threshold]
            for p in taken:
                x[p] = chosen[p].token
                masked.remove(p)
            i += 1
    return x[len(PROMPT) :].tolist()


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "filtered"])
@pytest.mark.parametrize(("steps", "threshold"), [(1, None), (3, None), (4, None), (7, None), (None, 0.1), (None, 0.9)])
@pytest.mark.parametrize("kv_name", ["dual", "prefix"])
def test_cached_equals_block_generate(dream, kv_name, steps, threshold, sampling):
    if threshold is None:
        policy = UnmaskPolicy("entropy", steps=3 * steps, confidence_dtype=torch.float64)
    else:
        policy = UnmaskPolicy("threshold", threshold=threshold, confidence_dtype=torch.float64)
    generated = generate(
        dream,
        torch.tensor(PROMPT),
        gen_length=12,
        block_length=4,
        kv=KvPolicy(kv_name),
        policy=policy,
        sampling=sampling,
        rules=DREAM,
    )
    assert generated.tokens.tolist() == block_generate(dream, kv_name, steps, threshold, sampling)
    first = generated.history[0]
    assert first[0] != MASK
    assert (first[1:] == MASK).all()


def test_a_spans_first_position_is_predicted_by_the_refresh(make_qwen):
    """Without Dream's first step alone, the row left of the block is needed, as the refresh saw it."""
    torch.manual_seed(1)  # a model that unmasks the block's first position last
    model, begin = make_qwen(architecture="DreamModel"), len(PROMPT)
    with torch.no_grad():
        refreshed = model(torch.tensor(PROMPT + [MASK] * 8))[0].index_fill(1, torch.tensor(MASK), -torch.inf)
    generated = generate(
        model,
        torch.tensor(PROMPT),
        gen_length=8,
        block_length=4,
        kv=KvPolicy("dual"),
        sampling=Sampling(**NO_MASK),
        rules=Rules(logit_shift=True),
    )
    left_context, own = refreshed[begin - 1].argmax(), refreshed[begin].argmax()
    assert left_context != own
    assert generated.history[:4, 0].tolist() == [MASK, MASK, MASK, left_context]


def test_rounding_moves_a_position_from_the_first_step_to_the_last():
    for num_positions, share in itertools.product((8, 32, 100, 256, 512), (1, 2, 4)):
        steps = num_positions // share
        counts = timestep_counts(steps * share, steps)
        assert counts == [share - 1, *[share] * (steps - 2), share + 1]


@pytest.mark.parametrize(
    ("length", "steps", "uncached", "cached"),
    [
        (8, 8, [1, 1, 1, 1, 1, 1, 2], [1, 1, 1, 1, 1, 1, 2]),
        (8, 4, [1, 2, 2, 3], [1, 2, 2, 3]),
        (8, 3, [2, 2, 4], [1, 3, 4]),
        (8, 1, [8], [1, 7]),
        (1, 1, [1], [1]),
        (4, 9, [1, 1, 2], [1, 1, 2]),
    ],
)
def test_counts_leave_out_steps_that_unmask_nothing(length, steps, uncached, cached):
    for is_first_alone, expected in ((False, uncached), (True, cached)):
        rules = replace(DREAM, unmasks_first_alone=is_first_alone)
        assert Block(0, length, length, steps, UnmaskPolicy(), Sampling(), rules, eos_id=1).counts == expected


def reveal_steps(seed: int, length: int, steps: int) -> list[int]:
    """Return the step in which `origin` unmasks each position, told by how many steps reveal nothing before."""
    rules = replace(DREAM, unmasks_first_alone=False)
    block = Block(0, length, length, steps, UnmaskPolicy("origin", steps=steps), Sampling(seed=seed), rules, eos_id=1)
    drawn = uniform(stream_keys(torch.tensor(seed), torch.arange(length), torch.tensor(0)), STREAM)
    times = torch.linspace(1, EPS, steps + 1)
    is_masked, revealed = torch.ones(length, dtype=torch.bool), [-1] * length
    while is_masked.any():
        chosen, _ = unmask(torch.zeros(length, 5), is_masked, first=0, block=block)
        last = float(drawn[chosen].min())
        for position in chosen.tolist():
            revealed[position] = next((i for i in range(steps - 1) if last >= times[i + 1]), steps - 1)
        is_masked[chosen] = False
    return revealed


def test_origin_reveals_as_independent_draws():
    """Chi-square of the steps of pairs of positions, 16 cells; 37.7 is the 99.9 % point of 15 degrees of freedom."""
    steps, num_seeds = 4, 700
    times = [1.0, *torch.linspace(1, EPS, steps + 1)[1:-1].tolist(), 0.0]
    chance = [t - s for t, s in pairwise(times)]  # the products of the published 1 - s / t
    counts: Counter[tuple[int, int]] = Counter()
    for seed in range(num_seeds):
        revealed = reveal_steps(seed, 6, steps)
        counts.update(zip(revealed[::2], revealed[1::2], strict=True))
    expected = {(i, j): 3 * num_seeds * chance[i] * chance[j] for i in range(steps) for j in range(steps)}
    assert sum((counts[cell] - expected[cell]) ** 2 / expected[cell] for cell in expected) < 37.7


def test_alg_temp_draws_without_replacement():
    """Chi-square of the two positions drawn of four against multinomial(softmax(score / a), 2)."""
    logits = torch.tensor([[3.0, 0.0, 0.0], [1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
    alg_temp, num_draws = 0.25, 2500
    weights = (logits.double().softmax(-1).amax(-1) / alg_temp).softmax(-1).tolist()
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    expected = {pair: num_draws * weights[pair[0]] * weights[pair[1]] / (1 - weights[pair[0]]) for pair in pairs}
    counts = dict.fromkeys(pairs, 0)
    policy = UnmaskPolicy("static", steps=2, alg_temp=alg_temp, confidence_dtype=torch.float64)
    for seed in range(num_draws):
        block = Block(0, 4, 4, 2, policy, Sampling(seed=seed), Rules(), eos_id=1)
        chosen, tokens = unmask(logits, torch.ones(4, dtype=torch.bool), first=0, block=block)
        assert torch.equal(tokens, logits.argmax(-1)[chosen])
        counts[tuple(chosen.tolist())] += 1
    # 31.3 is the 99.9 % point of 11 degrees of freedom: the order of the two is drawn too.
    assert sum((counts[pair] - expected[pair]) ** 2 / expected[pair] for pair in pairs) < 31.3


def test_order_of_the_filters():
    """0.5, 0.3, 0.1, 0.1: of the first two top_p keeps one, of all of them three."""
    logits = torch.tensor([[0.5, 0.3, 0.1, 0.1]], dtype=torch.float64).log()
    both = {"temperature": 1.0, "top_k": 2, "top_p": 0.6}
    assert kept_tokens(logits, Sampling(**both)).tolist() == [[True, False, False, False]]
    assert kept_tokens(logits, Sampling(**both, top_p_first=True)).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("confidence", ["model", "sampled"])
def test_confidence_is_of_the_named_distribution(confidence):
    """Filtered to one token each, both positions are certain; the model's own distribution prefers the second."""
    logits = torch.tensor([[2.0, 1.9, 0.0], [4.0, -2.0, -2.0]])
    sampling = Sampling(temperature=5.0, top_k=1)
    rules = Rules(confidence=confidence)
    for name in ("static", "margin", "entropy"):
        block = Block(0, 2, 2, 2, UnmaskPolicy(name), sampling, rules, eos_id=1)
        chosen, _ = unmask(logits, torch.ones(2, dtype=torch.bool), first=0, block=block)
        assert chosen.tolist() == [1 if confidence == "model" else 0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: UnmaskPolicy("threshold", alg_temp=0.1),
        lambda: UnmaskPolicy("entropy", alg_temp=-1.0),
        lambda: UnmaskPolicy("random", alg_temp=0.5),
    ],
)
def test_alg_temp_of_other_policies_is_refused(make):
    with pytest.raises(ValueError, match=r"alg_temp is .* with policy"):
        make()
