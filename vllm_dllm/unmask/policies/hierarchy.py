"""dInfer's hierarchical decoding (arXiv:2510.08666): one position at least of each run of masked ones."""

import torch

from vllm_dllm.unmask.memory import PolicyState
from vllm_dllm.unmask.parameter import Parameter
from vllm_dllm.unmask.torch_policy import Decision, Seen, TorchPolicy


def _decide(seen: Seen, _state: PolicyState) -> Decision:
    """Unmask what exceeds the threshold, and the surest of each run if it exceeds the lower one."""
    confidence = seen.confidence.masked_fill(~seen.is_open, -torch.inf)
    begins = seen.is_open & ~torch.nn.functional.pad(seen.is_open[:, :-1], (1, 0))
    run = (begins.long().cumsum(1) - 1).clamp(min=0)
    of_run = torch.full_like(confidence, -torch.inf).scatter_reduce(1, run, confidence, "amax")
    is_surest = (confidence == of_run.gather(1, run)) & (confidence > seen.values["low"][:, None])
    return Decision(seen.unmask(seen.is_open & (is_surest | (confidence > seen.params.threshold[:, None]))))


HIERARCHY = TorchPolicy(
    _decide,
    source="dInfer, arXiv:2510.08666",
    takes=("threshold",),
    parameters={"low": Parameter(0.4, "what the surest position of a run has to exceed")},
)
