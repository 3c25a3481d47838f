"""LLaDA's flag `confidence_eos_eot_inf` (arXiv:2502.09992 app. B.4): end tokens are taken last."""

from vllm_dllm.unmask.memory import PolicyState
from vllm_dllm.unmask.torch_policy import Decision, Seen, TorchPolicy


def _decide(seen: Seen, _state: PolicyState) -> Decision:
    """Unmask as `static`, by confidence without end tokens; as published, above temperature 0 only EoT is left out."""
    confidence = seen.confidence_without(eos_too=seen.params.temperature == 0)
    return Decision(seen.unmask(seen.highest(confidence, seen.scheduled)))


EOS_LAST = TorchPolicy(_decide, source="LLaDA, arXiv:2502.09992", takes=("steps",), asks_ends=True)
