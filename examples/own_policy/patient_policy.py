"""`patient`: a position is unmasked when its likeliest token has stayed the same for some steps."""

import torch

from vllm_dllm.policy import Decision, Parameter, PolicyState, Seen, StateField, TorchPolicy


def decide(seen: Seen, state: PolicyState) -> Decision:
    """Decide canvases of several requests at once; [num_canvases, block_length] each."""
    last, stayed = state["last"][..., 0], state["stayed"][..., 0]
    stayed = torch.where(last == seen.token_ids, stayed + 1, 0)
    is_patient = stayed >= seen.values["steps"][:, None]
    is_sure = seen.confidence >= seen.params.threshold[:, None]
    kept = {"last": seen.token_ids[..., None], "stayed": stayed[..., None]}
    return Decision(seen.unmask(seen.is_open & is_patient & is_sure), kept)


PATIENT = TorchPolicy(
    decide,
    takes=("threshold",),
    parameters={"steps": Parameter(2, "steps that a token must stay the same", low=0, high=64, is_whole=True)},
    state={"last": StateField(1, torch.int64, -1), "stayed": StateField(1, torch.int64, 0)},
)
