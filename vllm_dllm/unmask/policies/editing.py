"""LLaDA2.1 (inclusionAI): each step may also replace written tokens that the model is sure are others."""

import torch

from vllm_dllm.unmask.memory import PolicyState, StateField
from vllm_dllm.unmask.parameter import Parameter
from vllm_dllm.unmask.torch_policy import Decision, Seen, TorchPolicy


def _decide(seen: Seen, state: PolicyState) -> Decision:
    """Unmask what exceeds the threshold, `least` at least, and replace written tokens that exceed their own.

    A block ends with the first step without masked positions that replaces nothing, or behind `post_steps` of these.
    """
    was_full = ~seen.is_masked.any(1)
    sure = seen.is_open & (seen.confidence > seen.params.threshold[:, None])
    least = seen.values["least"].long()
    chosen = torch.where((sure.sum(1) < least)[:, None], seen.highest(seen.confidence, least), sure)
    is_other = seen.is_written & (seen.token_ids != seen.canvas)
    edited = is_other & (seen.confidence > seen.values["threshold"][:, None])
    num_post = state["num_post"][..., 0] + was_full[:, None]
    is_done = (was_full & ~edited.any(1)) | (num_post[:, 0] >= seen.values["post_steps"])
    return Decision(seen.unmask(chosen | edited), {"num_post": num_post[..., None]}, is_done)


EDITING = TorchPolicy(
    _decide,
    source="LLaDA2.1, inclusionAI/LLaDA2.1-mini",
    takes=("threshold",),
    parameters={
        "threshold": Parameter(0.9, "confidence above which a written token is replaced"),
        "post_steps": Parameter(16, "steps of a block without masked positions", high=128, is_whole=True),
        "least": Parameter(1, "positions that a step unmasks at least", low=1, high=64, is_whole=True),
    },
    state={"num_post": StateField(1, torch.int64, 0)},  # steps without masked positions, the same at each position
    tokens_change=True,
)
