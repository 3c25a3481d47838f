"""RCR (MDPO, arXiv:2508.13148) and ReMDM (arXiv:2503.00307): what was written with least confidence is masked again."""

import torch

from vllm_dllm.unmask.memory import PolicyState, StateField
from vllm_dllm.unmask.parameter import Parameter
from vllm_dllm.unmask.torch_policy import Decision, Seen, TorchPolicy, highest

_STATE = {"written_at": StateField(1, torch.float64, torch.inf)}  # confidence when it was last written

SURE_SHARE = 7 / 8
"""Of a block's positions, as many steps before ReMDM's remasking ones."""


def _rcr(seen: Seen, state: PolicyState) -> Decision:
    """Write all, then mask as many again as the schedule leaves: those that were least sure, whenever that was."""
    written_at = torch.where(seen.is_open, seen.confidence, state["written_at"][..., 0])
    ratio = (1 - (seen.step + 1).double() / seen.num_steps.double()).clamp(1e-6, 1)
    num_masked = (ratio * seen.num_own.double()).floor().long()
    canvas = seen.unmask(seen.is_open)
    back = highest(-written_at, num_masked, seen.is_written | seen.is_open)
    return Decision(canvas.masked_fill(back, seen.mask_token_id), {"written_at": written_at[..., None]})


def _remdm(seen: Seen, state: PolicyState) -> Decision:
    """Write by the schedule; before each of some steps mask the least sure positions again, which the step rewrites."""
    length = seen.canvas.shape[1]
    number, num_loops = seen.values["number"].long(), seen.values["loops"].long()
    first = seen.num_steps.clamp(max=max(min(int(length * SURE_SHARE), length - 1), 1))

    def rewrites(step: torch.Tensor) -> torch.Tensor:
        return (step >= first) & (step < first + num_loops)

    chosen = seen.highest(seen.confidence, torch.where(rewrites(seen.step), number, seen.scheduled))
    canvas = seen.unmask(chosen)
    written_at = torch.where(chosen, seen.confidence, state["written_at"][..., 0])
    count = torch.where(rewrites(seen.step + 1), number, 0)
    back = highest(-written_at, count, seen.is_written | chosen)
    kept = {"written_at": written_at.masked_fill(back, torch.inf)[..., None]}
    return Decision(canvas.masked_fill(back, seen.mask_token_id), kept)


RCR = TorchPolicy(_rcr, source="RCR of MDPO, arXiv:2508.13148", takes=("steps",), state=_STATE, tokens_change=True)
REMDM = TorchPolicy(
    _remdm,
    source="ReMDM, arXiv:2503.00307",
    takes=("steps",),
    parameters={
        "loops": Parameter(4, "steps of a block that rewrite", high=16, is_whole=True),
        "number": Parameter(1, "positions that each of them rewrites", low=1, high=64, is_whole=True),
    },
    state=_STATE,
    tokens_change=True,
)
