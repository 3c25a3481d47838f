"""Read the formulas of true future states from traces: what drafts would have had to guess.

Anchor t of a block: step t made the root, canvas t + 1, and drafts are made from step t's distribution. The formula of
a later canvas is built step by step, as `draft.propose` fills a node step by step: each step adds its positions and
tokens by their ranks at that step. Without noise and token weights the ranks are the same at every step.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_dllm import noise
from vllm_dllm.calibrate.select import FutureStates
from vllm_dllm.calibrate.tokens import OrderTokens, ordered
from vllm_dllm.calibrate.trace import BlockTrace, PromptTrace
from vllm_dllm.draft.graph import MAX_CANDIDATES, Formula, Pair
from vllm_dllm.draft.ranker import OrderRanker
from vllm_dllm.draft.readiness import Readiness
from vllm_dllm.draft.token_weights import TokenWeights
from vllm_dllm.unmask.schedule import UnmaskRules

MAX_PAIRS = 16
"""Longer formulas are not counted: no graph of 64 nodes has use for them."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How the prompts were decoded, as far as it orders positions and tokens."""

    mask_token_id: int
    temperature: float = 0.0
    is_random: bool = False  # the policy `random`
    readiness: Readiness = field(default_factory=Readiness)
    rules: UnmaskRules = field(default_factory=UnmaskRules)
    ranker: OrderRanker | None = None
    tokens: TokenWeights | None = None

    def terms(self, log_probs: Tensor, is_masked: Tensor, is_new: Tensor) -> Tensor | None:
        """Return what the ranker adds, see `OrderRanker.terms`; None without one."""
        return None if self.ranker is None else self.ranker.terms(log_probs, is_masked, is_new)


def anchor_paths(traces: Iterable[PromptTrace], decoding: Decoding) -> list[FutureStates]:
    """Return the path of every anchor, in the order of the traces."""
    return [path for trace in traces for block in trace.blocks for path in block_paths(block, trace.seed, decoding)]


def block_paths(
    block: BlockTrace, seed: int, decoding: Decoding, order_tokens: OrderTokens | None = None
) -> list[FutureStates]:
    """Return the paths of a block's anchors, one for each step but the last.

    Args:
        block: as recorded.
        seed: of its request.
        decoding: how it was decoded.
        order_tokens: in place of the order by which drafts are made; for measurements.
    """
    is_masked = block.canvas == decoding.mask_token_id  # [num_steps + 1, block_length]
    if order_tokens is None and decoding.tokens is not None and decoding.temperature == 0:
        order_tokens = ordered(block, decoding.mask_token_id, decoding.tokens.scores)
    anchors = range(block.num_steps - 1)
    return [tuple(_formulas(block, is_masked, anchor, seed, decoding, order_tokens)) for anchor in anchors]


def _formulas(
    block: BlockTrace,
    is_masked: NDArray[np.bool_],
    anchor: int,
    seed: int,
    decoding: Decoding,
    order_tokens: OrderTokens | None,
) -> Iterator[Formula]:
    """Yield the formulas of the canvases behind an anchor's root, until one has none or is finished."""
    num_left = is_masked.sum(1)
    ends = np.flatnonzero((num_left == 0) | (num_left[anchor + 1] - num_left > MAX_PAIRS))
    last = int(ends[ends > anchor + 1][0])  # the first canvas that no draft may stand for
    steps = np.arange(anchor + 1, last - 1)
    if not len(steps):
        return
    token_order, position_order = _orders(block, is_masked, anchor, num_left[steps], seed, decoding)
    formula: list[Pair] = []
    for draw, step in enumerate(steps):
        draw = min(draw, len(token_order) - 1)
        open_positions = position_order[draw][is_masked[step][position_order[draw]]]
        free = _free_ranks([rank for rank, _ in formula], len(open_positions))
        for rank in np.flatnonzero(~is_masked[step + 1][open_positions]):
            position = open_positions[rank]
            tokens = (
                token_order[draw, position] if order_tokens is None else order_tokens(anchor, int(step), int(position))
            )
            found = np.flatnonzero(tokens == block.canvas[step + 1, position])
            if not len(found):
                return
            formula.append((free[rank], int(found[0])))
        yield tuple(sorted(formula))


def _free_ranks(taken: Sequence[int], count: int) -> list[int]:
    """Return the `count` lowest ranks that are not taken."""
    return [rank for rank in range(count + len(taken)) if rank not in taken][:count]


def _orders(
    block: BlockTrace,
    is_masked: NDArray[np.bool_],
    anchor: int,
    num_left: NDArray[np.int64],
    seed: int,
    decoding: Decoding,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Order tokens and positions as drafts of an anchor do at each of some later steps.

    Args:
        num_left: [num_draws] int64, masked positions before each of these steps.

    Returns: tokens [num_draws, block_length, num_candidates], positions [num_draws, block_length], best first; one
        draw alone when all are equal.
    """
    ids = torch.from_numpy(block.token_ids[anchor].astype(np.int64))[None, :, :MAX_CANDIDATES]
    log_probs = torch.from_numpy(block.log_probs[anchor])[None, :, :MAX_CANDIDATES]
    is_new = torch.from_numpy(is_masked[anchor] & ~is_masked[anchor + 1])[None]
    terms = decoding.terms(log_probs, torch.from_numpy(is_masked[anchor + 1])[None], is_new)
    if decoding.temperature == 0 and not decoding.is_random:
        return ids.numpy(), _best_first(decoding.readiness.log_odds(log_probs[..., 0], is_new, terms))
    positions = torch.arange(block.start, block.start + ids.shape[1])
    seeds, left = torch.tensor(seed), torch.from_numpy(num_left)[:, None]
    keys = noise.stream_keys(seeds, positions, left)  # [num_draws, block_length]
    scores = log_probs + decoding.temperature * noise.gumbel(keys[..., None], ids)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    drawn = ids.expand_as(scores).gather(-1, order)
    if decoding.is_random:
        return drawn.numpy(), _best_first(noise.uniform(keys, torch.tensor(noise.STREAM)))
    confidence = log_probs.expand_as(scores).gather(-1, order)[..., 0]
    return drawn.numpy(), _best_first(decoding.readiness.log_odds(confidence, is_new.expand_as(confidence), terms))


def _best_first(scores: Tensor) -> NDArray[np.int64]:
    """Order positions by descending score, equal ones by position."""
    order: NDArray[np.int64] = scores.argsort(dim=-1, descending=True, stable=True).numpy()
    return order
