"""Fit token weights to traces, and order by them the candidates of positions that later steps unmask."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from vllm_dllm.calibrate.fit import STEPS_AHEAD
from vllm_dllm.calibrate.trace import BlockTrace, PromptTrace
from vllm_dllm.draft.graph import MAX_CANDIDATES
from vllm_dllm.draft.token_weights import NONE, OFFSETS, TokenWeights

OrderTokens = Callable[[int, int, int], NDArray[np.int64]]
"""Of an anchor, a later step and a position: the candidates that a draft may put there in that step, best first."""

_FEATURES = (
    TokenWeights(1.0),
    TokenWeights(0.0, 1.0),
    *(TokenWeights(0.0, same=(i == 0, i == 1, i == 2, i == 3)) for i in range(len(OFFSETS))),
)
"""Each weight alone: scores are linear in the weights."""


@dataclass(frozen=True, slots=True)
class Unmasked:
    """What steps unmask, as the statistics of an anchor before them see it; a row for each position."""

    anchor: Tensor  # [num_rows] int64
    step: Tensor  # [num_rows] int64
    position: Tensor  # [num_rows] int64
    came: Tensor  # [num_rows] int64, the token
    token_ids: Tensor  # [num_rows, num_candidates] int64
    log_probs: Tensor  # [num_rows, num_candidates] float64
    beside: Tensor  # [num_rows, len(OFFSETS)] int64, new when the step begins

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Iterate over anchors, steps and positions."""
        return iter(zip(self.anchor.tolist(), self.step.tolist(), self.position.tolist(), strict=True))


def unmasked(block: BlockTrace, mask_token_id: int, steps_ahead: int | None = None) -> Unmasked:
    """Describe what the steps behind each anchor's root unmask.

    Args:
        block: as recorded.
        mask_token_id: of its canvases.
        steps_ahead: how many steps behind each root; None: all.
    """
    is_masked = block.canvas == mask_token_id
    step, position = np.nonzero(is_masked[:-1] & ~is_masked[1:])
    anchors = np.arange(block.num_steps)
    first = step - (block.num_steps if steps_ahead is None else steps_ahead)
    row, anchor = np.nonzero((anchors >= first[:, None]) & (anchors < step[:, None]))
    step, position = step[row], position[row]
    of_anchor, of_step = anchor[:, None], step[:, None]
    place = position[:, None] + np.array(OFFSETS)
    inside = place.clip(0, block.canvas.shape[1] - 1)
    is_new = (place == inside) & is_masked[of_anchor, inside] & ~is_masked[of_step, inside]
    beside = np.where(is_new, block.canvas[of_step, inside], NONE)
    return Unmasked(
        anchor=torch.from_numpy(anchor),
        step=torch.from_numpy(step),
        position=torch.from_numpy(position),
        came=torch.from_numpy(block.canvas[step + 1, position].astype(np.int64)),
        token_ids=torch.from_numpy(block.token_ids[anchor, position, :MAX_CANDIDATES].astype(np.int64)),
        log_probs=torch.from_numpy(block.log_probs[anchor, position, :MAX_CANDIDATES]),
        beside=torch.from_numpy(beside.astype(np.int64)),
    )


def ordered(block: BlockTrace, mask_token_id: int, scores: Callable[[Tensor, Tensor, Tensor], Tensor]) -> OrderTokens:
    """Order the candidates of all that steps unmask behind an anchor's root.

    Args:
        block: as recorded.
        mask_token_id: of its canvases.
        scores: as `TokenWeights.scores`.
    """
    rows = unmasked(block, mask_token_id)
    found = scores(rows.token_ids, rows.log_probs, rows.beside)
    best = rows.token_ids.gather(-1, found.argsort(dim=-1, descending=True, stable=True)).numpy()
    place = {key: i for i, key in enumerate(rows)}
    return lambda anchor, step, position: best[place[anchor, step, position]]


def fit_choice(features: Tensor, truth: Tensor) -> Tensor:
    """Return the weights under whose softmax what came is likeliest; [num_features] float64.

    Args:
        features: [num_examples, num_candidates, num_features] float64.
        truth: [num_examples] int64, the candidate that came.
    """
    weights = torch.zeros(features.shape[-1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(features @ weights, truth) + 1e-4 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


def features(token_ids: Tensor, log_probs: Tensor, beside: Tensor) -> Tensor:
    """Describe candidates, one feature for each of the token weights; [..., num_candidates, num_weights] float64.

    Args: as of `TokenWeights.scores`.
    """
    return torch.stack([each.scores(token_ids, log_probs, beside) for each in _FEATURES], -1)


def fit_token_weights(traces: Sequence[PromptTrace], mask_token_id: int) -> TokenWeights | None:
    """Return the weights that make the tokens of the traces likeliest, of requests of temperature 0.

    They see the tokens that came `STEPS_AHEAD` steps behind an anchor or less, and were candidates there. None where
    there are none.
    """
    blocks = [block for trace in traces for block in trace.blocks]
    parts = []
    for rows in (unmasked(block, mask_token_id, STEPS_AHEAD) for block in blocks):
        is_it = rows.token_ids == rows.came[:, None]
        described = features(rows.token_ids, rows.log_probs, rows.beside)
        parts.append((described[is_it.any(1)], is_it.byte().argmax(1)[is_it.any(1)]))
    if not any(len(truth) for _, truth in parts):
        return None
    described, truth = (torch.cat(column) for column in zip(*parts, strict=True))
    slope, beside_new, *same = (round(weight, 4) for weight in fit_choice(described, truth).tolist())
    return TokenWeights(slope, beside_new, (same[0], same[1], same[2], same[3]))
