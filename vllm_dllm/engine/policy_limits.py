"""What a request may not ask for beside its unmasking policy."""

from vllm.sampling_params import SamplingParams

from vllm_dllm.config import RequestOptions
from vllm_dllm.engine.pins import CANVAS, SENT
from vllm_dllm.engine.refusals import RequestError
from vllm_dllm.models.interface import ModelFamily
from vllm_dllm.unmask.registry import NATIVE, changes_tokens, is_users, needs_file, torch_policy

_UNFILTERED = {"top_k": "0 or -1", "top_p": "1", "min_p": "0"}


def refuse_beside_policy(params: SamplingParams, policy: str, options: RequestOptions) -> None:
    """Check that a request's sampling goes with its policy. Raises: RequestError."""
    if policy == "credit" and params.temperature > 0:
        _refuse_filters(params)
    if not changes_tokens(policy):
        return
    if SENT in (params.extra_args or {}):
        raise RequestError(
            f"a part of the answer is given (dllm_canvas, suffix), but the request's policy {policy!r} takes tokens "
            "back; allowed is none; remove it, or send another dllm_policy",
            parameter=CANVAS,
        )
    if params.temperature > 0:
        raise RequestError(
            f"temperature is {params.temperature}, but the request's policy {policy!r} takes tokens back, and would "
            "draw the same ones again; allowed is 0; send that, or another dllm_policy",
            parameter="temperature",
            value=params.temperature,
        )
    if params.bad_words:
        raise RequestError(
            f"bad_words is {params.bad_words!r:.80}, but the request's policy {policy!r} changes tokens that were "
            "written, beside which a word was barred; allowed is none; remove it, or send another dllm_policy",
            parameter="bad_words",
            value=params.bad_words,
        )
    if is_users(policy):
        _refuse_forbidden(params, policy, options)


def refuse_of_family(policy: str, family: ModelFamily) -> None:
    """Check that a policy may decide a family's blocks, whose first position may come from what is stored alone.

    A block's rows say nothing of that position then: with a shift none of them predicts it, else it is predicted as
    the diffusion that the family does not use there. Raises: RequestError.
    """
    if not family.stores_alone or policy in NATIVE:
        return
    found, why = torch_policy(policy), ""
    if found.tokens_change:
        why = "takes tokens back, and no step could decide a block's first one again"
    elif family.logit_shift and (found.asks_known or needs_file(policy) or is_users(policy)):
        why = "looks at known tokens, and no step says anything of a block's first one"
    if why:
        raise RequestError(
            f"dllm_policy is {policy!r}, which {why} in this model: it is predicted once, by the tokens before the "
            "block; allowed are policies that only add tokens by what is masked; send another one",
            parameter="dllm_policy",
            value=policy,
        )


def refuse_structure(policy: str, options: RequestOptions) -> None:
    """Check that a policy may decide under a constraint, and that the answer may end. Raises: RequestError."""
    if options.logits_eos_inf:
        raise RequestError(
            "dllm_logits_eos_inf is true beside structured output, whose answer ends with EOS; allowed is null; remove "
            "it",
            parameter="dllm_logits_eos_inf",
        )
    if changes_tokens(policy):
        raise RequestError(
            "structured_outputs is set, or response_format or a forced tool, but the request's policy "
            f"{policy!r} changes tokens that were written, by which others were allowed; allowed is none; remove it, "
            "or send another dllm_policy",
            parameter="structured_outputs",
        )


def _refuse_forbidden(params: SamplingParams, policy: str, options: RequestOptions) -> None:
    """Check that no token is forbidden where a policy may write any: ours write those that the edited logits allow."""
    forbids = {
        "allowed_token_ids": (params.allowed_token_ids, "null"),
        "min_tokens": (params.min_tokens, "0"),
        "dllm_logits_eos_inf": (options.logits_eos_inf, "null"),
    }
    for name, (value, allowed) in forbids.items():
        if value:
            raise RequestError(
                f"{name} is {value!r:.80}, but the request's policy {policy!r}, a user's, may write any token; allowed "
                f"is {allowed}; remove it, or send another dllm_policy",
                parameter=name,
                value=value,
            )


def _refuse_filters(params: SamplingParams) -> None:
    """Check that nothing filters what a policy draws of other logits than the model's, which nobody sorts."""
    filters = {"top_k": params.top_k > 0, "top_p": params.top_p < 1, "min_p": params.min_p > 0}
    for name, is_used in filters.items():
        if is_used:
            value = getattr(params, name)
            raise RequestError(
                f"{name} is {value}, but the request's policy 'credit' draws of logits that credit raised, unfiltered; "
                f"allowed is {_UNFILTERED[name]}; send that, temperature 0 or another dllm_policy",
                parameter=name,
                value=value,
            )
