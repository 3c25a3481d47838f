"""FreeCache and dInfer's vicinity refresh as loops of their own: what each forward computes, and what it sees."""

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

    def rows(self, tokens: Tensor, first: int, last: int, *, stores: bool) -> dict[int, Tensor]:
        """Compute positions first..last - 1; return the logits of each position that they predict."""
        logits, kv = self.model.forward(tokens[first:last], first, self.kept if last - first < len(tokens) else None)
        if stores:
            self.kept = kv
        return {first + i + self.shift: row for i, row in enumerate(logits)}


def unmask_best(tokens: Tensor, rows: dict[int, Tensor], block: range) -> None:
    """Write the one most confident token of a block."""
    probs = {p: rows[p].double().index_fill(-1, torch.tensor([MASK]), -torch.inf).softmax(-1) for p in block}
    masked = [p for p in block if tokens[p] == MASK]
    best = max(masked, key=lambda p: (float(probs[p].max()), -p))
    tokens[best] = probs[best].argmax()


def freecache(model: Model, shift: int) -> list[int]:
    """All once; then, block by block, what follows the tokens that were complete when the block before began."""
    tokens = torch.cat([PROMPT, torch.full((B * NUM_BLOCKS,), MASK)])
    cache = Cache(model, shift)
    frozen = 0  # positions whose keys and values are final
    for number in range(NUM_BLOCKS):
        begin = len(PROMPT) + number * B
        for step in range(B):
            rows = cache.rows(tokens, frozen, len(tokens), stores=step == 0)
            if step == 0:
                frozen = begin - shift
            unmask_best(tokens, rows, range(begin, begin + B))
    return tokens[len(PROMPT) :].tolist()


def vicinity(model: Model, shift: int, before: int, behind: int, warmup: int) -> list[int]:
    """All when a block begins, and some steps of the first one; else the block with its neighbours."""
    tokens = torch.cat([PROMPT, torch.full((B * NUM_BLOCKS,), MASK)])
    cache = Cache(model, shift)
    for number in range(NUM_BLOCKS):
        begin = len(PROMPT) + number * B
        for step in range(B):
            takes_all = step <= (warmup if number == 0 else 0)
            first, last = (0, len(tokens)) if takes_all else (begin - before, min(begin + B + behind, len(tokens)))
            rows = cache.rows(tokens, first, last, stores=takes_all)
            unmask_best(tokens, rows, range(begin, begin + B))
    return tokens[len(PROMPT) :].tolist()


def plain(model: Model, rules: Rules, kv: KvPolicy) -> list[int]:
    options = {"gen_length": B * NUM_BLOCKS, "block_length": B, "sampling": SAMPLING, "rules": rules}
    policy = UnmaskPolicy("static", confidence_dtype=torch.float64)
    return generate(model, PROMPT, kv=kv, policy=policy, **options).tokens.tolist()


ONE_A_STEP = Rules(logit_shift=True)  # Dream's shift with LLaDA's schedule


@pytest.mark.parametrize(("family", "rules"), [("model", LLADA), ("dream", ONE_A_STEP)])
@pytest.mark.parametrize("seed", range(20))
def test_each_forward_is_what_the_description_says(request, family, rules, seed):
    torch.manual_seed(seed)
    model, shift = request.getfixturevalue(family), int(rules.logit_shift)
    with torch.no_grad():
        assert plain(model, rules, KvPolicy("freecache")) == freecache(model, shift)
        for look in ((5, 3, 2), (2, 0, 0), (7, 16, 9)):
            names = ("prefix_look", "after_look", "warmup_steps")
            kv = KvPolicy("vicinity", **dict(zip(names, look, strict=True)))
            assert plain(model, rules, kv) == vicinity(model, shift, *look)


def test_the_policies_differ(model):
    """Else the cases above would say nothing of what is kept."""
    policies = ["none", "prefix", "dual", "freecache", "vicinity"]
    looks = {"prefix_look": 2, "after_look": 2, "warmup_steps": 0}
    found = [plain(model, LLADA, KvPolicy(name, **looks if name == "vicinity" else {})) for name in policies]
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
