"""What the rows of a step's forward are: their tokens and positions, and where their K/V go.

`torch_rows` states it in tensor code; the op `step_rows` does the same in one launch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_dllm import ops
from vllm_dllm.attention.layout import PagedIndex
from vllm_dllm.state.canvas import Blocks
from vllm_dllm.unmask.walk import Nodes

NULL_PAGE = 0
"""vLLM's page that belongs to nobody: what is stored there is never read."""


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What the rows are where they are not just those of the canvases; [num_rows] int64 each, see `engine.plan`."""

    request: Tensor
    source: Tensor
    position: Tensor
    is_stored: Tensor  # 0 or 1


@dataclass(frozen=True, slots=True)
class Sequences:
    """What is known of the requests' sequences."""

    token_ids: Tensor  # [num_slots, max_len] int32
    pages: Tensor | None = None  # [num_reqs or more, max_pages] int32; None: nothing is stored
    page_size: int = 0  # positions per page


@dataclass(frozen=True, slots=True)
class RowInputs:
    """Where the model reads its rows."""

    input_ids: Tensor  # [num_rows] int32
    positions: Tensor  # [num_rows] int64


FillRows = Callable[[Nodes, Blocks, RowPlan | None, Sequences, RowInputs, int], PagedIndex | None]


def torch_rows(
    nodes: Nodes, blocks: Blocks, plan: RowPlan | None, known: Sequences, into: RowInputs, mask_token_id: int
) -> PagedIndex | None:
    """Write the rows of a step; returns where their K/V go, None where nothing is stored.

    Args:
        nodes: the canvases.
        blocks: of their requests.
        plan: of the rows; None: they are those of the canvases.
        known: of the requests.
        into: written to.
        mask_token_id: what stands for masked.
    """
    canvases = nodes.canvas.flatten()
    if plan is None:
        offset = torch.arange(nodes.canvas.shape[2], device=canvases.device)
        into.input_ids.copy_(canvases)
        into.positions.copy_((blocks.start[:, None, None] + offset).expand_as(nodes.canvas).flatten())
        return None
    ends = [] if nodes.end is None else [nodes.end.flatten()]
    tokens = torch.cat([canvases, *ends, canvases.new_full((1,), mask_token_id)])
    is_known = plan.source < 0
    own = known.token_ids[blocks.slots[plan.request], torch.where(is_known, plan.position, 0)].long()
    into.input_ids.copy_(torch.where(is_known, own, tokens[plan.source.clamp(min=0)]))
    into.positions.copy_(plan.position)
    if known.pages is None:
        return None
    is_stored = plan.is_stored > 0
    page = known.pages[plan.request, torch.where(is_stored, plan.position // known.page_size, 0)].long()
    return PagedIndex(page.masked_fill(~is_stored, NULL_PAGE), plan.position % known.page_size)


def native_rows(
    nodes: Nodes, blocks: Blocks, plan: RowPlan | None, known: Sequences, into: RowInputs, mask_token_id: int
) -> PagedIndex | None:
    """Do what `torch_rows` does, in one launch."""
    places = ops.step_rows(
        nodes.canvas,
        nodes.end,
        (blocks.slots, blocks.start),
        () if plan is None else (plan.request, plan.source, plan.position, plan.is_stored),
        known.token_ids,
        known.pages,
        known.page_size,
        (into.input_ids, into.positions),
        mask_token_id,
        NULL_PAGE,
    )
    return None if plan is None or known.pages is None else PagedIndex(*places)


def choose_rows(device: torch.device) -> FillRows:
    """Take the native op where it is built for the device, else its torch twin."""
    return ops.native_or_twin("step_rows", device.type, "Rows are filled", native_rows, torch_rows)
