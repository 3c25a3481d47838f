"""What a package with a policy of its own imports: see docs/add-a-policy.md."""

from vllm_dllm.unmask.memory import PolicyState, StateField
from vllm_dllm.unmask.parameter import Parameter
from vllm_dllm.unmask.torch_policy import Decision, Seen, TorchPolicy

__all__ = ["Decision", "Parameter", "PolicyState", "Seen", "StateField", "TorchPolicy"]
