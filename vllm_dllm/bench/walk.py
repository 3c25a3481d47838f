"""A step's decisions for the whole batch: our kernels against the same in tensor code."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_dllm.bench.turns import Contestant, UnequalResultsError
from vllm_dllm.draft.compile import compile_graph
from vllm_dllm.draft.graph import MAX_CANDIDATES, DraftGraph
from vllm_dllm.draft.native import BY_OPS, BY_TORCH
from vllm_dllm.draft.propose import DraftNoise, Roots
from vllm_dllm.unmask.stats import Candidates

FORMULAS = (
    ((0, 0),),
    ((0, 0), (1, 0)),
    ((1, 0),),
    ((0, 0), (1, 0), (2, 0)),
    ((0, 0), (2, 0)),
    ((0, 1),),
    ((0, 0), (1, 0), (2, 0), (3, 0)),
    ((1, 0), (2, 0)),
    ((0, 0), (1, 1)),
    ((0, 0), (1, 0), (2, 0), (3, 0), (4, 0)),
)
"""A graph as calibration makes them."""

_VOCAB_SIZE = 126_464
_MASK_ID = _VOCAB_SIZE - 1


@dataclass(frozen=True, slots=True)
class WalkProblem:
    """Requests in the middle of a block."""

    num_requests: int
    block_length: int
    has_noise: bool
    device: torch.device


def propose_contestants(problem: WalkProblem) -> dict[str, Contestant]:
    """Return who can fill the nodes of a graph, after comparing the canvases.

    Raises: UnequalResultsError.
    """
    graph = compile_graph(DraftGraph(FORMULAS, tokens_per_step=1), problem.device)
    roots, draft_noise = _roots(problem), _noise(problem) if problem.has_noise else None
    ours, theirs = (way.propose(graph, roots, draft_noise, len(FORMULAS)) for way in (BY_OPS, BY_TORCH))
    _check_equal("propose_nodes", [ours.canvas, ours.is_valid], [theirs.canvas, theirs.is_valid])
    return {
        "csrc": lambda _: BY_OPS.propose(graph, roots, draft_noise, len(FORMULAS)),
        "torch": lambda _: BY_TORCH.propose(graph, roots, draft_noise, len(FORMULAS)),
    }


def verify_contestants(problem: WalkProblem) -> dict[str, Contestant]:
    """Return who can walk along nodes that came true, every second one of a chain, after comparing where they end.

    Raises: UnequalResultsError.
    """
    num_nodes = 1 + len(FORMULAS)
    shape = (problem.num_requests, num_nodes, problem.block_length)
    canvas = torch.randint(_MASK_ID, shape, device=problem.device)
    next_canvas = canvas.roll(-1, dims=1)
    next_canvas[::2, num_nodes // 2 :] += 1
    is_valid = torch.ones(shape[:2], dtype=torch.bool, device=problem.device)
    ours, theirs = (way.accept(canvas, next_canvas, is_valid) for way in (BY_OPS, BY_TORCH))
    _check_equal("verify_walk", [ours.node, ours.num_accepted], [theirs.node, theirs.num_accepted])
    return {
        "csrc": lambda _: BY_OPS.accept(canvas, next_canvas, is_valid),
        "torch": lambda _: BY_TORCH.accept(canvas, next_canvas, is_valid),
    }


def _roots(problem: WalkProblem) -> Roots:
    """Make canvases whose second half is masked."""
    shape = (problem.num_requests, problem.block_length)
    canvas = torch.randint(_MASK_ID, shape, device=problem.device)
    is_masked = (torch.arange(problem.block_length, device=problem.device) >= problem.block_length // 2).expand(shape)
    canvas[is_masked] = _MASK_ID
    probs, token_ids = torch.rand(*shape, 64, device=problem.device, dtype=torch.float64).topk(MAX_CANDIDATES)
    log_probs = (8 * probs).log_softmax(-1) - 0.5
    return Roots(canvas, is_masked.contiguous(), ~is_masked, Candidates(token_ids, log_probs))


def _noise(problem: WalkProblem) -> DraftNoise:
    ones = torch.ones(problem.num_requests, dtype=torch.int64, device=problem.device)
    position = torch.arange(problem.block_length, device=problem.device).repeat(problem.num_requests, 1)
    return DraftNoise(
        seed=ones.cumsum(0),
        position=position,
        temperature=ones.double(),
        top_k=0 * ones,
        top_p=0.9 * ones.double(),
        is_random=ones > 1,
    )


def _check_equal(op: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    if not all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True)):
        raise UnequalResultsError(f"{op}: csrc and torch differ")
