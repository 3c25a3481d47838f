"""What ends a request's answer before its last block does, as vLLM's scheduler stops (`check_stop`)."""

from vllm.sampling_params import SamplingParams

from vllm_dllm.state.ends import NO_ENDS, Ends
from vllm_dllm.unmask.registry import changes_tokens

MAX_END_IDS = 64
"""Of a request: all slots have room for as many as any of them has, in each step."""


def ends_of(params: SamplingParams, prompt_len: int, policy: str) -> Ends:
    """Return what ends an admitted request's answer for certain, once all before it is known.

    Stop strings are not among it: a front end finds them in the text. Nor are more end tokens than `MAX_END_IDS`,
    behind which the block goes on, nor anything where the policy may take a token back.
    """
    if changes_tokens(policy):
        return NO_ENDS
    ids = {params.eos_token_id, *(params.stop_token_ids or ())} - {None}
    return Ends(
        ids=tuple(sorted(int(token) for token in ids)) if len(ids) <= MAX_END_IDS else (),
        first=prompt_len + max(0, params.min_tokens - 1),
        limit=prompt_len + (params.max_tokens or 0),
    )
