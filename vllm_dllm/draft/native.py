"""The functions of drafts by native ops, and the choice between them and their torch twins."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_dllm import ops
from vllm_dllm.draft import propose, verify
from vllm_dllm.draft.compile import CompiledGraph
from vllm_dllm.draft.propose import DraftNoise, Drafts, Roots
from vllm_dllm.draft.verify import Walk
from vllm_dllm.errors import KernelUnavailable

logger = logging.getLogger("vllm.dllm")


@dataclass(frozen=True, slots=True)
class DraftFunctions:
    """What decides about drafts in a step."""

    accept: Callable[[Tensor, Tensor, Tensor], Walk]
    propose: Callable[[CompiledGraph, Roots, DraftNoise | None, int], Drafts]


def native_accept(canvas: Tensor, next_canvas: Tensor, is_valid: Tensor) -> Walk:
    """Do what `draft.verify.accept` does, in one launch; its canvases are contiguous."""
    return Walk(*ops.verify_walk(canvas, next_canvas, is_valid))


def native_propose(graph: CompiledGraph, roots: Roots, draft_noise: DraftNoise | None, num_drafts: int) -> Drafts:
    """Do what `draft.propose.propose` does, in one launch; all tensors are contiguous."""
    readiness, packed, candidates = graph.readiness, graph.packed, roots.candidates
    noise: tuple[Tensor, ...] = ()
    if draft_noise is not None:
        n = draft_noise
        noise = (n.seed, n.position, n.temperature, n.top_k, n.top_p, n.is_random)
    return Drafts(
        *ops.propose_nodes(
            (packed.nodes, packed.pairs, packed.log_correction),
            (readiness.slope, *readiness.near, readiness.bias),
            (roots.canvas, roots.is_masked, roots.is_new, candidates.token_ids, candidates.log_probs),
            noise,
            graph.is_one_by_one,
            graph.num_vocab_ranks,
            num_drafts,
        )
    )


BY_TORCH = DraftFunctions(verify.accept, propose.propose)
BY_OPS = DraftFunctions(native_accept, native_propose)


def choose_draft_functions(device: torch.device) -> DraftFunctions:
    """Take the native ops where they are built for the device, else their torch twins."""
    try:
        for op in ("propose_nodes", "verify_walk"):
            ops.require(op, device.type)
    except KernelUnavailable as error:
        logger.warning("Drafts are made and verified by torch: %s", error)
        return BY_TORCH
    logger.info("Drafts are made and verified by native ops for %s.", device.type)
    return BY_OPS
