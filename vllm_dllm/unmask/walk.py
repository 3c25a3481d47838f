"""From the root on: decide the next canvas, go to the node that has it, and repeat.

Spiffy (arXiv:2509.18085v4) sec. 4.1, Algorithm 1, with equality of the whole canvas in place of the graph's edges: it
accepts all that the edges do, whatever number of positions a step unmasks. Only canvases that came true are decided,
each with what its policy remembers of the ones before; a canvas of whose rows the policy lacks a logit is left to the
next step.
`walk` states it in tensor code; the op `decide_walk` does the same in one launch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_dllm import ops
from vllm_dllm.constraint.step import ConstrainedStep
from vllm_dllm.ops.vocab_stats import PartialStats
from vllm_dllm.state.report import Failed
from vllm_dllm.unmask.decide import Decided, Ground, candidates_at, decide_nodes, is_decidable
from vllm_dllm.unmask.memory import PolicyState, select
from vllm_dllm.unmask.policy import PolicyParams, asked_ids, new_state
from vllm_dllm.unmask.registry import changes_tokens, torch_policy
from vllm_dllm.unmask.schedule import UnmaskRules
from vllm_dllm.unmask.stats import Candidates


@dataclass(frozen=True, slots=True)
class Nodes:
    """The canvases that a step evaluates; node 0 is the root, the request's true canvas."""

    canvas: Tensor  # [num_reqs, num_nodes, block_length] int64
    is_masked: Tensor  # [num_reqs, num_nodes, block_length] bool
    is_valid: Tensor  # [num_reqs, num_nodes] bool, False for drafts that mean nothing
    depth: Tensor  # [num_reqs, num_nodes] int64, in the draft graph
    # [num_reqs, block_length] int64 with a look-ahead: its end. Its next root is the last node then.
    end: Tensor | None = None
    # Where not all nodes of all requests are evaluated: [num_reqs, num_nodes] int64, the place of each among those that
    # are, -1 for the others, which are not valid; and [num_evaluated] int64, the other way round.
    evaluated: Tensor | None = None
    place: Tensor | None = None

    # Canvases of requests under a constraint, on the host; None: no request has one.
    constrained: ConstrainedStep | None = None

    @classmethod
    def of_roots(cls, canvas: Tensor, mask_token_id: int) -> "Nodes":
        """Return the true canvases [num_reqs, block_length] alone."""
        one = torch.ones_like(canvas[:, :1])
        return cls(canvas[:, None], (canvas == mask_token_id)[:, None], one.bool(), one - 1)

    def with_drafts(self, canvas: Tensor, is_valid: Tensor, depth: Tensor, mask_token_id: int) -> "Nodes":
        """Return these roots with drafts behind them; arguments as the fields, without the roots."""
        canvas = torch.cat([self.canvas, canvas], 1)
        is_valid, depth = torch.cat([self.is_valid, is_valid], 1), torch.cat([self.depth, depth], 1)
        return replace(self, canvas=canvas, is_masked=canvas == mask_token_id, is_valid=is_valid, depth=depth)

    def with_look_ahead(self, end: Tensor, is_valid: Tensor, mask_token_id: int) -> "Nodes":
        """Return these nodes with a look-ahead.

        Args:
            end: [num_reqs, block_length] int64.
            is_valid: [num_reqs] bool, whether it may come true.
            mask_token_id: what the next root consists of.
        """
        next_root = torch.full_like(self.canvas[:, :1], mask_token_id)
        return replace(
            self,
            canvas=torch.cat([self.canvas, next_root], 1),
            is_masked=pad(self.is_masked, (0, 0, 0, 1), value=True),
            is_valid=torch.cat([self.is_valid, is_valid[:, None]], 1),
            depth=torch.cat([self.depth, self.is_masked[:, 0].sum(1, keepdim=True)], 1),
            end=end,
        )

    def only(self, evaluated: Tensor, place: Tensor) -> "Nodes":
        """Return these nodes where not all are evaluated; arguments as the fields."""
        return replace(self, is_valid=self.is_valid & (evaluated >= 0), evaluated=evaluated, place=place)

    def at(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """Return the canvas of one node [num_reqs] int64 of each request, and what of it is masked."""
        request = torch.arange(len(node), device=node.device)
        return self.canvas[request, node], self.is_masked[request, node]

    def of(self, request: Tensor) -> "Nodes":
        """Return those of some requests [num_some] int64, all as if evaluated."""
        end = None if self.end is None else self.end[request]
        return Nodes(self.canvas[request], self.is_masked[request], self.is_valid[request], self.depth[request], end)

    def per_evaluated(self, per_node: Tensor) -> Tensor:
        """Return values [num_reqs, num_nodes, ...] of those nodes that are evaluated, [num_evaluated, ...]."""
        flat = per_node.flatten(0, 1)
        return flat if self.place is None else flat[self.place]

    def rows(self, stats: PartialStats, request: Tensor | None = None) -> PartialStats:
        """Return statistics of all nodes' rows, of those of the evaluated ones; what the others have says nothing.

        Args:
            stats: of the evaluated ones.
            request: [num_some] int64, of whose nodes; None: of all requests'.
        """
        if self.evaluated is None and request is None:
            return stats
        evaluated, block_length = self.evaluated, self.canvas.shape[-1]
        if evaluated is None:
            evaluated = torch.arange(self.depth.numel(), device=self.depth.device).view_as(self.depth)
        first = (evaluated if request is None else evaluated[request]).flatten().clamp(min=0) * block_length
        row = (first[:, None] + torch.arange(block_length, device=first.device)).flatten()
        return PartialStats.of(itemgetter(row), stats)


@dataclass(frozen=True, slots=True)
class Kept:
    """What a policy without a native twin knows of the blocks of some requests behind a step."""

    name: str
    request: Tensor  # [num_some] int64, which of the step's
    state: PolicyState
    ended: PolicyState  # of the block that the step began with, where it came over into the next one


@dataclass(frozen=True, slots=True)
class Trajectory:
    """What some requests did in one forward."""

    canvas: Tensor  # [num_reqs, block_length] int64, of the block that the forward began with, after the walk
    next_canvas: Tensor  # [num_reqs, block_length] int64, the same, or the next block's where the look-ahead came true
    path: Tensor  # [num_reqs, num_nodes] int64, the nodes that were decided, in order; -1 behind them
    step: Tensor  # [num_reqs, block_length] int64, place in the path that wrote a position of `canvas`; -1: none
    node: Tensor  # [num_reqs] int64, the last of the path; 0 where it is empty, as that of a finished root is
    num_steps: Tensor  # [num_reqs] int64, length of the path
    num_unmasked: Tensor  # [num_reqs] int64, masked positions less than before, those of the next block included
    is_finished: Tensor  # [num_reqs] bool, whether `canvas` is
    came_over: Tensor  # [num_reqs] bool, whether the look-ahead came true: the block is stored and the next one begun
    candidates: Candidates  # [num_reqs, block_length, num_candidates], of `node`
    state: PolicyState = field(default_factory=dict)  # of the block of `next_canvas`, of policies of the op
    apart: tuple[Kept, ...] = ()  # the same of the others
    failed: dict[int, Failed] = field(default_factory=dict)  # requests that have to end, and why
    ended: PolicyState = field(default_factory=dict)  # of the block of `canvas`, of the walk in torch

    def with_those(self, request: Tensor, of: "Trajectory") -> "Trajectory":
        """Return the same where some requests [num_some] int64 did what `of` says."""

        def put(own: Tensor, new: Tensor) -> Tensor:
            return own.index_copy(0, request, new)

        own = {f.name: its for f in fields(self) if isinstance(its := getattr(self, f.name), Tensor)}
        columns: dict[str, Any] = {name: put(its, getattr(of, name)) for name, its in own.items()}
        return replace(
            self,
            **columns,
            candidates=Candidates(
                put(self.candidates.token_ids, of.candidates.token_ids),
                put(self.candidates.log_probs, of.candidates.log_probs),
            ),
            state={name: put(own, of.state[name]) for name, own in self.state.items()},
        )

    @property
    def num_accepted(self) -> Tensor:
        """[num_reqs] int64, steps beyond the first."""
        return (self.num_steps - 1).clamp(min=0)


Walk = Callable[[Nodes, PartialStats, PolicyParams, int, UnmaskRules, PolicyState], Trajectory]

Keep = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of the nodes [num_reqs], and of the positions [num_reqs, block_length] that policies chose there (bool), of their
scores and of the tokens: which take them. It keeps the first of each canvas's at least, but for a request that ends."""

NO_STATE: PolicyState = {}
"""Where no policy has a memory."""


def walk(
    nodes: Nodes,
    stats: PartialStats,
    params: PolicyParams,
    mask_token_id: int,
    rules: UnmaskRules,
    state: PolicyState = NO_STATE,
    keep: Keep | None = None,
) -> Trajectory:
    """Walk from the roots as long as the next canvas is one that was evaluated too.

    Where the walk ends at the look-ahead's end, the next root is decided as well.

    Args:
        nodes: canvases.
        stats: of the rows of those evaluated, in the order of requests, nodes, positions; at least two candidates each.
        params: of the requests.
        mask_token_id: what stands for masked in a canvas.
        rules: of the server.
        state: of the requests' policies at the roots; empty where none has a memory.
        keep: says which of the chosen positions are unmasked; None: all.
    """
    asked = asked_ids(state) if params.own is None else None
    ground = Ground(nodes, nodes.rows(stats), params, rules, mask_token_id, asked, keep)
    done = _walk_in_block(ground, state)
    return done if nodes.end is None else _go_over(done, ground)


def native_walk(
    nodes: Nodes,
    stats: PartialStats,
    params: PolicyParams,
    mask_token_id: int,
    rules: UnmaskRules,
    state: PolicyState = NO_STATE,
) -> Trajectory:
    """Do what `walk` does, in one launch; all tensors are contiguous."""
    rows = [stats.token_ids, stats.token_logits, stats.top_ids, stats.top_logits, stats.rest, stats.weighted]
    if stats.sampled_rest is not None and stats.sampled_weighted is not None:
        rows += [stats.sampled_rest, stats.sampled_weighted]
    memory = [*state.values(), stats.given_logits] if state and stats.given_logits is not None else []
    found = ops.decide_walk(
        nodes.canvas,
        nodes.is_valid,
        nodes.end,
        nodes.evaluated,
        rows,
        params.tensors,
        memory,
        mask_token_id,
        rules.unmasks_first_alone,
        rules.sub_block_length or 0,
    )
    canvas, next_canvas, path, step, node, num_steps, num_unmasked, is_finished, came_over = found[:9]
    candidates, state = Candidates(*found[9:11]), dict(zip(state, found[11:], strict=True))
    return Trajectory(
        canvas, next_canvas, path, step, node, num_steps, num_unmasked, is_finished, came_over, candidates, state
    )


def choose_walk(device: torch.device) -> Walk:
    """Take the native op where it is built for the device, else its torch twin."""
    return ops.native_or_twin("decide_walk", device.type, "Canvases are decided", native_walk, walk)


def _walk_in_block(ground: Ground, state: PolicyState) -> Trajectory:
    nodes = ground.nodes
    num_reqs, num_nodes, _ = nodes.canvas.shape
    num_in_block = num_nodes - (nodes.end is not None)
    request = torch.arange(num_reqs, device=nodes.canvas.device)
    canvas, node, num_steps = nodes.canvas[:, 0], torch.zeros_like(request), torch.zeros_like(request)
    path = nodes.canvas.new_full((num_reqs, num_nodes), -1)
    step = torch.full_like(canvas, -1)
    # A canvas without masks is no block's end where tokens may change yet.
    is_finished, follower = ~nodes.is_masked[:, 0].any(1) & ~_may_edit(ground.params, node), node
    goes_on = ~is_finished
    # Each draft comes true once: where tokens are taken back, a canvas may come again.
    is_open = nodes.is_valid.clone()
    is_open[:, 0] = False
    for place in range(num_in_block):
        if canvas.is_cpu and not goes_on.any():  # elsewhere the host would wait
            break
        goes_on = goes_on & is_decidable(ground, follower, state)
        node = torch.where(goes_on, follower, node)
        before = nodes.canvas[request, node]
        made = decide_nodes(ground, node, ground.params, state, goes_on)
        canvas, state = torch.where(goes_on[:, None], made.canvas, canvas), select(goes_on, made.state, state)
        is_finished = torch.where(goes_on, made.is_done, is_finished)
        step = torch.where(goes_on[:, None] & (canvas != before), place, step)
        path[:, place] = torch.where(goes_on, node, -1)
        num_steps = num_steps + goes_on
        is_open[request, node] &= ~goes_on
        came_true = (canvas[:, None] == nodes.canvas).all(-1) & is_open
        follows, follower = came_true[:, :num_in_block].byte().max(1)
        goes_on = goes_on & ~is_finished & (follows > 0)
    return Trajectory(
        canvas=canvas,
        next_canvas=canvas,
        path=path,
        step=step.masked_fill(canvas == ground.mask_token_id, -1),
        node=node,
        num_steps=num_steps,
        num_unmasked=nodes.is_masked[:, 0].sum(1) - (canvas == ground.mask_token_id).sum(1),
        is_finished=is_finished,
        came_over=torch.zeros_like(is_finished),
        candidates=candidates_at(ground, node),
        state=state,
        ended=state,
    )


def _go_over(done: Trajectory, ground: Ground) -> Trajectory:
    """Decide the next root where the walk ended at the look-ahead's end."""
    nodes = ground.nodes
    num_nodes = nodes.canvas.shape[1]
    next_root = torch.full_like(done.node, num_nodes - 1)
    assert nodes.end is not None, "there is a look-ahead"
    came_over = done.is_finished & nodes.is_valid[:, -1] & (done.canvas == nodes.end).all(1)
    made = _decide_next_root(ground, next_root, done.state, came_over)
    is_next = came_over[:, None] & (torch.arange(num_nodes, device=next_root.device) == done.num_steps[:, None])
    node = torch.where(came_over, next_root, done.node)
    return replace(
        done,
        next_canvas=torch.where(came_over[:, None], made.canvas, done.canvas),
        path=torch.where(is_next, next_root[:, None], done.path),
        node=node,
        num_steps=done.num_steps + came_over,
        num_unmasked=done.num_unmasked + came_over * (made.canvas != ground.mask_token_id).sum(1),
        came_over=came_over,
        candidates=candidates_at(ground, node),
        state=select(came_over, made.state, done.state),
    )


def _decide_next_root(ground: Ground, next_root: Tensor, state: PolicyState, came_over: Tensor) -> Decided:
    params, own = ground.params.of_next_block(ground.nodes.canvas.shape[2]), ground.params.own
    if own is not None:
        state = torch_policy(own.name).of_next_block(state)
    elif state:
        state = new_state(len(next_root), ground.nodes.canvas.shape[2], next_root.device)
    return decide_nodes(ground, next_root, params, state, came_over)


def _may_edit(params: PolicyParams, node: Tensor) -> Tensor:
    """Tell of which requests known tokens may change; [num_reqs] bool."""
    may = params.own is not None and changes_tokens(params.own.name)
    return torch.full_like(node, may, dtype=torch.bool)
