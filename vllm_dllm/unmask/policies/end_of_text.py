"""EoTP (Learn2PD, arXiv:2509.25188): where EOS is likeliest the reply is cut, and what is behind is decided no more."""

import torch
from torch import Tensor

from vllm_dllm.unmask.memory import PolicyState, StateField
from vllm_dllm.unmask.parameter import Parameter
from vllm_dllm.unmask.policies.learned import LEARN2PD, surest, taken_for_final
from vllm_dllm.unmask.torch_policy import Decision, Seen, TorchPolicy, highest

_NO_END = 2**31  # behind every place of a block
_STATE = {
    "end": StateField(1, torch.int64, _NO_END, "block"),  # places of the block that are left
    "is_over": StateField(1, torch.bool, False, "request"),  # whether the reply was cut
}


def _place(seen: Seen) -> Tensor:
    return torch.arange(seen.canvas.shape[1], device=seen.canvas.device)


def _cut(seen: Seen, state: PolicyState, chosen: Tensor, accepted: Tensor) -> Decision:
    """Unmask, and cut the block behind the first accepted EOS, or else behind the surest masked one.

    What is behind a cut is EOS, in the block and in all that follow.

    Args:
        seen: canvases.
        state: of their blocks.
        chosen: [num_canvases, B] bool, positions that are unmasked.
        accepted: [num_canvases, B] bool, those of them whose EOS is believed wherever it is.
    """
    place, eos_id = _place(seen), seen.rules.eos_id
    is_end = seen.is_open & (seen.token_ids == eos_id)
    believed = is_end & accepted
    likeliest = highest(seen.confidence, torch.ones_like(seen.step), is_end)
    at = torch.where(believed.any(1, keepdim=True), believed, likeliest)
    end = torch.where(at, place + 1, _NO_END).amin(1).minimum(state["end"][:, 0, 0])
    was_over = state["is_over"][:, 0, 0]
    end = torch.where(was_over & (seen.step == 0), 0, end)
    canvas = torch.where(place >= end[:, None], eos_id, seen.unmask(chosen))
    return Decision(canvas, {"end": end[:, None, None], "is_over": (was_over | at.any(1))[:, None, None]})


def _eotp(seen: Seen, state: PolicyState) -> Decision:
    """Unmask as `static`, evenly by the number of the step."""
    own, steps = seen.num_own, seen.num_steps
    count = (own // steps + (seen.step < own % steps)).clamp(min=1)
    chosen = seen.highest(seen.confidence, count)
    return _cut(seen, state, chosen, torch.zeros_like(chosen))


def _learn2pd_eotp(seen: Seen, state: PolicyState) -> Decision:
    """Unmask as `learn2pd`, whose net sees nothing, 0, behind a cut."""
    is_final = taken_for_final(seen, _place(seen) < state["end"][:, :, 0])
    return _cut(seen, state, surest(seen) | is_final, is_final)


EOTP = TorchPolicy(
    _eotp, source="EoTP of Learn2PD, arXiv:2509.25188", takes=("steps",), state=_STATE, tokens_change=True
)
LEARN2PD_EOTP = TorchPolicy(
    _learn2pd_eotp,
    source="Learn2PD with EoTP, arXiv:2509.25188",
    parameters={"accept": Parameter(0.96, "what the net's output has to exceed")},
    state=_STATE,
    tokens_change=True,
    weights=LEARN2PD.weights,
    file_of="learn2pd",
)
