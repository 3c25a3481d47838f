"""One step of block diffusion around the forward: which canvases it evaluates, and what becomes of them.

`nodes` gives the canvases of the next forward: the true ones and the drafts (`draft.propose`), made from the last
distribution that came true. `advance` takes the forward's rows: statistics of each (`unmask.stats`), the canvas that
the unmasking policy makes of every evaluated canvas (`unmask.policy`), how far the drafts among them came true
(`draft.verify`). Batched tensor code; nothing waits for the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from vllm_dllm import noise
from vllm_dllm.draft.compile import CompiledGraph
from vllm_dllm.draft.graph import MAX_CANDIDATES
from vllm_dllm.draft.propose import Roots, propose
from vllm_dllm.draft.verify import accept
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.drafts import DraftState
from vllm_dllm.unmask.policy import POLICY_IDS, choose_positions
from vllm_dllm.unmask.stats import Candidates, RowSampling, RowStats, Uniform, chunk_rows, row_stats, top_candidates


@dataclass(frozen=True, slots=True)
class Nodes:
    """The canvases that a step evaluates; node 0 is the root, the request's true canvas."""

    canvas: Tensor  # [num_reqs, num_nodes, block_length] int64
    is_masked: Tensor  # [num_reqs, num_nodes, block_length] bool
    is_valid: Tensor  # [num_reqs, num_nodes] bool, False for drafts that mean nothing
    depth: Tensor  # [num_reqs, num_nodes] int64, in the draft graph


@dataclass(frozen=True, slots=True)
class Drafting:
    """What drafts are made by and from."""

    graph: CompiledGraph
    state: DraftState


@dataclass(frozen=True, slots=True)
class Decision:
    """What some requests did in one forward."""

    num_unmasked: Tensor  # [num_reqs] int64, positions
    num_accepted: Tensor  # [num_reqs] int64, steps beyond the root's
    is_finished: Tensor  # [num_reqs] bool


@dataclass(frozen=True, slots=True)
class Observation:
    """One decided canvas of some requests, for calibration: what was seen, and what came of it."""

    blocks: Blocks
    canvas: Tensor  # [num_reqs, block_length] int64, before the step
    next_canvas: Tensor  # [num_reqs, block_length] int64
    candidates: Candidates  # [num_reqs, block_length, MAX_CANDIDATES]


class Denoiser:
    """Advances canvases by what a model says of them."""

    def __init__(
        self,
        state: CanvasState,
        drafting: Drafting | None,
        head_logits: Callable[[Tensor], Tensor],
        vocab_size: int,
        draw_uniform: Uniform = noise.uniform_rows,
    ) -> None:
        self.state = state
        self.drafting = drafting
        self.head_logits = head_logits
        self.draw_uniform = draw_uniform
        self.chunk_rows = chunk_rows(vocab_size)
        self.num_candidates = min(MAX_CANDIDATES, vocab_size)
        self.observer: Callable[[Observation], None] | None = None

    def nodes(self, blocks: Blocks, num_drafts: int) -> Nodes:
        """Return the present canvases of some requests, and their best `num_drafts` drafts.

        Without a draft graph `num_drafts` is 0.
        """
        root = self.state.canvas[blocks.slots]
        is_masked = root == self.state.mask_token_id
        if self.drafting is None or num_drafts == 0:
            one = torch.ones_like(root[:, :1])
            return Nodes(root[:, None], is_masked[:, None], one.bool(), one - 1)
        graph, state = self.drafting.graph, self.drafting.state
        draft_noise = self.state.draft_noise(blocks)
        num_candidates = graph.num_vocab_ranks if draft_noise is None else self.num_candidates
        candidates = self._candidates(state.hidden[blocks.slots], num_candidates)
        is_new = state.was_masked[blocks.slots] & ~is_masked
        drafts = propose(graph, Roots(root, is_masked, is_new, candidates), draft_noise)
        canvas = torch.cat([root[:, None], drafts.canvas[:, :num_drafts]], 1)
        is_valid = drafts.is_valid[:, :num_drafts] & state.is_known[blocks.slots, None]
        return Nodes(
            canvas=canvas,
            is_masked=canvas == self.state.mask_token_id,
            is_valid=torch.nn.functional.pad(is_valid, (1, 0), value=True),
            depth=torch.nn.functional.pad(drafts.depth[:, :num_drafts], (1, 0)),
        )

    def begin_blocks(self, slots: Tensor, where: Tensor) -> None:
        """Begin a new block for those of the given slots that `where` [num_reqs] bool marks."""
        self.state.reset(slots, where)
        if self.drafting is not None:
            self.drafting.state.forget(slots, where)

    def advance(self, blocks: Blocks, nodes: Nodes, hidden: Tensor) -> Decision:
        """Decide the next canvases of some requests, as many as their drafts foresaw and one more.

        Args:
            blocks: the requests.
            nodes: the canvases that were evaluated for them.
            hidden: [num_reqs * num_nodes * block_length, hidden_size], the model's rows for these canvases.
        """
        sampling = self.state.row_sampling(blocks, nodes.is_masked.sum(2))
        next_canvas = self._next_canvas(blocks, nodes, hidden, sampling)
        walk = accept(nodes.canvas, next_canvas, nodes.is_valid)
        request = torch.arange(len(walk.node), device=hidden.device)
        canvas = next_canvas[request, walk.node]
        is_masked = canvas == self.state.mask_token_id
        num_unmasked = nodes.is_masked[:, 0].sum(1) - is_masked.sum(1)
        self.state.canvas[blocks.slots] = canvas
        if self.drafting is not None or self.observer is not None:
            decided = hidden.view(*nodes.canvas.shape, -1)[request, walk.node]
        if self.drafting is not None:
            self.drafting.state.put(blocks.slots, decided, nodes.is_masked[request, walk.node])
        if self.observer is not None:
            candidates = self._candidates(decided, self.num_candidates)
            self.observer(Observation(blocks, nodes.canvas[request, walk.node], canvas, candidates))
        return Decision(num_unmasked, walk.num_accepted, ~is_masked.any(1))

    def reduce(self, hidden: Tensor, *, is_sampled: bool) -> None:
        """Do a step's work on rows that belong to nobody, for measurements of time and memory.

        Args:
            hidden: [num_rows, hidden_size].
            is_sampled: with noise and filters, which take the most memory.
        """
        zeros = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        ones = torch.ones(len(hidden), dtype=torch.float64, device=hidden.device)
        self._row_stats(hidden, RowSampling(ones * is_sampled, zeros, 0.9 * ones, zeros, is_sampled, is_sampled))

    def _next_canvas(self, blocks: Blocks, nodes: Nodes, hidden: Tensor, sampling: RowSampling) -> Tensor:
        """Apply the requests' policies to every evaluated canvas; [num_reqs, num_nodes, block_length] int64."""
        num_nodes, block_length = nodes.canvas.shape[1:]
        stats = self._row_stats(hidden, sampling)
        params = self.state.policy_params(blocks.slots).repeat(num_nodes)
        is_random = (params.policy_id == POLICY_IDS["random"])[:, None]
        uniform = noise.uniform(sampling.keys, noise.STREAM).view(-1, block_length)
        confidence = torch.where(is_random, uniform, stats.confidence.view(-1, block_length))
        chosen = choose_positions(confidence, nodes.is_masked.flatten(0, 1), params).view_as(nodes.canvas)
        return torch.where(chosen, stats.token_ids.view_as(nodes.canvas), nodes.canvas)

    def _row_stats(self, hidden: Tensor, sampling: RowSampling) -> RowStats:
        """Make the head product chunk by chunk and keep what the policies need of each row."""
        mask_token_id = self.state.mask_token_id
        parts = [
            row_stats(self.head_logits(rows), sampling.rows(begin, begin + len(rows)), mask_token_id, self.draw_uniform)
            for begin, rows in zip(count(0, self.chunk_rows), hidden.split(self.chunk_rows), strict=False)
        ]
        return RowStats(torch.cat([p.token_ids for p in parts]), torch.cat([p.confidence for p in parts]))

    def _candidates(self, hidden: Tensor, num_candidates: int) -> Candidates:
        """Make the head product for rows that drafts are made from.

        Args:
            hidden: [num_reqs, block_length, hidden_size].
            num_candidates: tokens to keep of each row.
        """
        parts = [
            top_candidates(self.head_logits(rows), num_candidates, self.state.mask_token_id)
            for rows in hidden.flatten(0, 1).split(self.chunk_rows)
        ]
        shape = (*hidden.shape[:2], num_candidates)
        token_ids = torch.cat([p.token_ids for p in parts]).view(shape)
        return Candidates(token_ids, torch.cat([p.log_probs for p in parts]).view(shape))
