"""The end of a step: what is emitted and reported, and what the next step starts from, by slot."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_dllm.ops.load import check_one_device, require


def settle_step(
    nodes: Sequence[Tensor],
    done: Sequence[Tensor],
    requests: Sequence[Tensor],
    stores: Sequence[Tensor],
    ends: Sequence[Tensor],
    num_batch: int,
    report_len: int,
    mask_token_id: int,
) -> list[Tensor]:
    """Settle a step; does what `state.settle.settle` does, which states it. All tensors are contiguous.

    Args:
        nodes: canvas, is_valid and depth of `unmask.walk.Nodes`.
        done: of `unmask.walk.Trajectory` canvas, next_canvas, node, num_steps, num_unmasked, is_finished, came_over, of
            its candidates token_ids and log_probs and, if a policy of the batch remembers something, of its state
            credit_ids and credits.
        requests: slots, start, num_known and num_counted, [num_reqs] int64 each, no slot twice; and
            `state.settle.Ledger.planned`, [3, num_reqs] int64, if the step stores something.
        stores: written to, [num_slots, ...] each: the canvas; `state.drafts.DraftState.tensors` if something is
            drafted; and the state in `done`, if there is one.
        ends: `state.ends.EndState.tensors`.
        num_batch: requests of the results, at least num_reqs.
        report_len: columns of a report.
        mask_token_id: what stands for masked in a canvas.

    Returns: the fields of `state.settle.Emission`.

    Raises:
        KernelUnavailable: the op is not built for the device of the canvases.
        RuntimeError: an argument breaks the rules above; the message names it.
    """
    require("settle_step", nodes[0].device.type)
    emission: list[Tensor] = torch.ops.vllm_dllm.settle_step(
        nodes, done, requests, stores, ends, num_batch, report_len, mask_token_id
    )
    return emission


def fake(
    nodes: Sequence[Tensor],
    done: Sequence[Tensor],
    requests: Sequence[Tensor],
    stores: Sequence[Tensor],
    ends: Sequence[Tensor],
    num_batch: int,
    report_len: int,
    mask_token_id: int,
) -> list[Tensor]:
    """Return an empty emission."""
    check_one_device("settle_step", *nodes, *done, *requests, *stores, *ends)
    canvas = nodes[0]
    shapes = ((num_batch, canvas.shape[2]), (num_batch,), (num_batch,), (num_batch, report_len))
    return [canvas.new_empty(shape, dtype=torch.int32) for shape in shapes]
