"""One step of block diffusion around the forward: which canvases it evaluates, and what becomes of them.

`nodes` gives the canvases of the next forward: the true ones and the drafts (`draft.propose`), made from the last
distribution that came true. `advance` takes the forward's rows: statistics of each (`unmask.stats`), the canvas that
the unmasking policy makes of every evaluated canvas (`unmask.policy`), how far the drafts among them came true
(`draft.verify`). Batched tensor code; nothing waits for the device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_dllm.draft.compile import CompiledGraph
from vllm_dllm.draft.graph import MAX_CANDIDATES
from vllm_dllm.draft.native import BY_TORCH, DraftFunctions
from vllm_dllm.draft.propose import Roots, likeliest_end
from vllm_dllm.draft.verify import Walk
from vllm_dllm.ops.vocab_stats import PartialStats, RowSampling
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.drafts import DraftState
from vllm_dllm.unmask.head import Head
from vllm_dllm.unmask.policy import Evidence, choose_positions, score_positions
from vllm_dllm.unmask.stats import Candidates, candidates_of

POLICY_CANDIDATES = 2
"""Most probable tokens of a row that a policy looks at: `margin` compares two."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """The canvases that a step evaluates; node 0 is the root, the request's true canvas."""

    canvas: Tensor  # [num_reqs, num_nodes, block_length] int64
    is_masked: Tensor  # [num_reqs, num_nodes, block_length] bool
    is_valid: Tensor  # [num_reqs, num_nodes] bool, False for drafts that mean nothing
    depth: Tensor  # [num_reqs, num_nodes] int64, in the draft graph
    # [num_reqs, block_length] int64 with a look-ahead: its end. Its next root is the last node then.
    end: Tensor | None = None

    def with_look_ahead(self, end: Tensor, is_valid: Tensor, mask_token_id: int) -> "Nodes":
        """Return these nodes with a look-ahead.

        Args:
            end: [num_reqs, block_length] int64.
            is_valid: [num_reqs] bool, whether it may come true.
            mask_token_id: what the next root consists of.
        """
        next_root = torch.full_like(self.canvas[:, :1], mask_token_id)
        return Nodes(
            canvas=torch.cat([self.canvas, next_root], 1),
            is_masked=pad(self.is_masked, (0, 0, 0, 1), value=True),
            is_valid=torch.cat([self.is_valid, is_valid[:, None]], 1),
            depth=torch.cat([self.depth, self.is_masked[:, 0].sum(1, keepdim=True)], 1),
            end=end,
        )

    def of_nodes(self, blocks: Blocks) -> Blocks:
        """Return the block of each node, [num_reqs * num_nodes]; `blocks` are the roots'."""
        num_nodes, block_length = self.canvas.shape[1:]
        start = blocks.start[:, None].repeat(1, num_nodes)
        if self.end is not None:
            start[:, -1] += block_length
        slots = blocks.slots.repeat_interleave(num_nodes)
        return Blocks(slots, blocks.slots_np.repeat(num_nodes), start.flatten())


@dataclass(frozen=True, slots=True)
class Drafting:
    """What drafts are made by and from."""

    graph: CompiledGraph
    state: DraftState
    functions: DraftFunctions = BY_TORCH


@dataclass(frozen=True, slots=True)
class Decision:
    """What some requests did in one forward."""

    num_unmasked: Tensor  # [num_reqs] int64, positions, those of the next block included
    num_accepted: Tensor  # [num_reqs] int64, steps beyond the first
    canvas: Tensor  # [num_reqs, block_length] int64, of the block that the forward began with
    is_finished: Tensor  # [num_reqs] bool, that canvas
    came_over: Tensor  # [num_reqs] bool, whether the look-ahead came true: the block is stored and the next one begun


@dataclass(frozen=True, slots=True)
class Observation:
    """One decided canvas of some requests, for calibration: what was seen, and what came of it."""

    blocks: Blocks
    canvas: Tensor  # [num_reqs, block_length] int64, before the step
    next_canvas: Tensor  # [num_reqs, block_length] int64
    candidates: Candidates  # [num_reqs, block_length, MAX_CANDIDATES]


class Denoiser:
    """Advances canvases by what a model says of them.

    Args:
        state: the canvases.
        drafting: None: without drafts.
        head: reduces the model's rows.
    """

    def __init__(self, state: CanvasState, drafting: Drafting | None, head: Head) -> None:
        self.state = state
        self.drafting = drafting
        self.head = head
        self.observer: Callable[[Observation], None] | None = None

    def nodes(self, blocks: Blocks, num_drafts: int, *, looks_ahead: bool = False) -> Nodes:
        """Return the present canvases of some requests, and their best `num_drafts` drafts.

        Without a draft graph `num_drafts` is 0; with a look-ahead it is not.
        """
        root = self.state.canvas[blocks.slots]
        is_masked = root == self.state.mask_token_id
        if self.drafting is None or num_drafts == 0:
            one = torch.ones_like(root[:, :1])
            return Nodes(root[:, None], is_masked[:, None], one.bool(), one - 1)
        graph, state = self.drafting.graph, self.drafting.state
        is_new = state.was_masked[blocks.slots] & ~is_masked
        roots = Roots(root, is_masked, is_new, state.candidates(blocks.slots))
        draft_noise = self.state.draft_noise(blocks)
        drafts = self.drafting.functions.propose(graph, roots, draft_noise, num_drafts)
        canvas = torch.cat([root[:, None], drafts.canvas], 1)
        is_valid = drafts.is_valid & state.is_known[blocks.slots, None]
        nodes = Nodes(
            canvas=canvas,
            is_masked=canvas == self.state.mask_token_id,
            is_valid=pad(is_valid, (1, 0), value=True),
            depth=pad(drafts.depth, (1, 0)),
        )
        if not looks_ahead:
            return nodes
        end = likeliest_end(graph, roots, draft_noise)
        has_next = blocks.start + self.state.block_length < self.state.row_len[blocks.slots]
        return nodes.with_look_ahead(end, state.is_known[blocks.slots] & has_next, self.state.mask_token_id)

    def begin_blocks(self, slots: Tensor, where: Tensor) -> None:
        """Begin a new block for those of the given slots that `where` [num_reqs] bool marks."""
        self.state.reset(slots, where)
        if self.drafting is not None:
            self.drafting.state.forget(slots, where)

    def advance(self, blocks: Blocks, nodes: Nodes, hidden: Tensor) -> Decision:
        """Decide the next canvases of some requests, as many as their drafts foresaw and one more.

        Where a look-ahead came true the request has the next block from then on.

        Args:
            blocks: the requests.
            nodes: the canvases that were evaluated for them.
            hidden: [num_reqs * num_nodes * block_length, hidden_size], the model's rows for these canvases.
        """
        of_nodes = nodes.of_nodes(blocks)
        sampling = self.state.row_sampling(of_nodes, nodes.is_masked.flatten(0, 1).sum(1, keepdim=True))
        keeps_candidates = self.drafting is not None or self.observer is not None
        rows = self.state.predicting_rows(blocks.slots, hidden)
        stats = self.head(rows, sampling, MAX_CANDIDATES if keeps_candidates else POLICY_CANDIDATES)
        next_canvas = self._next_canvas(of_nodes, nodes, stats, sampling)
        accept = BY_TORCH.accept if self.drafting is None else self.drafting.functions.accept
        walk = accept(nodes.canvas, next_canvas, nodes.is_valid)
        node, decision = self._decide(nodes, next_canvas, walk)
        request = torch.arange(len(node), device=node.device)
        canvas = next_canvas[request, node]
        self.state.canvas[blocks.slots] = canvas
        if keeps_candidates:
            candidates = _candidates_at(stats, nodes, request, node)
        if self.drafting is not None:
            self.drafting.state.put(blocks.slots, candidates, nodes.is_masked[request, node])
        if self.observer is not None:
            self.observer(Observation(blocks, nodes.canvas[request, node], canvas, candidates))
        return decision

    def finished(self, blocks: Blocks) -> Decision:
        """Return what is decided where the canvas is finished already: nothing."""
        canvas = self.state.canvas[blocks.slots]
        none = torch.zeros(len(canvas), dtype=torch.int64, device=canvas.device)
        return Decision(none, none, canvas, is_finished=none == 0, came_over=none.bool())

    def reduce(self, hidden: Tensor, *, is_sampled: bool) -> None:
        """Do a step's work on rows that belong to nobody, for measurements of time and memory.

        Args:
            hidden: [num_rows, hidden_size].
            is_sampled: with noise and filters, which take the most memory.
        """
        zeros = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        ones = torch.ones(len(hidden), dtype=torch.float64, device=hidden.device)
        wants_sampled = is_sampled and self.state.rules.confidence == "sampled"
        sampling = RowSampling(ones * is_sampled, zeros, 0.9 * ones, zeros, is_sampled, is_sampled, wants_sampled)
        self.head(hidden, sampling, POLICY_CANDIDATES if self.drafting is None else MAX_CANDIDATES)

    def _decide(self, nodes: Nodes, next_canvas: Tensor, walk: Walk) -> tuple[Tensor, Decision]:
        """Say which node's next canvas each request has now, [num_reqs] int64, and what it did.

        Args:
            nodes: what was evaluated.
            next_canvas: [num_reqs, num_nodes, block_length] int64, what the decoder makes of each.
            walk: how far the drafts came true.
        """
        mask_token_id = self.state.mask_token_id
        node, num_accepted = walk.node, walk.num_accepted
        canvas = next_canvas[torch.arange(len(node), device=node.device), node]
        was_masked, is_masked = nodes.is_masked[:, 0].sum(1), canvas == mask_token_id
        num_unmasked, is_finished = was_masked - is_masked.sum(1), ~is_masked.any(1)
        came_over = torch.zeros_like(is_finished)
        if nodes.end is not None:
            came_over = is_finished & nodes.is_valid[:, -1] & (canvas == nodes.end).all(1)
            node = torch.where(came_over, nodes.canvas.shape[1] - 1, node)
            # Behind a root that was finished before, the next block's step is the first.
            num_accepted = num_accepted + (came_over & (was_masked > 0))
            num_unmasked += came_over * (next_canvas[:, -1] != mask_token_id).sum(1)
        return node, Decision(num_unmasked, num_accepted, canvas, is_finished, came_over)

    def _next_canvas(self, of_nodes: Blocks, nodes: Nodes, stats: PartialStats, sampling: RowSampling) -> Tensor:
        """Apply the requests' policies to every evaluated canvas; [num_reqs, num_nodes, block_length] int64."""
        params = self.state.policy_params(of_nodes)
        evidence = Evidence(
            distribution=stats.distribution(sampling),
            keys=sampling.keys.view(-1, self.state.block_length),
            position=self.state.positions(of_nodes),
        )
        is_masked = nodes.is_masked.flatten(0, 1)
        chosen = choose_positions(score_positions(evidence, params), is_masked, params)
        if self.state.rules.unmasks_first_alone:
            is_untouched = is_masked.all(1)
            chosen &= ~is_untouched[:, None]
            chosen[:, 0] |= is_untouched
        return torch.where(chosen.view_as(nodes.canvas), stats.token_ids.view_as(nodes.canvas), nodes.canvas)


def _candidates_at(stats: PartialStats, nodes: Nodes, request: Tensor, node: Tensor) -> Candidates:
    """Take the candidates of one node of each request; [num_reqs, block_length, MAX_CANDIDATES]."""
    found = candidates_of(stats)
    token_ids = found.token_ids.view(*nodes.canvas.shape, -1)[request, node]
    return Candidates(token_ids, found.log_probs.view(*nodes.canvas.shape, -1)[request, node])
