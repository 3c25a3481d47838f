"""Saber (arXiv:2510.18165): positions that are surer than those before are written, and what gained least is erased."""

import torch

from vllm_dllm.unmask.memory import PolicyState, StateField
from vllm_dllm.unmask.parameter import Parameter
from vllm_dllm.unmask.torch_policy import Decision, Seen, TorchPolicy, highest


def _decide(seen: Seen, state: PolicyState) -> Decision:
    """Write what exceeds the mean confidence of what was written, at least `least`; mask again what gained least."""
    confidence, written_at = seen.confidence, state["written_at"][..., 0]
    was_written = written_at >= 0
    num_written = was_written.sum(1)
    mean = torch.where(was_written, written_at, 0.0).sum(1) / num_written.clamp(min=1)
    threshold = torch.where(num_written > 0, mean, 1.0)[:, None]
    least = seen.values["least"].long()
    chosen = seen.is_open & (confidence > threshold)
    chosen = torch.where((chosen.sum(1) < least)[:, None], seen.highest(confidence, least), chosen)
    canvas = seen.unmask(chosen)
    num_fixed = chosen.sum(1).maximum(least)
    num_back = torch.maximum(least // 2, (num_fixed + 7) // 8).minimum(num_fixed - 1)
    may_go = seen.is_written | chosen
    gain = confidence - state["last"][..., 0]
    is_full = (canvas != seen.mask_token_id).all(1)
    back = highest(-gain, num_back, may_go) & ~is_full[:, None]
    kept = {
        "written_at": torch.where(chosen, confidence, written_at)[..., None],
        "last": confidence[..., None],
    }
    return Decision(canvas.masked_fill(back, seen.mask_token_id), kept)


SABER = TorchPolicy(
    _decide,
    source="Saber, arXiv:2510.18165",
    parameters={"least": Parameter(2, "positions that a step writes at least", low=1, high=64, is_whole=True)},
    state={
        "written_at": StateField(1, torch.float64, -1.0),  # confidence when it was last written; -1: never
        "last": StateField(1, torch.float64, 0.0),  # confidence in the step before
    },
    tokens_change=True,
)
