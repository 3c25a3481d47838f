"""A step from its plan to its decision, as the runner's hooks hand it on: the plan on the device, and its canvases."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.arrays import to_device
from vllm_dllm.attention.layout import PagedIndex
from vllm_dllm.engine.plan import Role, StepPlan
from vllm_dllm.state.canvas import Blocks
from vllm_dllm.state.settle import Ledger
from vllm_dllm.state.step_rows import RowPlan
from vllm_dllm.unmask.walk import Nodes
from vllm_dllm.unmask.windows import OwnWindows

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch


@dataclass(frozen=True, slots=True)
class Special:
    """What the rows of a plan are that is not plain, on the device; fields as in `engine.plan.PlanRows`."""

    rows: RowPlan
    head: Tensor  # [num_decided, block_length] int64
    node: Tensor  # [num_reqs, num_nodes] int64
    place: Tensor  # [num_decided] int64, of each node that is evaluated among [num_reqs * num_nodes]
    fresh: Tensor  # [num_fresh] int64, evaluated nodes with the row left of their block
    planned: Tensor  # [3, num_reqs] int64, as in `state.settle.Ledger`
    twin_head: Tensor  # [num_twins, block_length] int64
    twin_of: Tensor  # [num_twins] int64


@dataclass(frozen=True, slots=True)
class Step:
    """The requests of a batch that take a step, its first ones, and what they evaluate."""

    batch: "InputBatch"
    plan: StepPlan
    blocks: Blocks
    ledger: Ledger
    special: Special | None  # None: the plan is plain
    nodes: Nodes  # the canvases
    store: PagedIndex | None = None  # where each row's K/V go, once the rows are made; None: nowhere
    may_be_void: bool = False  # as in `engine.report.StepOrder`
    windows: OwnWindows | None = None  # of the canvases, where those are windows that slide

    def head_rows(self, *, logit_shift: bool) -> Tensor | slice:
        """Return the rows of the forward that go to the LM head, those of a node together, behind all those of twins.

        Args:
            logit_shift: as in `StepPlan.rows`.
        """
        if self.special is not None:
            own, twins = self.special.head.flatten(), self.special.twin_head.flatten()
            return torch.cat([own, twins]) if len(twins) else own
        num_rows = self.plan.num_rows
        if not logit_shift:
            return slice(num_rows)
        return (torch.arange(num_rows, device=self.blocks.slots.device) - 1).clamp(min=0)


def rows_to_device(plan: StepPlan, device: torch.device, *, logit_shift: bool = False) -> Special | None:
    """Copy what the device must know of a plan's rows where the plan is not plain, in one copy.

    Args:
        plan: of the step.
        device: of the results.
        logit_shift: as in `StepPlan.rows`.
    """
    if plan.is_plain:
        return None
    rows = plan.rows(logit_shift=logit_shift)
    arrays = (
        rows.request,
        rows.source,
        plan.position,
        rows.is_stored,
        rows.head,
        rows.node,
        np.flatnonzero(rows.node.ravel() >= 0),
        np.flatnonzero(rows.is_left_fresh),
        np.stack([plan.has(Role.REFRESH), plan.has(Role.COMMIT), plan.num_stored]),
        rows.twin_head,
        rows.twin_of,
    )
    packed = to_device(np.concatenate([array.ravel() for array in arrays], dtype=np.int64), device)
    parts = [part.view(array.shape) for part, array in zip(packed.split([a.size for a in arrays]), arrays, strict=True)]
    return Special(RowPlan(*parts[:4]), *parts[4:])
