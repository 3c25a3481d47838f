"""CCD (arXiv:2512.02044): positions that were about to be unmasked before, and whose token has stayed, go together."""

import torch

from vllm_dllm.unmask.memory import PolicyState, StateField
from vllm_dllm.unmask.parameter import Parameter
from vllm_dllm.unmask.torch_policy import Decision, Seen, TorchPolicy, highest

WARM_UP = 5
"""Steps of a block that fill the buffer alone."""
LATE_SHARE = 0.1
"""Of a block's positions; where no more are masked, the buffer is small again."""


def _decide(seen: Seen, state: PolicyState) -> Decision:
    """Unmask the surest of least entropy, or in their place all that the buffer has and whose tokens have stayed."""
    score, step = -seen.entropy, seen.step
    share = (seen.num_own // seen.num_steps).clamp(min=1)
    most = share + (share.double() * seen.values["ratio"]).long()
    size = torch.where(seen.is_masked.sum(1) <= LATE_SHARE * seen.num_own, 1, state["size"][:, 0, 0])
    size = torch.where(step < WARM_UP - 1, 1, (size + 1).minimum(most))
    surest, buffer = seen.highest(score, share), state["buffer"][..., 0]
    likeliest = seen.rows.top_ids[:, 0].view_as(seen.canvas)  # also where another one is drawn
    has_stayed = likeliest == state["last"][..., 0]
    coherent = seen.highest(score, size) & buffer & has_stayed
    may = (step >= WARM_UP) & (step < seen.num_steps - 1) & (surest & buffer).any(1) & (coherent.sum(1) >= share)
    chosen = torch.where(may[:, None], coherent, surest)
    kept = {
        "size": size[:, None, None],
        "buffer": highest(score, size, seen.is_open & ~chosen)[..., None],
        "last": likeliest[..., None],
    }
    return Decision(seen.unmask(chosen), kept)


CCD = TorchPolicy(
    _decide,
    source="CCD, arXiv:2512.02044",
    takes=("steps",),
    parameters={"ratio": Parameter(4.0, "how many times the share of a step the buffer has more", high=64.0)},
    state={
        "size": StateField(1, torch.int64, 1, "block"),  # of the buffer
        "buffer": StateField(1, torch.bool, False),  # whether a position was about to be unmasked
        "last": StateField(1, torch.int64, -1),  # the likeliest token in the step before
    },
)
