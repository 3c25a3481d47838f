"""The canvases of a step: the requests' own, and the nodes of a draft graph, filled, that are likeliest reached."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_dllm.ops.load import check_one_device, require


def propose_nodes(  # noqa: PLR0913 - the arguments of the op, once per step
    graph: Sequence[Tensor],
    weights: Sequence[float],
    requests: Sequence[Tensor],
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    is_one_by_one: bool,
    num_vocab_ranks: int,
    num_drafts: int,
    looks_ahead: bool,
    mask_token_id: int,
    sub_block_length: int,
) -> list[Tensor]:
    """Fill the nodes of a graph and keep the best; does what `draft.native.torch_nodes` does, which states it.

    Log probabilities agree to rounding, so nodes whose scores are equal but for rounding may change places. What an
    invalid node holds is open. All tensors are contiguous.

    Args:
        graph: the fields of `draft.compile.PackedGraph`.
        weights: slope, near[0], near[1], bias of `draft.readiness.Readiness`, and with token weights slope,
            slope_beside_new and the four of same of `draft.token_weights.TokenWeights`.
        requests: slots and start, [num_reqs] int64 each, and with a ranker `draft.propose.Roots.terms`.
        state: by slot, canvas [num_slots, block_length] int64; `state.drafts.DraftState.tensors`, of candidates
            token_ids int64 and log_probs float64 [num_slots, block_length, num_candidates], was_masked [num_slots,
            block_length] bool and is_known [num_slots] bool; and seq_len [num_slots] int64.
        params: `state.canvas.CanvasState.draft_params`, [num_slots] each; empty when all requests are greedy and none
            has the policy `random`.
        is_one_by_one: whether every step unmasks one position.
        num_vocab_ranks: 1 + the graph's largest vocab rank, at most num_candidates.
        num_drafts: how many to keep, at most the graph's nodes.
        looks_ahead: whether the last canvas is a look-ahead's next root.
        mask_token_id: what stands for masked in a canvas.
        sub_block_length: of parts of a block that are unmasked one after another; 0: it has none.

    Returns: of `unmask.walk.Nodes` canvas, is_masked, is_valid and depth; of `draft.propose.Drafts` node and log_reach;
        and with a look-ahead its end.

    Raises:
        KernelUnavailable: the op is not built for the device of the canvases.
        RuntimeError: an argument breaks the rules above; the message names it.
    """
    require("propose_nodes", requests[0].device.type)
    nodes: list[Tensor] = torch.ops.vllm_dllm.propose_nodes(
        graph,
        weights,
        requests,
        state,
        params,
        is_one_by_one,
        num_vocab_ranks,
        num_drafts,
        looks_ahead,
        mask_token_id,
        sub_block_length,
    )
    return nodes


def fake(  # noqa: PLR0913 - as above
    graph: Sequence[Tensor],
    weights: Sequence[float],
    requests: Sequence[Tensor],
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    is_one_by_one: bool,
    num_vocab_ranks: int,
    num_drafts: int,
    looks_ahead: bool,
    mask_token_id: int,
    sub_block_length: int,
) -> list[Tensor]:
    """Return empty canvases."""
    check_one_device("propose_nodes", *graph, *requests, *state, *params)
    canvas, num_reqs = state[0], requests[0].shape[0]
    shape, drafts = (num_reqs, 1 + num_drafts + looks_ahead), (num_reqs, num_drafts)
    return [
        canvas.new_empty((*shape, canvas.shape[1])),
        canvas.new_empty((*shape, canvas.shape[1]), dtype=torch.bool),
        canvas.new_empty(shape, dtype=torch.bool),
        canvas.new_empty(shape),
        canvas.new_empty(drafts),
        canvas.new_empty(drafts, dtype=torch.float64),
        *([canvas.new_empty((num_reqs, canvas.shape[1]))] if looks_ahead else []),
    ]
