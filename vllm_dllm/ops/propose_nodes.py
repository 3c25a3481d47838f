"""The drafts of some requests: the nodes of a draft graph, filled, those first that are likeliest reached."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_dllm.ops.load import check_one_device, require


def propose_nodes(
    graph: Sequence[Tensor],
    readiness: Sequence[float],
    roots: Sequence[Tensor],
    draft_noise: Sequence[Tensor],
    is_one_by_one: bool,
    num_vocab_ranks: int,
    num_drafts: int,
) -> list[Tensor]:
    """Fill the nodes of a graph and keep the best; does what `draft.propose.propose` does, which states it.

    Log probabilities agree to rounding, so nodes whose scores are equal but for rounding may change places. What an
    invalid node holds is open. All tensors are contiguous.

    Args:
        graph: the fields of `draft.compile.PackedGraph`.
        readiness: slope, near[0], near[1], bias of `draft.readiness.Readiness`.
        roots: canvas [num_reqs, block_length] int64, is_masked and is_new [num_reqs, block_length] bool, and of each
            position's candidates token_ids int64 and log_probs float64 [num_reqs, block_length, num_candidates].
        draft_noise: the fields of `draft.propose.DraftNoise`; empty when all requests are greedy and none has the
            policy `random`.
        is_one_by_one: whether every step unmasks one position.
        num_vocab_ranks: 1 + the graph's largest vocab rank, at most num_candidates.
        num_drafts: how many to keep, at most the graph's nodes.

    Returns: the fields of `draft.propose.Drafts`.

    Raises:
        KernelUnavailable: the op is not built for the device of the roots.
        RuntimeError: an argument breaks the rules above; the message names it.
    """
    require("propose_nodes", roots[0].device.type)
    drafts: list[Tensor] = torch.ops.vllm_dllm.propose_nodes(
        graph, readiness, roots, draft_noise, is_one_by_one, num_vocab_ranks, num_drafts
    )
    return drafts


def fake(
    graph: Sequence[Tensor],
    readiness: Sequence[float],
    roots: Sequence[Tensor],
    draft_noise: Sequence[Tensor],
    is_one_by_one: bool,
    num_vocab_ranks: int,
    num_drafts: int,
) -> list[Tensor]:
    """Return empty drafts: canvas, is_valid, node, depth, log_reach."""
    check_one_device("propose_nodes", *graph, *roots, *draft_noise)
    canvas = roots[0]
    shape = (canvas.shape[0], num_drafts)
    return [
        canvas.new_empty((*shape, canvas.shape[1])),
        canvas.new_empty(shape, dtype=torch.bool),
        canvas.new_empty(shape),
        canvas.new_empty(shape),
        canvas.new_empty(shape, dtype=torch.float64),
    ]
