"""What drafts would have saved on recorded traces: the forwards that an engine with this graph would make.

Drafts are made and ordered by the engine's own `draft.propose`. Every step is verified as the engine does, by
equality of canvases, so that the forwards are those of a real decoder under KV policy `dual`: a refresh, which decides
a block's first step, then one forward for each step that no draft foresaw.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_dllm.calibrate.count import Decoding
from vllm_dllm.calibrate.trace import BlockTrace, PromptTrace
from vllm_dllm.draft.compile import CompiledGraph, compile_graph
from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.draft.propose import DraftNoise, Drafts, Roots, propose
from vllm_dllm.unmask.stats import Candidates


@dataclass(frozen=True, slots=True)
class Forwards:
    """Forwards of some generations, refreshes included, and how drafts of each depth fared in them.

    Attributes:
        without: without drafts.
        with_drafts: with them.
        refreshes: of either.
        proposed: drafts evaluated by depth, from depth 1 on.
        accepted: those of them that came true.
    """

    without: int
    with_drafts: int
    refreshes: int
    proposed: tuple[int, ...]
    accepted: tuple[int, ...]

    @property
    def ratio(self) -> float:
        """Forwards without drafts for each one with them."""
        return self.without / max(self.with_drafts, 1)

    @property
    def ratio_of_steps(self) -> float:
        """The same of the forwards that are no refresh."""
        return (self.without - self.refreshes) / max(self.with_drafts - self.refreshes, 1)

    @property
    def acceptance(self) -> tuple[float, ...]:
        """The share of the drafts of each depth that came true."""
        return tuple(a / p if p else 0.0 for a, p in zip(self.accepted, self.proposed, strict=True))


@dataclass(frozen=True, slots=True)
class BlockDrafts:
    """The drafts of every anchor of a block, best first.

    Attributes:
        num_steps: of the block.
        is_valid: [num_anchors, num_nodes] bool, may be evaluated.
        depth: [num_anchors, num_nodes] int64, in the graph.
        ahead: [num_anchors, num_nodes] int64, how many steps behind the root its canvas is a true one; 0: none is.
        node, log_reach: [num_anchors, num_nodes], see `Drafts`.
    """

    num_steps: int
    is_valid: NDArray[np.bool_]
    depth: NDArray[np.int64]
    ahead: NDArray[np.int64]
    node: NDArray[np.int64]
    log_reach: NDArray[np.float64]


def draft_blocks(
    graph: DraftGraph, traces: Sequence[PromptTrace], decoding: Decoding, is_coupled: bool = True
) -> list[BlockDrafts]:
    """Make the drafts of every anchor of the traces.

    Args:
        graph: of at least one node; its readiness orders positions.
        traces: as recorded.
        decoding: temperature and policy of the traces.
        is_coupled: draw with the decoder's noise, as the engine does; False takes the most probable tokens.
    """
    compiled = compile_graph(graph, torch.device("cpu"))
    return [
        _block_drafts(compiled, block, _noise(block, trace.seed, decoding) if is_coupled else None, decoding)
        for trace in traces
        for block in trace.blocks
    ]


def _noise(block: BlockTrace, seed: int, decoding: Decoding) -> DraftNoise | None:
    if decoding.temperature == 0 and not decoding.is_random:
        return None
    num_anchors, block_length = block.num_steps - 1, block.canvas.shape[1]
    every = torch.zeros(num_anchors, dtype=torch.int64)
    return DraftNoise(
        seed=every + seed,
        position=torch.arange(block.start, block.start + block_length).expand(num_anchors, -1),
        temperature=every + decoding.temperature,
        top_k=every,
        top_p=every + 1.0,
        is_random=(every + decoding.is_random).bool(),
    )


def _block_drafts(
    graph: CompiledGraph, block: BlockTrace, draft_noise: DraftNoise | None, decoding: Decoding
) -> BlockDrafts:
    return found_drafts(block, propose(graph, block_roots(block, decoding), draft_noise))


def block_roots(block: BlockTrace, decoding: Decoding) -> Roots:
    """Return what the drafts of a block's anchors start from."""
    canvas = torch.from_numpy(block.canvas.astype(np.int64))
    is_masked = canvas == decoding.mask_token_id
    ids, log_probs = torch.from_numpy(block.token_ids[:-1].astype(np.int64)), torch.from_numpy(block.log_probs[:-1])
    is_new = is_masked[:-2] & ~is_masked[1:-1]
    terms = decoding.terms(log_probs, is_masked[1:-1], is_new)
    return Roots(canvas[1:-1], is_masked[1:-1], is_new, Candidates(ids, log_probs), terms)


def found_drafts(block: BlockTrace, drafts: Drafts) -> BlockDrafts:
    """Say of the drafts of a block's anchors which came true."""
    return BlockDrafts(
        num_steps=block.num_steps,
        is_valid=drafts.is_valid.numpy(),
        depth=drafts.depth.numpy(),
        ahead=_steps_ahead(drafts, torch.from_numpy(block.canvas.astype(np.int64))),
        node=drafts.node.numpy(),
        log_reach=drafts.log_reach.numpy(),
    )


def _steps_ahead(drafts: Drafts, canvas: torch.Tensor) -> NDArray[np.int64]:
    """Return how many steps behind its root each draft is a true canvas, 0 where it is none."""
    is_true = (drafts.canvas[:, :, None] == canvas).all(-1) & drafts.is_valid[..., None]
    step = torch.where(is_true.any(-1), is_true.byte().argmax(-1), 0)  # [num_anchors, num_nodes]; canvas 0 is no draft
    ahead: NDArray[np.int64] = (step - torch.arange(1, 1 + len(step))[:, None]).clamp(min=0).numpy()
    return ahead


def expected_counts(graph: DraftGraph, blocks: Sequence[BlockDrafts]) -> tuple[float, ...]:
    """Return how often each node should come true by what `draft.prune` gives it, before correction."""
    total = np.zeros(1 + len(graph))
    for block in blocks:
        np.add.at(total, block.node, np.exp(block.log_reach))
    return tuple(float(f"{value:.6g}") for value in total[1:])


def count_forwards(blocks: Sequence[BlockDrafts], budget: int) -> Forwards:
    """Count the forwards of some blocks when each evaluates the best `budget` drafts."""
    max_depth = max((int(block.depth.max()) for block in blocks if block.depth.size), default=0)
    proposed, accepted = np.zeros(max_depth + 1, np.int64), np.zeros(max_depth + 1, np.int64)
    num_forwards = 0
    for block in blocks:
        for anchor, length in accept_paths(block, budget):
            num_forwards += 1
            is_evaluated = block.is_valid[anchor, :budget]
            is_accepted = is_evaluated & (block.ahead[anchor, :budget] > 0) & (block.ahead[anchor, :budget] <= length)
            np.add.at(proposed, block.depth[anchor, :budget][is_evaluated], 1)
            np.add.at(accepted, block.depth[anchor, :budget][is_accepted], 1)
    deepest = int(np.flatnonzero(proposed).max(initial=0))
    return Forwards(
        without=sum(block.num_steps for block in blocks),
        with_drafts=num_forwards + len(blocks),
        refreshes=len(blocks),
        proposed=tuple(proposed[1 : deepest + 1].tolist()),
        accepted=tuple(accepted[1 : deepest + 1].tolist()),
    )


def accept_paths(block: BlockDrafts, budget: int) -> Iterator[tuple[int, int]]:
    """Yield the anchor of each forward but the refresh, and how many steps its drafts save."""
    anchor = 0
    while anchor < block.num_steps - 1:
        reached = set(block.ahead[anchor, :budget].tolist())
        length = next(depth for depth in range(1, block.num_steps + 1) if depth not in reached) - 1
        yield anchor, length
        anchor += 1 + length


def until_eos(trace: PromptTrace, eos_token_id: int | list[int]) -> PromptTrace:
    """Return a trace up to the block in which the text ends, with the token or one of these."""
    ends = [i for i, block in enumerate(trace.blocks) if np.isin(block.canvas[-1], eos_token_id).any()]
    last = ends[0] + 1 if ends else len(trace.blocks)
    return PromptTrace(trace.prompt_idx, trace.seed, trace.blocks[:last])
