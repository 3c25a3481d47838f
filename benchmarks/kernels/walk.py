"""A step's decisions for the whole batch: our kernels against the same in tensor code."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernels.turns import Contestant, UnequalResultsError
from vllm_dllm.draft.compile import compile_graph
from vllm_dllm.draft.graph import MAX_CANDIDATES, DraftGraph
from vllm_dllm.draft.native import native_nodes, torch_nodes
from vllm_dllm.ops.vocab_stats import PartialStats
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.drafts import DraftState
from vllm_dllm.state.request_params import RequestParams
from vllm_dllm.unmask.policy import POLICY_IDS, PolicyParams
from vllm_dllm.unmask.schedule import UnmaskRules
from vllm_dllm.unmask.stats import Candidates
from vllm_dllm.unmask.walk import Nodes, native_walk, walk

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
"""A draft graph as calibration makes them."""

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
    """Return who can fill the nodes of a draft graph, after comparing the canvases.

    Raises: UnequalResultsError.
    """
    graph = compile_graph(DraftGraph(FORMULAS, tokens_per_step=1), problem.device)
    slots = torch.arange(problem.num_requests, device=problem.device)
    blocks = Blocks(slots, slots.cpu().numpy(), problem.block_length * slots)
    call = (graph, *_slots(problem), blocks, len(FORMULAS))
    ours, theirs = (way(*call) for way in (native_nodes, torch_nodes))
    _check_equal("propose_nodes", [ours.canvas, ours.is_valid], [theirs.canvas, theirs.is_valid])
    return {"csrc": lambda _: native_nodes(*call), "torch": lambda _: torch_nodes(*call)}


def decide_contestants(problem: WalkProblem) -> dict[str, Contestant]:
    """Return who can decide canvases of which the first half of a chain is accepted, after comparing where they end.

    Raises: UnequalResultsError.
    """
    nodes, stats, params = _forward(problem)
    ours, theirs = (way(nodes, stats, params, _MASK_ID, UnmaskRules()) for way in (native_walk, walk))
    _check_equal("decide_walk", [ours.canvas, ours.path], [theirs.canvas, theirs.path])
    return {
        "csrc": lambda _: native_walk(nodes, stats, params, _MASK_ID, UnmaskRules()),
        "torch": lambda _: walk(nodes, stats, params, _MASK_ID, UnmaskRules()),
    }


def _forward(problem: WalkProblem) -> tuple[Nodes, PartialStats, PolicyParams]:
    """Make masked roots whose positions are unmasked from left to right, one a step, half of which was drafted."""
    num_nodes, length = 1 + len(FORMULAS), problem.block_length
    shape = (problem.num_requests, num_nodes, length)
    token_ids = torch.randint(_MASK_ID, (problem.num_requests, 1, length), device=problem.device).expand(shape)
    num_unmasked = torch.arange(num_nodes, device=problem.device)
    num_unmasked[num_nodes // 2 :] += length
    is_masked = (torch.arange(length, device=problem.device) >= num_unmasked[:, None]).expand(shape)
    canvas = torch.where(is_masked, _MASK_ID, token_ids)
    is_valid = torch.ones(shape[:2], dtype=torch.bool, device=problem.device)
    num_rows = canvas.numel()
    logits = torch.randn(num_rows, MAX_CANDIDATES, device=problem.device).sort(1, descending=True).values
    ones = torch.ones(num_rows, dtype=torch.float64, device=problem.device)
    stats = PartialStats(
        top_ids=torch.randint(_MASK_ID, (num_rows, MAX_CANDIDATES), device=problem.device),
        top_logits=logits,
        rest=ones,
        weighted=-ones,
        token_ids=token_ids.flatten(),
        token_logits=logits[:, 0].contiguous(),
        scores=ones,
    )
    return Nodes(canvas, is_masked.contiguous(), is_valid, is_valid.long()), stats, _from_left_to_right(problem)


def _from_left_to_right(problem: WalkProblem) -> PolicyParams:
    """Return the policy `sequential`, one position a step."""
    zeros = torch.zeros(problem.num_requests, dtype=torch.int64, device=problem.device)
    table = torch.ones(problem.block_length, problem.num_requests, dtype=torch.int64, device=problem.device)
    return PolicyParams(
        policy_id=zeros + POLICY_IDS["sequential"],
        seed=zeros,
        prompt_len=zeros,
        start=zeros,
        threshold=zeros.double(),
        factor=zeros.double(),
        entropy_bound=zeros.double(),
        credit_alpha=zeros.double(),
        credit_beta=zeros.double(),
        credit_gamma=zeros.double(),
        alg_temp=zeros.double(),
        temperature=zeros.double(),
        counts=table,
        times=0.0 * table.double(),
        policies=("sequential",),
        has_alg_temp=False,
    )


def _slots(problem: WalkProblem) -> tuple[CanvasState, DraftState]:
    """Fill the slots of canvases whose second half is masked, and of the steps that made them."""
    length = problem.block_length
    canvases = CanvasState(problem.num_requests, length, _MASK_ID, problem.device)
    for slot in range(problem.num_requests):
        canvases.add_request(slot, _request(problem, slot))
    canvases.apply_staged_writes()
    canvases.canvas.random_(_MASK_ID)
    canvases.canvas[:, length // 2 :] = _MASK_ID
    shape = (problem.num_requests, length, 64)
    probs, token_ids = torch.rand(shape, device=problem.device, dtype=torch.float64).topk(MAX_CANDIDATES)
    memory = DraftState(canvases)
    slots, was_masked = torch.arange(problem.num_requests, device=problem.device), torch.ones_like(canvases.canvas)
    memory.put(slots, Candidates(token_ids, (8 * probs).log_softmax(-1) - 0.5), was_masked.bool())
    return canvases, memory


def _request(problem: WalkProblem, slot: int) -> RequestParams:
    """Return a request that draws where the problem has noise, all but the first one positions too."""
    is_random = problem.has_noise and slot > 0
    return RequestParams(
        policy_id=POLICY_IDS["random" if is_random else "static"],
        threshold=0.9,
        factor=1.0,
        entropy_bound=0.1,
        credit_alpha=0.0,
        credit_beta=0.0,
        credit_gamma=0.0,
        alg_temp=0.0,
        counts=(1,) * problem.block_length,
        times=(0.0,) * problem.block_length,
        prompt_len=0,
        seq_len=2**20,
        temperature=float(problem.has_noise),
        top_k=0,
        top_p=0.9,
        seed=1 + slot,
    )


def _check_equal(op: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    if not all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True)):
        raise UnequalResultsError(f"{op}: csrc and torch differ")
