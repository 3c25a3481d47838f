"""The end of a step: finished blocks are emitted, what was done is reported, the next step's start is kept by slot.

`settle` states it in tensor code; the op `settle_step` does the same in one launch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_dllm import ops
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.drafts import DraftState
from vllm_dllm.state.records import EmittedLogprobs
from vllm_dllm.state.report import REPORT_LEN, StepFacts
from vllm_dllm.unmask.walk import Nodes, Trajectory


@dataclass(frozen=True, slots=True)
class Ledger:
    """What was settled of a step before its forward."""

    num_batch: int  # requests of the batch, those that take the step first
    num_known: Tensor  # [num_reqs] int64, tokens; those behind the block's start are a partial block's
    num_counted: Tensor  # [num_reqs] int64, tokens that vLLM counts as scheduled drafts
    # [3, num_reqs] int64: whether the step refreshes, whether it commits, and the positions whose K/V are stored, but
    # for those of look-aheads. None: it stores nothing.
    planned: Tensor | None = None
    # [num_reqs] int64, 1 where the step decided the first position of a block by a row that says nothing of the others.
    begun: Tensor | None = None  # None: nowhere
    missing: Tensor | None = None  # [num_reqs] int64, positions that a short block has fewer; None: none is short

    def emission(self, sampled: Tensor, num_sampled: Tensor, facts: StepFacts) -> "Emission":
        """Return what the step comes to.

        Args:
            sampled: [num_reqs, block_length] int64, ids, the first of which are emitted.
            num_sampled: [num_reqs] int64, how many of them.
            facts: what the step did.
        """
        columns = (sampled, num_sampled, self.num_counted - num_sampled, facts.rows())
        others = self.num_batch - len(num_sampled)
        return Emission(*(pad(each.int(), (0, 0) * (each.dim() - 1) + (0, others)) for each in columns))


@dataclass(frozen=True, slots=True)
class Emission:
    """What a step comes to for all of its batch; 0 for who did not take it."""

    sampled: Tensor  # [num_batch, block_length] int32, the block from what was unknown of it on
    num_sampled: Tensor  # [num_batch] int32, how many of them are emitted, 0 where the block goes on
    num_rejected: Tensor  # [num_batch] int32, the rest of the tokens that vLLM counts
    report: Tensor  # [num_batch, REPORT_LEN] int32
    logprobs: EmittedLogprobs | None = field(default=None, kw_only=True)  # None: nobody asks


Settle = Callable[[CanvasState, DraftState | None, Blocks, Nodes, Trajectory, Ledger], Emission]


def settle(
    state: CanvasState, drafts: DraftState | None, blocks: Blocks, nodes: Nodes, done: Trajectory, ledger: Ledger
) -> Emission:
    """Settle a step.

    A block is emitted when it is finished, and when a step unmasked the last position before its answer's end: whoever
    gets the tokens reads none behind it, and the request ends.

    Args:
        state: canvases and what policies remember of them; of a block that was emitted and did not go over to the next
            one, the next one is begun.
        drafts: gets the candidates of the last canvas decided; None where nothing is drafted.
        blocks: of the requests, no request twice.
        nodes: what was evaluated.
        done: what came of it.
        ledger: of the step.
    """
    ended = state.ends.reached(blocks.slots, state.positions(blocks), done.canvas, state.mask_token_id)
    is_emitted = done.is_finished | (ended & (done.num_unmasked > 0))
    begins = is_emitted & ~done.came_over
    state.canvas[blocks.slots] = done.next_canvas
    state.remember(blocks.slots, done.state)
    state.reset(blocks.slots, begins)
    if drafts is not None:
        _, was_masked = nodes.at(done.node)
        drafts.put(blocks.slots, done.candidates, was_masked)
        drafts.forget(blocks.slots, begins)
    block_length = state.block_length
    known = (ledger.num_known - blocks.start)[:, None]
    columns = torch.arange(block_length, device=known.device) + known
    num_sampled = is_emitted * (block_length - known[:, 0])
    left = is_emitted * (done.canvas == state.mask_token_id).sum(1)
    facts = _facts(blocks, nodes, done, ledger, is_emitted, left)
    return ledger.emission(done.canvas.gather(1, columns.clamp(max=block_length - 1)), num_sampled, facts)


def native_settle(
    state: CanvasState, drafts: DraftState | None, blocks: Blocks, nodes: Nodes, done: Trajectory, ledger: Ledger
) -> Emission:
    """Do what `settle` does, in one launch; all tensors are contiguous."""
    trajectory = [done.canvas, done.next_canvas, done.node, done.num_steps, done.num_unmasked, done.is_finished]
    candidates = [done.candidates.token_ids, done.candidates.log_probs]
    requests = [blocks.slots, blocks.start, ledger.num_known, ledger.num_counted]
    memory = [state.memory[name] for name in done.state]
    return Emission(
        *ops.settle_step(
            [nodes.canvas, nodes.is_valid, nodes.depth],
            [*trajectory, done.came_over, *candidates, *done.state.values()],
            requests if ledger.planned is None else [*requests, ledger.planned],
            [state.canvas, *([] if drafts is None else drafts.tensors), *memory],
            state.ends.tensors,
            ledger.num_batch,
            REPORT_LEN,
            state.mask_token_id,
        )
    )


def choose_settle(device: torch.device) -> Settle:
    """Take the native op where it is built for the device, else its torch twin."""
    return ops.native_or_twin("settle_step", device.type, "Steps are settled", native_settle, settle)


def _facts(
    blocks: Blocks, nodes: Nodes, done: Trajectory, ledger: Ledger, is_emitted: Tensor, left: Tensor
) -> StepFacts:
    """Put together what a step did for each request."""
    is_masked = nodes.is_masked[:, 0].any(1)
    none = torch.zeros_like(done.node)
    refreshes, commits, num_stored = (none, none, none) if ledger.planned is None else ledger.planned
    over = done.came_over * nodes.canvas.shape[2]
    return StepFacts(
        forwards=(is_masked | done.came_over) & (refreshes == 0),
        refreshes=refreshes,
        unmasked=done.num_unmasked,
        accepted=done.num_accepted,
        finished=is_emitted,
        stored=blocks.start + over,
        wrote=num_stored + over,
        commits=commits,
        left=left,
        depth=nodes.depth[:, 1:],
        proposed=nodes.is_valid[:, 1:] & is_masked[:, None],
    )
