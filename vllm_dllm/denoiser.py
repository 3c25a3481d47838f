"""One step of block diffusion around the forward: which canvases it evaluates, and what becomes of them.

`nodes` gives the canvases of the next forward: the true ones and the drafts (`draft.drafter`). `advance` takes the
forward's rows: statistics of each (`unmask.stats`), and the canvases that the unmasking policy makes in turn, as far as
the drafts came true (`unmask.walk`). `settle` ends the step (`state.settle`). Batched tensor code; nothing waits for
the device.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_dllm.apart import DecidedStep, keep_of
from vllm_dllm.arrays import to_device
from vllm_dllm.constraint.step import ConstrainedStep
from vllm_dllm.draft.drafter import Drafter
from vllm_dllm.draft.graph import MAX_CANDIDATES
from vllm_dllm.ops.vocab_stats import PartialStats, RowIds, RowSampling
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.draws import Draw, torch_draws
from vllm_dllm.state.records import Asking
from vllm_dllm.state.report import Column
from vllm_dllm.state.settle import Emission, Ledger, Settle, settle
from vllm_dllm.unmask.edits import RowEdits
from vllm_dllm.unmask.guidance import Guidance
from vllm_dllm.unmask.head import Head
from vllm_dllm.unmask.logprobs import LogprobHead, TokenLogprobs, Unmasked
from vllm_dllm.unmask.memory import select
from vllm_dllm.unmask.policy import asked_ids
from vllm_dllm.unmask.unwritten import other_tokens
from vllm_dllm.unmask.walk import NO_STATE, Kept, Nodes, Trajectory, Walk, walk

POLICY_CANDIDATES = 2
"""Most probable tokens of a row that a policy looks at: `margin` compares two."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What a forward decided for some requests, before it is known whether the step is void: what recorders see."""

    blocks: Blocks
    nodes: Nodes  # what was evaluated
    done: Trajectory  # what came of it; with `MAX_CANDIDATES` candidates

    @property
    def canvas(self) -> Tensor:
        """[num_reqs, block_length] int64, the last canvas that was decided, before that."""
        return self.nodes.at(self.done.node)[0]


class Denoiser:
    """Advances canvases by what a model says of them.

    Args:
        state: the canvases.
        drafter: attached to the canvases here; None: without drafts.
        head: reduces the model's rows.
        walk: decides canvases.
        settle: ends steps.
        draw: says how tokens are drawn.
        logprob_head: makes log-probabilities; None: nobody may ask for them.
    """

    def __init__(
        self,
        state: CanvasState,
        drafter: Drafter | None,
        head: Head,
        walk: Walk = walk,
        settle: Settle = settle,
        draw: Draw = torch_draws,
        logprob_head: LogprobHead | None = None,
    ) -> None:
        self.state = state
        self.drafter = drafter
        if drafter is not None:
            drafter.attach(state)
        self.head = head
        self.walk = walk
        self._settle = settle
        self.draw = draw
        self.logprob_head = logprob_head
        self._found: tuple[Asking, Unmasked, TokenLogprobs] | None = None  # by the step that was decided last
        self.observer: Callable[[Observation], None] | None = None

    def nodes(self, blocks: Blocks, num_drafts: int, *, looks_ahead: bool = False) -> Nodes:
        """Return the present canvases of some requests, and their best `num_drafts` drafts; without a drafter 0."""
        if self.drafter is None:
            nodes = Nodes.of_roots(self.state.canvas[blocks.slots], self.state.mask_token_id)
        else:
            nodes = self.drafter.propose(blocks, num_drafts, looks_ahead=looks_ahead)
        # Before the forward is queued, so that the host does not wait for it, and works while it runs.
        own = ConstrainedStep.read(
            self.state.answers, blocks.slots_np, nodes.canvas, nodes.end, self.state.mask_token_id
        )
        return nodes if own is None else replace(nodes, constrained=own)

    def begin_blocks(self, slots: Tensor, where: Tensor) -> None:
        """Begin a new block for those of the given slots that `where` [num_reqs] bool marks."""
        self.state.reset(slots, where)
        if self.drafter is not None and self.drafter.memory is not None:
            self.drafter.memory.forget(slots, where)

    def advance(
        self,
        blocks: Blocks,
        nodes: Nodes,
        hidden: Tensor,
        fresh: Tensor | None = None,
        twin_of: Tensor | None = None,
    ) -> Trajectory:
        """Decide the next canvases of some requests, as many as their drafts foresaw and one more.

        Nothing is kept of them before `settle`.

        Args:
            blocks: of the requests, no request twice.
            nodes: their canvases.
            hidden: [num_evaluated * block_length, hidden_size], the model's rows of those that are evaluated; may be
                written to.
            fresh: as in `CanvasState.predicting_rows`.
            twin_of: of which canvas each twin is whose rows are behind those of the canvases; None: there is none.
        """
        guidance = None
        if twin_of is not None:
            hidden, guidance = self.state.guidance.split(blocks.slots, nodes, hidden, twin_of)
        slots = nodes.per_evaluated(blocks.slots[:, None].expand(nodes.depth.shape)) if self.state.keeps_left else None
        rows = hidden if slots is None else self.state.predicting_rows(slots, hidden, fresh)
        remembered = self.state.policy_state(blocks)
        edits, keep = self.state.row_edits(blocks, nodes)
        asked = _asked(nodes, asked_ids(remembered), self.state.asks(blocks), self.state.rules.end_ids)
        ids = _row_ids(nodes, asked, edits, guidance)
        stats = self._reduced(blocks, nodes, rows, ids)
        params = self.state.policy_params(blocks)
        decide = self.walk if keep is None else partial(walk, keep=keep)
        done = decide(nodes, stats, params, self.state.mask_token_id, self.state.rules, remembered)
        if nodes.constrained is not None:
            done = self._under_constraints(nodes.constrained, blocks, nodes, stats, done)
        done = DecidedStep(self.state, blocks, nodes, stats, keep_of(keep, nodes.constrained)).others(done)
        scored = self.state.targets.of(blocks.slots_np)
        if scored is not None:
            done = scored.taken(nodes, done)
        self._found = self._logprobs(blocks, nodes, done, rows, ids)
        if self.observer is not None:
            self.observer(Observation(blocks, nodes, done))
        return done

    def _reduced(self, blocks: Blocks, nodes: Nodes, rows: Tensor, ids: RowIds | None) -> PartialStats:
        """Return statistics of evaluated rows [num_rows, hidden_size], and what a policy asks besides that writes any.

        Args:
            blocks: of the requests.
            nodes: their canvases.
            rows: of the canvases.
            ids: of the rows.
        """
        keeps_candidates = self.drafter is not None or self.observer is not None
        written = self.state.apart.written(blocks.slots, blocks.slots_np)
        num_candidates = MAX_CANDIDATES if keeps_candidates or written is not None else POLICY_CANDIDATES
        sampling = self.draw(self.state, blocks, nodes) if self.state.is_sampled(blocks.slots_np) else None
        stats = self.head(rows, sampling, num_candidates, ids)
        if written is None:
            return stats
        of_rows = nodes.per_evaluated(written[:, None].expand(-1, nodes.depth.shape[1], -1, -1)).flatten(0, 1)
        others = other_tokens(self.head, rows, of_rows, self.state.mask_token_id, self.state.vocab_size)
        return replace(stats, others=others)

    def void(self, blocks: Blocks, done: Trajectory, is_void: Tensor) -> Trajectory:
        """Undo the step of requests whose block was emitted before it began: their next block is as it was begun.

        Nobody reads the report of such a step.

        Args:
            blocks: of the requests.
            done: what `advance` made of their steps.
            is_void: [num_reqs] bool.
        """
        if self._found is not None:  # what is given of the next block must not be found unmasked
            asking, unmasked, tokens = self._found
            counts = ~is_void[asking.place, None, None]
            self._found = asking, replace(unmasked, is_new=unmasked.is_new & counts), tokens
        kept = self.state.policy_state(blocks)
        apart = tuple(self._void_apart(blocks, each, is_void) for each in done.apart)
        return replace(
            done,
            next_canvas=torch.where(is_void[:, None], self.state.canvas[blocks.slots], done.next_canvas),
            is_finished=done.is_finished & ~is_void,
            num_unmasked=done.num_unmasked * ~is_void,  # so it has not reached an end, either
            state=select(is_void, kept, done.state),
            apart=apart,
        )

    def _void_apart(self, blocks: Blocks, own: Kept, is_void: Tensor) -> Kept:
        before = self.state.apart.state(own.name, blocks.slots[own.request])
        return replace(own, state=select(is_void[own.request], before, own.state))

    def settle(self, blocks: Blocks, nodes: Nodes, done: Trajectory, ledger: Ledger) -> Emission:
        """Keep what `advance` came to, emit blocks that are finished or that an answer ends in: see `state.settle`."""
        drafts = None if self.drafter is None else self.drafter.memory
        emission = self._settle(self.state, drafts, blocks, nodes, done, ledger)
        if done.apart:
            self._keep_apart(blocks, nodes, done, emission)
        for place, why in done.failed.items():
            emission.report[place, Column.FAULTS] = why
        if nodes.constrained is not None:
            over = nodes.constrained.take(done.canvas, done.is_finished, emission.num_sampled[: len(done.node)] > 0)
            for slot in blocks.slots_np[over].tolist():
                del self.state.answers[slot]
        if drafts is not None and ledger.begun is not None:
            drafts.forget(blocks.slots, ledger.begun.bool())
        if self._found is not None:
            is_emitted = emission.num_sampled[: len(done.node)] > 0
            logprobs = self.state.records.take(*self._found, ledger.num_known - blocks.start, is_emitted)
            emission = replace(emission, logprobs=logprobs)
        if ledger.missing is None:
            return emission
        missing = pad(ledger.missing.int(), (0, ledger.num_batch - len(ledger.missing)))
        fewer = missing * (emission.num_sampled > 0)
        return replace(emission, num_sampled=emission.num_sampled - fewer, num_rejected=emission.num_rejected + fewer)

    def _keep_apart(self, blocks: Blocks, nodes: Nodes, done: Trajectory, emission: Emission) -> None:
        """Keep what policies in torch code know behind a step, and report what the op does not count of theirs."""
        is_emitted = emission.num_sampled[: len(done.node)] > 0
        begins = is_emitted & ~done.came_over
        for own in done.apart:
            theirs = blocks.slots[own.request]
            self.state.apart.keep(own.name, theirs, own.state, begins[own.request])
            behind = blocks.start[own.request] + self.state.block_length
            self.state.apart.keep_ended(own.name, theirs, own.ended, is_emitted[own.request], behind)
            # A canvas without masks may have taken a forward too.
            took = (done.num_steps[own.request] > 0) & (emission.report[own.request, Column.REFRESHES] == 0)
            emission.report[own.request, Column.FORWARDS] = took.int()
            # A look-ahead behind such a canvas has the depth 0, which the op does not count among the drafts.
            ahead = nodes.is_valid[own.request, 1:] & (nodes.depth[own.request, 1:] == 0)
            emission.report[own.request, Column.PROPOSED] += ahead.sum(1).int()

    def _logprobs(
        self, blocks: Blocks, nodes: Nodes, done: Trajectory, hidden: Tensor, ids: RowIds | None
    ) -> tuple[Asking, Unmasked, TokenLogprobs] | None:
        """Return those of the tokens that a step unmasked, of the requests that ask for them."""
        asking = self.state.records.asking(blocks.slots, blocks.slots_np)
        if asking is None:
            return None
        assert self.logprob_head is not None, "nobody may ask without"
        unmasked = Unmasked.of(nodes, done, asking.place, self.state.mask_token_id)
        return asking, unmasked, unmasked.log_probs(self.logprob_head, hidden, ids, asking.num_top, asking.keeps_mask)

    def _under_constraints(
        self, own: ConstrainedStep, blocks: Blocks, nodes: Nodes, stats: PartialStats, done: Trajectory
    ) -> Trajectory:
        """Decide the requests under a constraint again, as it has them unmask; the others did what `done` says."""
        request = to_device(own.request, blocks.slots.device)
        theirs = blocks.of(own.request)
        decided = walk(
            nodes.of(request),
            nodes.rows(stats, request),
            self.state.policy_params(theirs),
            self.state.mask_token_id,
            self.state.rules,
            {name: field[theirs.slots] for name, field in self.state.memory.items()} if done.state else NO_STATE,
            own.keep,
        )
        return done.with_those(request, decided)

    def reduce(self, hidden: Tensor, *, is_sampled: bool) -> None:
        """Do a step's work on rows that belong to nobody, for measurements of time and memory.

        Args:
            hidden: [num_rows, hidden_size].
            is_sampled: with noise and filters, which take the most memory.
        """
        sampling = None
        if is_sampled:
            zeros = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
            ones = torch.ones(len(hidden), dtype=torch.float64, device=hidden.device)
            wants_sampled = self.state.wants_sampled
            sampling = RowSampling(ones, zeros, 0.9 * ones, zeros, has_filter=True, wants_sampled=wants_sampled)
        self.head(hidden, sampling, POLICY_CANDIDATES if self.drafter is None else MAX_CANDIDATES)


def _asked(nodes: Nodes, asked: Tensor | None, asks: Tensor | None, end_ids: tuple[int, int]) -> Tensor | None:
    """Return the ids that policies ask for; [num_reqs, num_nodes, block_length, num_given] int64.

    Args:
        nodes: the canvases.
        asked: [num_reqs, block_length, num_given] int64, by what policies remember; None: nothing.
        asks: [2, num_reqs] bool, of whom the known tokens of each canvas are asked for, and of whom the end tokens;
            None: of nobody.
        end_ids: those.
    """
    ids = None if asked is None else asked[:, None].expand(-1, nodes.depth.shape[1], -1, -1)
    if asks is None:
        return ids
    known = torch.where(asks[0, :, None, None] & ~nodes.is_masked, nodes.canvas, -1)[..., None]
    ends = torch.tensor(end_ids, device=known.device)
    own = torch.where(asks[1, :, None, None, None], ends, pad(known, (0, 1), value=-1))
    if ids is None:
        return own
    return torch.cat([torch.maximum(ids[..., :2], own), ids[..., 2:]], -1)  # nobody asks for more than one of these


def _row_ids(nodes: Nodes, asked: Tensor | None, edits: RowEdits | None, guidance: Guidance | None) -> RowIds | None:
    """Return which ids evaluated rows ask for, of those that policies ask for, and may take, by their constraints.

    Args:
        nodes: the canvases.
        asked: [num_reqs, num_nodes, block_length, num_given] int64.
        edits, guidance: of the rows.
    """
    if asked is None and nodes.constrained is None and edits is None and guidance is None:
        return None
    given = allowed = None
    if asked is not None:
        given = nodes.per_evaluated(asked).flatten(0, 1).contiguous()
    if nodes.constrained is not None:
        place, sets = nodes.constrained.row_bits(len(nodes.canvas), nodes.canvas.device)
        allowed = sets[nodes.per_evaluated(place).flatten()]
    return RowIds(given, allowed, edits, guidance)
