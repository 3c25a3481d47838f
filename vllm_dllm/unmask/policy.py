"""Unmasking policies as tensor code over a whole batch.

Every policy unmasks the first k positions of one order: confidence descending, then position ascending. A policy is
therefore how k follows from the sorted confidences (`num_to_unmask`), and what the confidence is: the probability of
the chosen token, or for `random` a uniform number. It remembers nothing: the next canvas is a function of the canvas,
so that a draft of a later canvas can be decided in the same forward.

Sources: LLaDA `generate` (arXiv:2502.09992) for static and random; Fast-dLLM v1 (arXiv:2505.22618) for threshold and
factor. `torch.topk` leaves the order of equal confidences open; ours is the lowest position first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_dllm.config import PolicyName

POLICY_IDS: dict[PolicyName, int] = {"static": 0, "random": 1, "threshold": 2, "factor": 3}


@dataclass(frozen=True, slots=True)
class PolicyParams:
    """One policy per request, as device tensors."""

    policy_id: Tensor  # [num_reqs] int64, POLICY_IDS
    threshold: Tensor  # [num_reqs] float64
    factor: Tensor  # [num_reqs] float64
    steps_per_block: Tensor  # [num_reqs] int64, static and random

    def repeat(self, times: int) -> "PolicyParams":
        """Return each request's policy `times` times, one after another."""
        return PolicyParams(
            policy_id=self.policy_id.repeat_interleave(times),
            threshold=self.threshold.repeat_interleave(times),
            factor=self.factor.repeat_interleave(times),
            steps_per_block=self.steps_per_block.repeat_interleave(times),
        )


def num_to_unmask(confidence: Tensor, num_masked: Tensor, params: PolicyParams) -> Tensor:
    """Decide how many positions each request unmasks in this step.

    static, random: the block length split over `steps_per_block`, the remainder first; the positions that are
    unmasked already tell which step it is. threshold: all that reach it,
    at least one. factor: the longest run that satisfies `confidence[n] >= 1 - f / (n + 1)` for the n-th position,
    at least one; failing at the last position alone unmasks it too, as Fast-dLLM's code does.

    Args:
        confidence: [num_reqs, block_length] float64, descending, -inf behind the masked positions.
        num_masked: [num_reqs] int64, at least 1.
        params: the requests' policies.

    Returns: [num_reqs] int64, from 1 to num_masked.
    """
    block_length = confidence.shape[1]
    rank = torch.arange(block_length, device=confidence.device)
    per_step = block_length // params.steps_per_block
    in_longer_steps = (per_step + 1) * (block_length % params.steps_per_block)
    per_step = per_step + (block_length - num_masked < in_longer_steps)
    reaching = (confidence >= params.threshold[:, None]).sum(1)
    # Rank 0 is always unmasked: Fast-dLLM's first threshold is -1. Ranks behind the masked ones fail by their -inf.
    fails = confidence < 1.0 - params.factor[:, None] / (rank + 2)
    fails[:, 0] = False
    run = torch.where(fails, rank, block_length).amin(1)
    last = num_masked - 1
    run = torch.where(run == last, num_masked, run)
    count = torch.where(
        params.policy_id == POLICY_IDS["threshold"],
        reaching,
        torch.where(params.policy_id == POLICY_IDS["factor"], run, per_step),
    )
    return torch.minimum(count.clamp(min=1), num_masked)


def choose_positions(confidence: Tensor, is_masked: Tensor, params: PolicyParams) -> Tensor:
    """Choose the positions each request unmasks in this step.

    Args:
        confidence: [num_reqs, block_length] float64, of the token chosen at each position.
        is_masked: [num_reqs, block_length] bool.
        params: the requests' policies.

    Returns: [num_reqs, block_length] bool, a subset of `is_masked`; empty for a request without masked positions.
    """
    confidence = confidence.masked_fill(~is_masked, -torch.inf)
    ordered, order = torch.sort(confidence, dim=1, descending=True, stable=True)
    count = num_to_unmask(ordered, is_masked.sum(1), params)
    rank = torch.arange(confidence.shape[1], device=confidence.device).expand_as(order)
    chosen = torch.zeros_like(is_masked).scatter_(1, order, rank < count[:, None])
    return chosen & is_masked
