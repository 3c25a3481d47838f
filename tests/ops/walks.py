"""Random calls of `decide_walk`, and comparisons of what comes of them."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from vllm_dllm.ops.vocab_stats import PartialStats
from vllm_dllm.unmask.memory import PolicyState
from vllm_dllm.unmask.policy import POLICIES, POLICY_IDS, PolicyParams, new_state
from vllm_dllm.unmask.schedule import UnmaskRules, count_table, reveal_times
from vllm_dllm.unmask.walk import Nodes, Trajectory, walk

Call = tuple[Nodes, PartialStats, PolicyParams, PolicyState]

MASK, VOCAB = 999, 16
PLAIN = UnmaskRules()


def random_stats(num_rows: int, generator: torch.Generator, *, is_sampled: bool) -> tuple[PartialStats, Tensor]:
    """Draw rows of a vocabulary of 16, and all their logits; the drawn token is one of the first candidates."""
    logits = (3 * torch.randn(num_rows, VOCAB, generator=generator)).sort(1, descending=True).values
    below = (logits - logits[:, :1]).double()

    def sums(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, 1:].exp().sum(1), (x * x.exp())[:, 1:].sum(1)

    place = torch.randint(0, 3, (num_rows, 1), generator=generator)
    ids = torch.rand(num_rows, VOCAB, generator=generator).argsort(1)
    stats = PartialStats(
        ids[:, :4].contiguous(),
        logits[:, :4].contiguous(),
        *sums(below),
        ids.gather(1, place)[:, 0],
        logits.gather(1, place)[:, 0],
        torch.zeros(num_rows, dtype=torch.float64),
        *(sums(below / 0.7) if is_sampled else (None, None)),
    )
    return stats, torch.zeros_like(logits).scatter_(1, ids, logits)


def random_state(num_reqs: int, block_length: int, generator: torch.Generator) -> PolicyState:
    """Draw what requests remember; some credit nothing, or as much as they can."""
    state = new_state(num_reqs, block_length, torch.device("cpu"))
    shape = state["credit_ids"].shape
    is_there = (
        torch.rand(shape, generator=generator) < torch.tensor([0.0, 0.3, 1.0]).repeat(num_reqs)[:num_reqs, None, None]
    )
    ids = torch.rand(*shape[:2], VOCAB, generator=generator).argsort(2)[..., : shape[2]]
    credits = torch.rand(shape, generator=generator, dtype=torch.float64)
    return {"credit_ids": torch.where(is_there, ids, -1), "credits": torch.where(is_there, credits, 0.0)}


def logits_of(logits: Tensor, state: PolicyState) -> Tensor:
    """Look up what the head would give of rows [num_reqs * num_nodes * block_length, VOCAB] for the ids in a state."""
    ids = state["credit_ids"]
    own = ids[:, None].expand(-1, len(logits) // (len(ids) * ids.shape[1]), -1, -1).reshape(len(logits), -1)
    return torch.where(own < 0, -torch.inf, logits.gather(1, own.clamp(min=0)))


def random_params(num_reqs: int, block_length: int, generator: torch.Generator) -> PolicyParams:
    """Draw policies; requests of each policy in turn, some of which draw positions."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(num_reqs, generator=generator, dtype=torch.float64)

    def whole(high: int) -> Tensor:
        return torch.randint(0, high, (num_reqs,), generator=generator)

    number = whole(10) if num_reqs < 10 else torch.arange(num_reqs)
    steps = (1 + whole(block_length)).tolist()
    start = 8 * whole(5)
    draws = (number % len(POLICIES) <= POLICY_IDS["entropy"]) & (number % 3 == 0)
    return PolicyParams(
        policy_id=number % len(POLICIES),
        seed=whole(2**40),
        prompt_len=start + whole(2) - 1,
        start=start,
        threshold=uniform(0.3, 1),
        factor=uniform(0.2, 2),
        entropy_bound=uniform(0.1, 2),
        credit_alpha=uniform(0.1, 3),
        credit_beta=uniform(0, 1),
        credit_gamma=uniform(0.1, 1),
        alg_temp=torch.where(draws, uniform(0.1, 1), 0.0),
        temperature=torch.where(number % 2 == 0, 0.7, 0.0).double(),
        counts=torch.tensor([count_table(UnmaskRules(), block_length, n) for n in steps])
        .view(num_reqs, -1)
        .T.contiguous(),
        times=torch.tensor([reveal_times(block_length, n) for n in steps], dtype=torch.float64)
        .view(num_reqs, -1)
        .T.contiguous(),
        policies=tuple(POLICIES),
        has_alg_temp=True,
    )


def random_call(
    num_reqs: int,
    num_nodes: int,
    block_length: int,
    seed: int,
    *,
    is_sampled: bool = False,
    looks_ahead: bool = False,
    rules: UnmaskRules = PLAIN,
) -> Call:
    """Draw roots, and drafts most of which come true: each is what the twin makes of an earlier node."""
    generator = torch.Generator().manual_seed(seed)
    params = random_params(num_reqs, block_length, generator)
    stats, logits = random_stats(num_reqs * num_nodes * block_length, generator, is_sampled=is_sampled)
    root_state = state = random_state(num_reqs, block_length, generator)
    stats = replace(stats, given_logits=logits_of(logits, state))
    is_masked = torch.rand(num_reqs, block_length, generator=generator) < 0.8
    is_masked[::7] = num_reqs == 1
    canvas = torch.randint(0, 16, (num_reqs, num_nodes, block_length), generator=generator)
    canvas[:, 0].masked_fill_(is_masked, MASK)
    num_drafts = num_nodes - 1 - looks_ahead  # of a look-ahead the last node is the next root
    order = torch.stack([torch.randperm(num_drafts, generator=generator) for _ in range(num_reqs)]) + 1
    request, before = torch.arange(num_reqs), torch.zeros(num_reqs, dtype=torch.int64)
    for node in order.T:
        canvas[request, node], state = next_of(canvas, stats, logits, params, before, state, rules)
        before = node
    is_valid = torch.rand(num_reqs, num_nodes, generator=generator) < 0.9
    end = None
    if looks_ahead:
        canvas[:, -1] = MASK
        end, _ = next_of(canvas, stats, logits, params, before, state, rules)
        end[::5] += 1
    return Nodes(canvas, canvas == MASK, is_valid, torch.zeros_like(is_valid).long(), end), stats, params, root_state


def next_of(
    canvas: Tensor,
    stats: PartialStats,
    logits: Tensor,
    params: PolicyParams,
    node: Tensor,
    state: PolicyState,
    rules: UnmaskRules = PLAIN,
) -> tuple[Tensor, PolicyState]:
    """Decide one node of each request, without a walk, knowing all logits."""
    request, block_length = torch.arange(len(canvas)), canvas.shape[2]
    root = canvas[request, node][:, None]
    row = (request * canvas.shape[1] + node)[:, None] * block_length + torch.arange(block_length)
    rows = PartialStats.of(lambda column: column[row.flatten()], stats)
    rows = replace(rows, given_logits=logits_of(logits[row.flatten()], state))
    alone = torch.ones_like(root[..., 0], dtype=torch.bool)
    done = walk(Nodes(root, root == MASK, alone, alone.long()), rows, params, MASK, rules, state)
    return done.canvas, done.state


def columns(done: Trajectory) -> dict[str, Tensor]:
    found = {field.name: its for field in fields(done) if isinstance(its := getattr(done, field.name), Tensor)}
    return found | {"ids": done.candidates.token_ids, "log_probs": done.candidates.log_probs} | done.state


def to(where: str, value: Any) -> Any:
    """Move all tensors of a value."""
    moved = {f.name: v.to(where) for f in fields(value) if isinstance(v := getattr(value, f.name), Tensor)}
    return replace(value, **moved)
