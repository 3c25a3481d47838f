"""dParallel's rule (arXiv:2509.26488): positions of little entropy."""

import torch

from vllm_dllm.unmask.memory import PolicyState
from vllm_dllm.unmask.parameter import Parameter
from vllm_dllm.unmask.torch_policy import Decision, Seen, TorchPolicy


def _decide(seen: Seen, _state: PolicyState) -> Decision:
    """Unmask the position of least entropy, and all whose entropy does not exceed the bound."""
    least = seen.highest(-seen.entropy, torch.ones_like(seen.step))
    return Decision(seen.unmask(least | (seen.is_open & (seen.entropy <= seen.values["bound"][:, None]))))


ENTROPY_THRESHOLD = TorchPolicy(
    _decide,
    source="dParallel, arXiv:2509.26488",
    parameters={"bound": Parameter(0.5, "entropy up to which positions are unmasked, in nats", high=100.0)},
)
