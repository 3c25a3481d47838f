"""A step from its plan to its decision, as the runner's hooks hand it on: the plan on the device, and its canvases."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.attention.layout import PagedIndex, pinned
from vllm_dllm.engine.plan import Role, StepPlan
from vllm_dllm.state.canvas import Blocks
from vllm_dllm.state.settle import Ledger
from vllm_dllm.unmask.walk import Nodes

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch

NULL_PAGE = 0
"""vLLM's page that belongs to nobody: what is stored there is never read."""


@dataclass(frozen=True, slots=True)
class Special:
    """What the rows of a plan are that is not plain, on the device; fields as in `engine.plan.PlanRows`."""

    request: Tensor  # [num_rows] int64
    source: Tensor  # [num_rows] int64
    is_stored: Tensor  # [num_rows] bool
    head: Tensor  # [num_decided, block_length] int64
    node: Tensor  # [num_reqs, num_nodes] int64
    place: Tensor  # [num_decided] int64, of each node that is evaluated among [num_reqs * num_nodes]
    fresh: Tensor  # [num_fresh] int64, evaluated nodes with the row left of their block
    planned: Tensor  # [3, num_reqs] int64, as in `state.settle.Ledger`


@dataclass(frozen=True, slots=True)
class Step:
    """The requests of a batch that take a step, its first ones, and what they evaluate."""

    batch: "InputBatch"
    plan: StepPlan
    blocks: Blocks
    ledger: Ledger
    position: Tensor  # [num_rows] int64
    special: Special | None  # None: the plan is plain
    nodes: Nodes  # the canvases

    def head_rows(self, *, logit_shift: bool) -> Tensor | slice:
        """Return the rows of the forward that go to the LM head, those of a node together.

        Args:
            logit_shift: as in `StepPlan.rows`.
        """
        if self.special is not None:
            return self.special.head.flatten()
        num_rows = self.plan.num_rows
        if not logit_shift:
            return slice(num_rows)
        return (torch.arange(num_rows, device=self.position.device) - 1).clamp(min=0)

    def input_ids(self, all_token_ids: Tensor, mask_token_id: int) -> Tensor:
        """Return the token of each row; [num_rows] int64.

        Args:
            all_token_ids: [num_slots, max_model_len], the known tokens.
            mask_token_id: what stands for masked.
        """
        canvases = self.nodes.canvas.flatten()
        if self.special is None:
            return canvases
        ends = [] if self.nodes.end is None else [self.nodes.end.flatten()]
        canvases = torch.cat([canvases, *ends, canvases.new_full((1,), mask_token_id)])
        known = all_token_ids[self.blocks.slots[self.special.request], self.position].long()
        return torch.where(self.special.source < 0, known, canvases[self.special.source])

    def store(self, page_table: Tensor, page_size: int) -> PagedIndex | None:
        """Return where each row's K/V go; None where nothing is stored.

        Args:
            page_table: [num_reqs or more, max_pages] int32, of the batch.
            page_size: positions per page.
        """
        if self.special is None or not self.plan.stores.any():
            return None
        page = page_table[self.special.request, self.position // page_size].long()
        return PagedIndex(page.masked_fill(~self.special.is_stored, NULL_PAGE), self.position % page_size)


def rows_to_device(plan: StepPlan, device: torch.device, *, logit_shift: bool = False) -> tuple[Tensor, Special | None]:
    """Copy what the device must know of a plan's rows: positions, and what is special of them; in one copy.

    Args:
        plan: of the step.
        device: of the results.
        logit_shift: as in `StepPlan.rows`.
    """
    if plan.is_plain:
        return pinned(plan.position, device).to(device, non_blocking=True), None
    rows = plan.rows(logit_shift=logit_shift)
    arrays = (
        plan.position,
        rows.request,
        rows.source,
        rows.is_stored,
        rows.head,
        rows.node,
        np.flatnonzero(rows.node.ravel() >= 0),
        np.flatnonzero(rows.is_left_fresh),
        np.stack([plan.has(Role.REFRESH), plan.has(Role.COMMIT), plan.num_stored]),
    )
    flat = np.concatenate([array.ravel() for array in arrays], dtype=np.int64)
    packed = pinned(flat, device).to(device, non_blocking=True)
    parts = [part.view(array.shape) for part, array in zip(packed.split([a.size for a in arrays]), arrays, strict=True)]
    position, request, source, is_stored, head, node, place, fresh, planned = parts
    return position, Special(request, source, is_stored.bool(), head, node, place, fresh, planned)
