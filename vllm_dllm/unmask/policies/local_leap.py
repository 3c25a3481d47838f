"""LocalLeap (arXiv:2510.07081): a lower threshold near positions that are sure."""

import torch

from vllm_dllm.unmask.memory import PolicyState
from vllm_dllm.unmask.parameter import Parameter
from vllm_dllm.unmask.torch_policy import Decision, Seen, TorchPolicy

MAX_RADIUS = 64


def _decide(seen: Seen, _state: PolicyState) -> Decision:
    """Unmask what reaches the threshold, and what reaches the relaxed one within the radius of such a position."""
    confidence = seen.confidence
    is_anchor = seen.is_open & (confidence >= seen.params.threshold[:, None])
    place = torch.arange(confidence.shape[1], device=confidence.device)
    distance = (place[:, None] - place).abs()
    is_near = (is_anchor[:, None] & (distance <= seen.values["radius"][:, None, None])).any(2)
    return Decision(seen.unmask(is_anchor | (seen.is_open & is_near & (confidence >= seen.values["relaxed"][:, None]))))


LOCAL_LEAP = TorchPolicy(
    _decide,
    source="LocalLeap, arXiv:2510.07081",
    takes=("threshold",),
    parameters={
        "relaxed": Parameter(0.75, "threshold of positions near a sure one"),
        "radius": Parameter(4, "how near, in positions", high=MAX_RADIUS, is_whole=True),
    },
)
