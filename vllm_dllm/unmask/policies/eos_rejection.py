"""EOSER and ASS (arXiv:2509.23924): EOS counts for less at first; each step unmasks twice as many as the one before."""

import torch
from torch import Tensor

from vllm_dllm.unmask.memory import PolicyState
from vllm_dllm.unmask.parameter import Parameter
from vllm_dllm.unmask.torch_policy import Decision, Seen, TorchPolicy

_SOURCE = "arXiv:2509.23924"


def _parameters(low: float) -> dict[str, Parameter]:
    return {
        "gamma_min": Parameter(low, "what an EOS's confidence is multiplied by in the first step"),
        "gamma_max": Parameter(1.0, "the same in the last step"),
    }


def _less_of_eos(seen: Seen, time: Tensor) -> Tensor:
    """Return confidence, that of EOS by the time [num_canvases] float64, 0 to 1, that is passed of the generation."""
    low, high = seen.values["gamma_min"], seen.values["gamma_max"]
    factor = (low + (high - low) * time)[:, None]
    return torch.where(seen.token_ids == seen.rules.eos_id, seen.confidence * factor, seen.confidence)


def _eoser(seen: Seen, _state: PolicyState) -> Decision:
    """Unmask as `static`; as published, the step's number in its block is related to all steps of the generation."""
    last = (seen.num_steps * seen.num_blocks - 1).double()
    time = torch.where(last > 0, seen.step.double().minimum(last) / last.clamp(min=1), 1.0)
    return Decision(seen.unmask(seen.highest(_less_of_eos(seen, time), seen.scheduled)))


def _num_steps(seen: Seen) -> int:
    return max(1, seen.canvas.shape[1].bit_length() - 1)


def _doubled(seen: Seen) -> Tensor:
    """Return how many positions a step unmasks: 1, 2, 4, ..., the last one the rest of the block."""
    rest = torch.full_like(seen.step, seen.canvas.shape[1])
    return torch.where(seen.step < _num_steps(seen) - 1, 2 ** seen.step.clamp(max=32), rest)


def _ass(seen: Seen, _state: PolicyState) -> Decision:
    return Decision(seen.unmask(seen.highest(seen.confidence, _doubled(seen))))


def _eoser_ass(seen: Seen, _state: PolicyState) -> Decision:
    num_steps = _num_steps(seen)
    time = (2.0 ** (seen.step.clamp(max=num_steps - 1) + 1).double() - 1) / 2**num_steps
    return Decision(seen.unmask(seen.highest(_less_of_eos(seen, time), _doubled(seen))))


EOSER = TorchPolicy(_eoser, source=f"EOSER, {_SOURCE}", takes=("steps",), parameters=_parameters(0.4))
ASS = TorchPolicy(_ass, source=f"ASS, {_SOURCE}")
EOSER_ASS = TorchPolicy(_eoser_ass, source=f"EOSER with ASS, {_SOURCE}", parameters=_parameters(0.01))
