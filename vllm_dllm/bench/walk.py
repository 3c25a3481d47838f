"""A step's decisions for the whole batch: our kernels against the same in tensor code."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_dllm import ops
from vllm_dllm.bench.turns import Contestant, UnequalResultsError
from vllm_dllm.draft.compile import compile_graph
from vllm_dllm.draft.graph import MAX_CANDIDATES, DraftGraph
from vllm_dllm.draft.propose import DraftNoise, Roots, propose
from vllm_dllm.draft.verify import accept
from vllm_dllm.unmask.stats import Candidates

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

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
    op_arguments = (
        _tensors(graph.packed),
        (graph.readiness.slope, *graph.readiness.near, graph.readiness.bias),
        [roots.canvas, roots.is_masked, roots.is_new, *_tensors(roots.candidates)],
        [] if draft_noise is None else _tensors(draft_noise),
        graph.is_one_by_one,
        graph.num_vocab_ranks,
        len(FORMULAS),
    )
    theirs = propose(graph, roots, draft_noise)
    canvas, is_valid, *_ = ops.propose_nodes(*op_arguments)
    _check_equal("propose_nodes", [canvas, is_valid], [theirs.canvas, theirs.is_valid])
    return {
        "csrc": lambda _: ops.propose_nodes(*op_arguments),
        "torch": lambda _: propose(graph, roots, draft_noise),
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
    walk = accept(canvas, next_canvas, is_valid)
    _check_equal("verify_walk", ops.verify_walk(canvas, next_canvas, is_valid), [walk.node, walk.num_accepted])
    return {
        "csrc": lambda _: ops.verify_walk(canvas, next_canvas, is_valid),
        "torch": lambda _: accept(canvas, next_canvas, is_valid),
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


def _tensors(value: "DataclassInstance") -> list[Tensor]:
    """Return the fields, in order."""
    return [getattr(value, field.name) for field in fields(value)]


def _check_equal(op: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    if not all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True)):
        raise UnequalResultsError(f"{op}: csrc and torch differ")
