"""What the rows of a forward are: their tokens, their positions, and where their K/V go."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_dllm.ops.load import check_one_device, require


def step_rows(  # noqa: PLR0913 - the arguments of the op, once per step
    canvas: Tensor,
    end: Tensor | None,
    requests: Sequence[Tensor],
    plan: Sequence[Tensor],
    known: Tensor,
    pages: Tensor | None,
    page_size: int,
    into: Sequence[Tensor],
    mask_token_id: int,
    null_page: int,
) -> list[Tensor]:
    """Write the rows of a step; does what `state.step_rows.torch_rows` does, which states it.

    All tensors are contiguous; the rows of `known` and `pages` may lie apart.

    Args:
        canvas: [num_reqs, num_canvases, block_length] int64.
        end: [num_reqs, block_length] int64 of look-aheads.
        requests: slots and start, [num_reqs] int64 each.
        plan: request, source, position and is_stored of each row, [num_rows] int64 each, as in `engine.plan.PlanRows`;
            empty where the rows are those of the canvases, and nothing is stored.
        known: [num_slots, max_len] int32, known tokens.
        pages: [num_reqs or more, max_pages] int32; None: nothing is stored.
        page_size: positions per page.
        into: written to, input_ids [num_rows] int32 and positions [num_rows] int64.
        mask_token_id: what stands for masked.
        null_page: the page of rows that are not stored.

    Returns: page and offset in it of each row, [num_rows] int64, without rows where nothing is stored.

    Raises:
        KernelUnavailable: the op is not built for the device of the canvases.
        RuntimeError: an argument breaks the rules above; the message names it.
    """
    require("step_rows", canvas.device.type)
    places: list[Tensor] = torch.ops.vllm_dllm.step_rows(
        canvas, end, requests, plan, known, pages, page_size, into, mask_token_id, null_page
    )
    return places


def fake(  # noqa: PLR0913 - as above
    canvas: Tensor,
    end: Tensor | None,
    requests: Sequence[Tensor],
    plan: Sequence[Tensor],
    known: Tensor,
    pages: Tensor | None,
    page_size: int,
    into: Sequence[Tensor],
    mask_token_id: int,
    null_page: int,
) -> list[Tensor]:
    """Return empty places."""
    check_one_device("step_rows", canvas, end, *requests, *plan, known, pages, *into)
    num_rows = 0 if pages is None or not plan else into[0].shape[0]
    return [canvas.new_empty(num_rows), canvas.new_empty(num_rows)]
