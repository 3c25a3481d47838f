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

from vllm_dllm.draft.compile import CompiledGraph
from vllm_dllm.draft.graph import MAX_CANDIDATES
from vllm_dllm.draft.native import BY_TORCH, DraftFunctions
from vllm_dllm.draft.propose import Roots
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


@dataclass(frozen=True, slots=True)
class Drafting:
    """What drafts are made by and from."""

    graph: CompiledGraph
    state: DraftState
    functions: DraftFunctions = BY_TORCH


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
        is_new = state.was_masked[blocks.slots] & ~is_masked
        roots = Roots(root, is_masked, is_new, state.candidates(blocks.slots))
        drafts = self.drafting.functions.propose(graph, roots, self.state.draft_noise(blocks), num_drafts)
        canvas = torch.cat([root[:, None], drafts.canvas], 1)
        is_valid = drafts.is_valid & state.is_known[blocks.slots, None]
        return Nodes(
            canvas=canvas,
            is_masked=canvas == self.state.mask_token_id,
            is_valid=torch.nn.functional.pad(is_valid, (1, 0), value=True),
            depth=torch.nn.functional.pad(drafts.depth, (1, 0)),
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
        keeps_candidates = self.drafting is not None or self.observer is not None
        rows = self.state.predicting_rows(blocks.slots, hidden)
        stats = self.head(rows, sampling, MAX_CANDIDATES if keeps_candidates else POLICY_CANDIDATES)
        next_canvas = self._next_canvas(blocks, nodes, stats, sampling)
        accept = BY_TORCH.accept if self.drafting is None else self.drafting.functions.accept
        walk = accept(nodes.canvas, next_canvas, nodes.is_valid)
        request = torch.arange(len(walk.node), device=hidden.device)
        canvas = next_canvas[request, walk.node]
        is_masked = canvas == self.state.mask_token_id
        num_unmasked = nodes.is_masked[:, 0].sum(1) - is_masked.sum(1)
        self.state.canvas[blocks.slots] = canvas
        if keeps_candidates:
            candidates = _candidates_at(stats, nodes, request, walk.node)
        if self.drafting is not None:
            self.drafting.state.put(blocks.slots, candidates, nodes.is_masked[request, walk.node])
        if self.observer is not None:
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
        wants_sampled = is_sampled and self.state.rules.confidence == "sampled"
        sampling = RowSampling(ones * is_sampled, zeros, 0.9 * ones, zeros, is_sampled, is_sampled, wants_sampled)
        self.head(hidden, sampling, POLICY_CANDIDATES if self.drafting is None else MAX_CANDIDATES)

    def _next_canvas(self, blocks: Blocks, nodes: Nodes, stats: PartialStats, sampling: RowSampling) -> Tensor:
        """Apply the requests' policies to every evaluated canvas; [num_reqs, num_nodes, block_length] int64."""
        num_nodes, block_length = nodes.canvas.shape[1:]
        params = self.state.policy_params(blocks, num_nodes)
        evidence = Evidence(
            distribution=stats.distribution(sampling),
            keys=sampling.keys.view(-1, block_length),
            position=self.state.positions(blocks).repeat_interleave(num_nodes, 0),
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
