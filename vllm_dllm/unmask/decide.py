"""What policies make of one node of each request, in tensor code: the step that the walk repeats."""

from dataclasses import dataclass, fields, replace
from operator import itemgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_dllm.ops.vocab_stats import Distribution, PartialStats
from vllm_dllm.unmask.memory import PolicyState, Shown, select
from vllm_dllm.unmask.policy import MEMORIES, Evidence, PolicyParams, choose_positions, score_positions
from vllm_dllm.unmask.registry import is_users, torch_policy
from vllm_dllm.unmask.schedule import UnmaskRules
from vllm_dllm.unmask.stats import Candidates, candidates_of
from vllm_dllm.unmask.torch_policy import STEP, Decision, PolicyFault, Seen, TorchPolicy, decide

if TYPE_CHECKING:
    from vllm_dllm.unmask.walk import Keep, Nodes


@dataclass(frozen=True, slots=True)
class Ground:
    """What is walked on."""

    nodes: "Nodes"
    stats: PartialStats
    params: PolicyParams
    rules: UnmaskRules
    mask_token_id: int
    asked: Tensor | None  # [num_reqs, block_length, num_given] int64, what the given logits are of
    keep: "Keep | None"


@dataclass(frozen=True, slots=True)
class Decided:
    """What became of one node of each request."""

    canvas: Tensor  # [num_reqs, block_length] int64
    state: PolicyState
    is_done: Tensor  # [num_reqs] bool, whether the policy has nothing more to do in the block


def decide_nodes(ground: Ground, node: Tensor, params: PolicyParams, state: PolicyState, counts: Tensor) -> Decided:
    """Apply the requests' policies to one node of each.

    Args:
        ground: what is walked on.
        node: [num_reqs] int64.
        params: of the requests, in the node's block.
        state: of their policies, before.
        counts: [num_reqs] bool, of whom anybody reads what is made. A user's policy is shown those alone: what it finds
            amiss of a canvas that it has decided already, or of one that does not come true, is nobody's fault.
    """
    if params.own is not None:
        return _decide_in_torch(ground, node, params, state, counts)
    (canvas, is_masked), rows = ground.nodes.at(node), rows_of(ground, node)
    token_ids, distribution = rows.token_ids, rows.distribution(_divisor(params, canvas.shape[1]))
    for policy_id, memory in MEMORIES.items() if state else ():
        recalled = memory.recall(_shown(ground, node), params, state)
        is_its = params.policy_id == policy_id
        state = select(is_its, recalled.state, state)
        is_its = is_its.repeat_interleave(canvas.shape[1])
        token_ids = torch.where(is_its, recalled.token_ids, token_ids)
        distribution = recalled.distribution.where(is_its, distribution)
    score = score_positions(Evidence(distribution, is_masked), params)
    chosen = choose_positions(score, is_masked, params, ground.rules.open(is_masked))
    if ground.keep is not None:
        chosen = ground.keep(node, chosen, score, token_ids.view_as(canvas))
    canvas = torch.where(chosen, token_ids.view_as(canvas), canvas)
    return Decided(canvas, state, (canvas != ground.mask_token_id).all(1))


def is_decidable(ground: Ground, node: Tensor, state: PolicyState) -> Tensor:
    """Tell whether the policies know all of one node of each request that they need; [num_reqs] bool."""
    decidable = torch.ones_like(node, dtype=torch.bool)
    unwritten = None if ground.params.own is None else torch_policy(ground.params.own.name).unwritten
    if unwritten is not None:
        decidable = (node == 0) | unwritten.knows(ground.nodes.at(node)[0], state)
    for policy_id, memory in MEMORIES.items() if state and ground.params.own is None else ():
        decidable &= memory.knows(_shown(ground, node), state) | (ground.params.policy_id != policy_id)
    return decidable


def candidates_at(ground: Ground, node: Tensor) -> Candidates:
    """Return the candidates of one node of each request; [num_reqs, block_length, num_candidates]."""
    num_reqs, _, block_length = ground.nodes.canvas.shape
    return candidates_of(rows_of(ground, node)).view(num_reqs, block_length)


def rows_of(ground: Ground, node: Tensor) -> PartialStats:
    """Take the rows of one node of each request; [num_reqs * block_length]."""
    num_reqs, num_nodes, block_length = ground.nodes.canvas.shape
    request = torch.arange(num_reqs, device=node.device)
    row = (request * num_nodes + node)[:, None] * block_length + torch.arange(block_length, device=node.device)
    return PartialStats.of(lambda column: column[row.flatten()], ground.stats)


def _decide_in_torch(ground: Ground, node: Tensor, params: PolicyParams, state: PolicyState, counts: Tensor) -> Decided:
    """Do the same for requests that all have the same policy without a native twin."""
    assert params.own is not None, "the caller asked"
    (canvas, is_masked), rows = ground.nodes.at(node), rows_of(ground, node)
    seen = Seen(
        canvas=canvas,
        is_masked=is_masked,
        is_open=ground.rules.open(is_masked),
        rows=rows,
        distribution=rows.distribution(_divisor(params, canvas.shape[1])),
        step=state[STEP][:, 0, 0],
        params=params,
        rules=ground.rules,
        mask_token_id=ground.mask_token_id,
    )
    own = params.own
    policy = torch_policy(own.name)
    made = _of_users(policy, seen, state, counts) if is_users(own.name) else decide(policy, seen, state)
    assert made.is_done is not None, "decide says so"
    if ground.keep is None:
        return Decided(made.canvas, made.state, made.is_done)
    chosen = is_masked & (made.canvas != ground.mask_token_id)
    kept = ground.keep(node, chosen, seen.confidence, seen.token_ids)
    after = torch.where(chosen & ~kept, canvas, made.canvas)
    # Somebody else's constraint holds nothing back here: the policy alone says whether a full canvas is the last one.
    return Decided(after, made.state, made.is_done & (after == made.canvas).all(1))


def _of_users(policy: TorchPolicy, seen: Seen, state: PolicyState, counts: Tensor) -> Decision:
    """Have a user's policy decide the canvases that count, and leave the others. Raises: PolicyFault."""
    place = counts.nonzero().squeeze(1)  # the host waits here, as it does for the check
    if not len(place):
        return Decision(seen.canvas, state, counts)
    assert seen.params.own is not None, "the caller asked"
    before = {name: its[place] for name, its in state.items()}
    try:
        made = decide(policy, _some(seen, place), before, seen.params.own.vocab_size)
    except PolicyFault as fault:
        if fault.of is None:
            raise
        raise PolicyFault(
            str(fault), torch.zeros(len(counts), dtype=torch.bool).index_copy(0, place.cpu(), fault.of)
        ) from None
    assert made.is_done is not None, "decide says so"
    return Decision(
        seen.canvas.index_copy(0, place, made.canvas),
        {name: its.index_copy(0, place, made.state[name]) for name, its in state.items()},
        counts.index_copy(0, place, made.is_done),
    )


def _some(seen: Seen, place: Tensor) -> Seen:
    """Return what some canvases [num_some] int64 show."""
    length = seen.canvas.shape[1]
    row = (place[:, None] * length + torch.arange(length, device=place.device)).flatten()
    return replace(
        seen,
        canvas=seen.canvas[place],
        is_masked=seen.is_masked[place],
        is_open=seen.is_open[place],
        rows=PartialStats.of(itemgetter(row), seen.rows),
        distribution=Distribution(*(getattr(seen.distribution, each.name)[row] for each in fields(Distribution))),
        step=seen.step[place],
        params=seen.params.of(place),
    )


def _divisor(params: PolicyParams, block_length: int) -> Tensor:
    return torch.where(params.temperature > 0, params.temperature, 1.0).repeat_interleave(block_length)


def _shown(ground: Ground, node: Tensor) -> Shown:
    assert ground.asked is not None, "a memory asks"
    _, is_masked = ground.nodes.at(node)
    return Shown(rows_of(ground, node), ground.asked, is_masked, ground.rules.open(is_masked))
