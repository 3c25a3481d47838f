"""Fit the readiness of positions to traces: a logistic model of which ones the next step unmasks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_dllm.calibrate.trace import BlockTrace, PromptTrace
from vllm_dllm.draft.prune import log_choices
from vllm_dllm.draft.readiness import Readiness

STEPS_AHEAD = 4
"""A draft is made from statistics that are one step old or older; the fit sees so many ages."""

_FEATURES = (
    Readiness(slope=1.0),
    Readiness(0.0, near=(1.0, 0.0)),
    Readiness(0.0, near=(0.0, 1.0)),
    Readiness(0.0, bias=1.0),
)
"""Each weight alone: readiness is linear in its weights."""


def fit_readiness(traces: Sequence[PromptTrace], mask_token_id: int, tokens_per_step: int | None) -> Readiness:
    """Return the readiness that makes the traces likeliest; the default one where there is nothing to learn from.

    The likelihood of a step is the one that `draft.prune` scores nodes with: of one position among the masked ones, or
    of a set of them, each by itself, that is not empty.
    """
    blocks = [block for trace in traces for block in trace.blocks]
    parts = [
        part for block in blocks for age in range(STEPS_AHEAD) if len((part := _steps(block, age, mask_token_id))[0])
    ]
    if not parts:
        return Readiness()
    features, is_masked, is_next = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    has_bias = tokens_per_step != 1  # of a choice of one position it would cancel
    if not has_bias:
        features = features[..., :-1]
    weights = torch.zeros(features.shape[-1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        ready = features @ weights
        log_z = log_choices(ready, is_masked, is_one_by_one=not has_bias)
        value = (log_z - ready.masked_fill(~is_next, 0.0).sum(1)).mean() + 1e-4 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    slope, beside, further, *bias = (round(weight, 4) for weight in weights.tolist())
    return Readiness(slope, (beside, further), *bias)


def _steps(block: BlockTrace, age: int, mask_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the steps that come `age` steps after an anchor's root, described by the anchor's statistics.

    Returns: features [num_steps, block_length, 4] float64: logit of the confidence, new neighbours at distance 1 and 2,
        one; which positions are masked before the step, and which it unmasks, [num_steps, block_length] bool.
    """
    is_masked = torch.from_numpy(block.canvas == mask_token_id)
    num_steps = block.num_steps - 1 - age
    if num_steps <= 0:
        return torch.empty(0), torch.empty(0), torch.empty(0)
    before, after = is_masked[1 + age : 1 + age + num_steps], is_masked[2 + age : 2 + age + num_steps]
    is_new = is_masked[:num_steps] & ~before
    log_confidence = torch.from_numpy(block.log_probs[:num_steps, :, 0])
    features = torch.stack([feature.log_odds(log_confidence, is_new) for feature in _FEATURES], dim=-1)
    return features, before, before & ~after
