"""Which K/V a delayed refresh leaves as they are (dKV-Cache, arXiv:2505.15781, variants Decode and PD).

A token's K/V are computed once more in the step behind the one that unmasked it, and stay then, until all are computed
anew. So a step computes what was masked before the step before. Where a row predicts the next position, it stays from
when *that* was known, as the published code has it for Dream (`shift_type` "un"): its own token may be masked.

The host does not know the canvases. A delayed refresh has the rows of the block and of all that follows, each of which
attends to what is stored alone; those that stay are computed for nothing and not stored.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_dllm.attention.layout import PagedIndex
from vllm_dllm.names import DELAYED
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.step_rows import FillRows, RowInputs, RowPlan, Sequences
from vllm_dllm.unmask.walk import Nodes

IF_NEW = 2
"""Marks rows of a plan that are stored unless they stay as they are."""


@dataclass(frozen=True, slots=True)
class DelayedRows:
    """Fills rows as `fill` does, and keeps by slot what was known of each block before its last step.

    Attributes:
        fill: the way that a server takes.
        state: the canvases.
        known: [max_num_reqs, block_length] bool.
    """

    fill: FillRows
    state: CanvasState
    known: Tensor

    @classmethod
    def around(cls, fill: FillRows, state: CanvasState, kv_policy: str) -> FillRows:
        """Return what fills the rows of a server's steps."""
        if kv_policy not in DELAYED:
            return fill
        return cls(fill, state, torch.zeros_like(state.canvas, dtype=torch.bool))

    def __call__(
        self, nodes: Nodes, blocks: Blocks, plan: RowPlan | None, known: Sequences, into: RowInputs, mask_token_id: int
    ) -> PagedIndex | None:
        """Implement `FillRows`."""
        assert plan is not None, "each step of this policy stores"
        return self.fill(nodes, blocks, self.decided(blocks, plan), known, into, mask_token_id)

    def decided(self, blocks: Blocks, plan: RowPlan) -> RowPlan:
        """Return the rows of a step where it is decided which are stored; take note of the canvases."""
        now = self.state.canvas[blocks.slots] != self.state.mask_token_id
        before = self.known[blocks.slots] & now  # a policy may have masked a token again
        self.known[blocks.slots] = now
        predicted = plan.position + self.state.keeps_left  # by each row
        offset = predicted - blocks.start[plan.request]
        is_inside = (offset >= 0) & (offset < before.shape[1])
        stays = is_inside & before[plan.request, offset.clamp(0, before.shape[1] - 1)]
        if self.state.keeps_left:  # the last row predicts nothing
            stays |= predicted == self.state.seq_len[blocks.slots][plan.request]
        is_stored = torch.where(plan.is_stored == IF_NEW, (~stays).long(), plan.is_stored)
        return replace(plan, is_stored=is_stored)
