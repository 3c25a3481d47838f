"""The canvases of a step, by slot: in torch, by a native op, and the choice between them."""

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_dllm import ops
from vllm_dllm.draft.compile import CompiledGraph
from vllm_dllm.draft.propose import Roots, likeliest_end, propose
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.drafts import DraftState
from vllm_dllm.unmask.walk import Nodes

Propose = Callable[[CompiledGraph, CanvasState, DraftState, Blocks, int, bool], Nodes]


def torch_nodes(
    graph: CompiledGraph,
    canvases: CanvasState,
    memory: DraftState,
    blocks: Blocks,
    num_drafts: int,
    looks_ahead: bool = False,
) -> Nodes:
    """Return the requests' own canvases and their best drafts; none is valid where the block has no step behind it.

    Args:
        graph: whose nodes are filled.
        canvases: the canvases, and what draws depend on.
        memory: the candidates of the last decided step of each slot.
        blocks: of the requests.
        num_drafts: how many of each, 0 to the graph's nodes.
        looks_ahead: whether a look-ahead comes behind them.
    """
    slots, mask_token_id = blocks.slots, canvases.mask_token_id
    roots = Nodes.of_roots(canvases.canvas[slots], mask_token_id)
    if num_drafts == 0 and not looks_ahead:
        return roots
    root, is_masked = roots.canvas[:, 0], roots.is_masked[:, 0]
    # Guesses beyond could not come true. Where the first position is masked nothing is known, so it has no rule here.
    is_new, is_open = memory.was_masked[slots] & ~is_masked, canvases.rules.leftmost_part(is_masked)
    origin = Roots(root, is_open, is_new, memory.candidates(slots), ranked(graph, canvases, memory, slots))
    noise, is_known = canvases.draft_noise(blocks), memory.is_known[slots]
    drafts = propose(graph, origin, noise, num_drafts)
    nodes = roots.with_drafts(drafts.canvas, drafts.is_valid & is_known[:, None], drafts.depth, mask_token_id)
    if not looks_ahead:
        return nodes
    has_next = blocks.start + canvases.block_length < canvases.seq_len[slots]
    return nodes.with_look_ahead(likeliest_end(graph, origin, noise), is_known & has_next, mask_token_id)


def ranked(graph: CompiledGraph, canvases: CanvasState, memory: DraftState, slots: Tensor) -> Tensor | None:
    """Return what the graph's ranker adds to the readiness of the canvases of slots; None without one."""
    if graph.ranker is None:
        return None
    is_masked = canvases.canvas[slots] == canvases.mask_token_id
    is_new = ~is_masked & memory.was_masked[slots]
    log_probs = memory.candidates(slots).log_probs
    return graph.ranker.terms(log_probs, canvases.rules.leftmost_part(is_masked), is_new)


def native_nodes(
    graph: CompiledGraph,
    canvases: CanvasState,
    memory: DraftState,
    blocks: Blocks,
    num_drafts: int,
    looks_ahead: bool = False,
) -> Nodes:
    """Do what `torch_nodes` does, in one launch behind those of a ranker; all tensors are contiguous."""
    readiness, tokens, packed = graph.readiness, graph.tokens, graph.packed
    has_drafts = num_drafts > 0 or looks_ahead
    terms = ranked(graph, canvases, memory, blocks.slots) if has_drafts else None
    canvas, is_masked, is_valid, depth, _node, _log_reach, *end = ops.propose_nodes(
        (packed.nodes, packed.pairs, packed.log_correction),
        (
            *(readiness.slope, *readiness.near, readiness.bias),
            *(() if tokens is None else (tokens.slope, tokens.slope_beside_new, *tokens.same)),
        ),
        (blocks.slots, blocks.start) if terms is None else (blocks.slots, blocks.start, terms),
        (canvases.canvas, *memory.tensors, canvases.seq_len),
        canvases.draft_params(blocks),
        graph.is_one_by_one,
        graph.num_vocab_ranks,
        num_drafts,
        looks_ahead,
        canvases.mask_token_id,
        canvases.rules.sub_block_length or 0,
    )
    return Nodes(canvas, is_masked, is_valid, depth, end[0] if end else None)


def choose_propose(device: torch.device) -> Propose:
    """Take the native op where it is built for the device, else its torch twin."""
    return ops.native_or_twin("propose_nodes", device.type, "Drafts are made", native_nodes, torch_nodes)
