"""FreeCache, dKV-Cache and dInfer's vicinity refresh as loops of their own: what forwards compute and see."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.reference.test_spiffy import GRAPH
from vllm_dllm.reference import spiffy
from vllm_dllm.reference.decode import KvPolicy, Model, generate
from vllm_dllm.reference.policy import DREAM, LLADA, Rules, UnmaskPolicy
from vllm_dllm.reference.sampling import Sampling

MASK, B, NUM_BLOCKS = 3, 4, 3
PROMPT = torch.tensor([7, 11, MASK, 19, 30, 6, 8])
SAMPLING = Sampling(forbidden_ids=(MASK,))


class Cache:
    """Keys and values by position, and rows of a forward that sees them; `shift` rows predict one position on."""

    def __init__(self, model: Model, shift: int) -> None:
        self.model, self.shift = model, shift
        self.kept: list[tuple[Tensor, Tensor]] | None = None

    def rows(
        self, tokens: Tensor, first: int, last: int, *, stores: bool, stays: frozenset[int] = frozenset()
    ) -> dict[int, Tensor]:
        """Compute positions first..last - 1 but for some that stay; return the logits of each one that they predict."""
        kept = None if last - first == len(tokens) and not stays else self.kept
        of_span = torch.tensor([p in stays for p in range(first, last)]) if stays else None
        logits, kv = self.model.forward(tokens[first:last], first, kept, stays=of_span)
        if stores:
            self.kept = kv
        return {first + i + self.shift: row for i, row in enumerate(logits)}


def unmask_best(tokens: Tensor, rows: dict[int, Tensor], block: range) -> None:
    """Write the one most confident token of a block."""
    probs = {p: rows[p].double().index_fill(-1, torch.tensor([MASK]), -torch.inf).softmax(-1) for p in block}
    masked = [p for p in block if tokens[p] == MASK]
    best = max(masked, key=lambda p: (float(probs[p].max()), -p))
    tokens[best] = probs[best].argmax()


def freecache(model: Model, prompt: Tensor, shift: int) -> list[int]:
    """All once; then, block by block, what follows the tokens that were complete when the block before began."""
    tokens = torch.cat([prompt, torch.full((B * NUM_BLOCKS,), MASK)])
    cache = Cache(model, shift)
    frozen = 0  # positions whose keys and values are final
    for number in range(NUM_BLOCKS):
        begin = len(prompt) + number * B
        for step in range(B):
            rows = cache.rows(tokens, frozen, len(tokens), stores=step == 0)
            if step == 0:
                frozen = begin - shift
            unmask_best(tokens, rows, range(begin, begin + B))
    return tokens[len(prompt) :].tolist()


def vicinity(model: Model, prompt: Tensor, shift: int, before: int, behind: int, warmup: int) -> list[int]:
    """All when a block begins, and some steps of the first one; else the block with its neighbours."""
    tokens = torch.cat([prompt, torch.full((B * NUM_BLOCKS,), MASK)])
    cache = Cache(model, shift)
    for number in range(NUM_BLOCKS):
        begin = len(prompt) + number * B
        for step in range(B):
            takes_all = step <= (warmup if number == 0 else 0)
            first, last = (
                (0, len(tokens)) if takes_all else (max(0, begin - before), min(begin + B + behind, len(tokens)))
            )
            rows = cache.rows(tokens, first, last, stores=takes_all)
            unmask_best(tokens, rows, range(begin, begin + B))
    return tokens[len(prompt) :].tolist()


def dkv(model: Model, prompt: Tensor, shift: int, every: int, *, keeps_prompt: bool = False) -> list[int]:
    """All at some steps; else what was not known one step before, or with a shift what predicts that.

    All but the prompt, from the second step on, if that is kept: of it what predicts the prompt.
    """
    tokens = torch.cat([prompt, torch.full((B * NUM_BLOCKS,), MASK)])
    cache, end = Cache(model, shift), len(tokens)
    for number in range(NUM_BLOCKS):
        begin = len(prompt) + number * B
        known: list[set[int]] = []  # before each step
        for step in range(B):
            known.append({p for p in range(end) if p < begin or tokens[p] != MASK})
            takes_all = step % every == 0 or (step == 1 and not shift)
            stays = (
                frozenset() if takes_all else frozenset(p for p in range(end) if (p + shift) % end in known[step - 1])
            )
            first = len(prompt) - shift if keeps_prompt and (number, step) != (0, 0) else 0
            rows = cache.rows(tokens, first if takes_all else begin - shift, end, stores=True, stays=stays)
            unmask_best(tokens, rows, range(begin, begin + B))
    return tokens[len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["model", "dream"])
def test_positions_that_stay_are_read_as_they_are(request, family):
    """Those at a span's begin might as well be outside of it; those within are neither computed nor changed."""
    model = request.getfixturevalue(family)
    tokens = torch.arange(5, 25)
    with torch.no_grad():
        _, kept = model.forward(tokens.flip(0), 0, None)
        rows, kv = model.forward(tokens[6:], 6, kept, stays=torch.arange(14) < 4)
        fewer, fewer_kv = model.forward(tokens[10:], 10, kept)
        assert torch.allclose(rows[4:], fewer, atol=1e-5)
        for new, other in zip(kv, fewer_kv, strict=True):
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(new, other, strict=True))
        stays = torch.tensor([False, True] * 7)
        _, kv = model.forward(tokens[6:], 6, kept, stays=stays)
        for new, old in zip(kv, kept, strict=True):
            for a, b in zip(new, old, strict=True):
                is_same = (a == b).all(-1).all(0)
                assert is_same.tolist() == [True] * 6 + stays.tolist()


def plain(model: Model, prompt: Tensor, rules: Rules, kv: KvPolicy) -> list[int]:
    options = {"gen_length": B * NUM_BLOCKS, "block_length": B, "sampling": SAMPLING, "rules": rules}
    policy = UnmaskPolicy("static", confidence_dtype=torch.float64)
    return generate(model, prompt, kv=kv, policy=policy, **options).tokens.tolist()


ONE_A_STEP = Rules(logit_shift=True)  # Dream's shift with LLaDA's schedule


@pytest.mark.parametrize(("family", "rules"), [("model", LLADA), ("dream", ONE_A_STEP)])
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1]], ids=len)
@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(n, marks=pytest.mark.slow("cases")) for n in range(3, 10))])
def test_each_forward_is_what_the_description_says(request, family, rules, seed, prompt):
    torch.manual_seed(seed)
    model, shift = request.getfixturevalue(family), int(rules.logit_shift)
    with torch.no_grad():
        assert plain(model, prompt, rules, KvPolicy("freecache")) == freecache(model, prompt, shift)
        for every in (2, 3, 8):
            assert plain(model, prompt, rules, KvPolicy("dkv", refresh_every=every)) == dkv(model, prompt, shift, every)
            pd, expected = KvPolicy("dkv_pd", refresh_every=every), dkv(model, prompt, shift, every, keeps_prompt=True)
            assert plain(model, prompt, rules, pd) == expected
        for look in ((5, 3, 2), (2, 0, 0), (7, 16, 9)):
            names = ("prefix_look", "after_look", "warmup_steps")
            kv = KvPolicy("vicinity", **dict(zip(names, look, strict=True)))
            assert plain(model, prompt, rules, kv) == vicinity(model, prompt, shift, *look)


def test_the_policies_differ(model):
    """Else the cases above would say nothing of what is kept."""
    policies = ["none", "prefix", "dual", "freecache", "dkv", "dkv_pd", "vicinity"]
    looks = {"prefix_look": 2, "after_look": 2, "warmup_steps": 0}
    found = [plain(model, PROMPT, LLADA, KvPolicy(name, **looks if name == "vicinity" else {})) for name in policies]
    assert all(a != b for a, b in pairwise(found))


def test_a_vicinity_of_everything_is_no_cache(model):
    for policy in (UnmaskPolicy(), UnmaskPolicy("threshold", threshold=0.3)):
        options = {"gen_length": B * NUM_BLOCKS, "block_length": B, "sampling": SAMPLING, "policy": policy}
        kv = KvPolicy("vicinity", prefix_look=64, after_look=64)
        assert torch.equal(
            generate(model, PROMPT, kv=kv, **options).history, generate(model, PROMPT, **options).history
        )


@pytest.mark.parametrize(("family", "rules"), [("model", LLADA), ("dream", ONE_A_STEP), ("dream", DREAM)])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("name", ["freecache", "vicinity"])
def test_drafts_change_forwards_and_no_token(request, family, rules, temperature, name):
    """A draft is evaluated with what the decoder would compute beside it, and all else is frozen."""
    model = request.getfixturevalue(family)
    for layer, weight in model.named_parameters():
        if layer.endswith(("attn_out.weight", "o_proj.weight")):
            weight.data *= 0.1  # the less a position sees of the others, the more drafts come true
    looks = {"prefix_look": 3, "after_look": 2, "warmup_steps": 1} if name == "vicinity" else {}
    options = {
        "gen_length": B * NUM_BLOCKS,
        "block_length": B,
        "rules": rules,
        "policy": UnmaskPolicy("static", confidence_dtype=torch.float64),
        "sampling": Sampling(temperature=temperature, seed=3, forbidden_ids=(MASK,)),
        "kv": KvPolicy(name, **looks),
    }
    without = generate(model, PROMPT, **options)
    accepted = 0
    for budget in (0, 2, len(GRAPH)):
        found = spiffy.generate(model, PROMPT, graph=GRAPH, budget=budget, **options)
        assert torch.equal(found.tokens, without.tokens)
        assert found.nfe + found.num_accepted == without.nfe
        assert found.nfe_refresh == without.nfe_refresh
        accepted = max(accepted, found.num_accepted)
    assert accepted > 0
