"""Drafts by a native op, and the choice between it and its torch twin."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from vllm_dllm import ops
from vllm_dllm.draft.compile import CompiledGraph
from vllm_dllm.draft.propose import DraftNoise, Drafts, Roots, propose
from vllm_dllm.errors import KernelUnavailable

logger = logging.getLogger("vllm.dllm")


Propose = Callable[[CompiledGraph, Roots, DraftNoise | None, int], Drafts]


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


def choose_propose(device: torch.device) -> Propose:
    """Take the native op where it is built for the device, else its torch twin."""
    try:
        ops.require("propose_nodes", device.type)
    except KernelUnavailable as error:
        logger.warning("Drafts are made by torch: %s", error)
        return propose
    logger.info("Drafts are made by a native op for %s.", device.type)
    return native_propose
