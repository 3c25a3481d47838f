"""A request's options: checked at admission in the front end, resolved when a worker takes the request."""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_dllm.config import (
    POLICY_OPTIONS,
    REQUEST_KEYS,
    DllmConfig,
    InvalidOptionError,
    RequestOptions,
    check_policy_options,
    max_prompt_len,
    parse_request_options,
    request_steps,
    row_blocks,
)
from vllm_dllm.engine.config_hook import is_ours, settings_of
from vllm_dllm.state.canvas import RequestParams
from vllm_dllm.unmask.policy import POLICY_IDS
from vllm_dllm.unmask.schedule import UnmaskRules, count_table, reveal_times

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor

# Sampling parameters that only left-to-right sampling gives a meaning to, or that are not implemented: the test that
# finds them in use, and what is allowed. A test asks for a decision on each field that a new vLLM brings.
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "presence_penalty": (lambda v: v != 0.0, "0"),
    "frequency_penalty": (lambda v: v != 0.0, "0"),
    "repetition_penalty": (lambda v: v != 1.0, "1"),
    "min_p": (lambda v: v != 0.0, "0"),
    "min_tokens": (lambda v: v != 0, "0"),
    "logprobs": (lambda v: v is not None, "null"),
    "prompt_logprobs": (lambda v: v is not None, "null"),
    "prompt_logprob_token_ids": (lambda v: v is not None, "null"),
    "prompt_logprob_start": (lambda v: v is not None, "null"),
    "logprob_token_ids": (lambda v: v is not None, "null"),
    "logit_bias": (bool, "null"),
    "allowed_token_ids": (lambda v: v is not None, "null"),
    "bad_words": (bool, "null"),
    "structured_outputs": (lambda v: v is not None, "null"),
    "thinking_token_budget": (lambda v: v is not None, "null"),
    "repetition_detection": (lambda v: v is not None, "null"),
    "trace_decode_token_ids": (bool, "null"),
}

_INT64_MAX = 2**63 - 1

_FOREIGN_PREFIX = "diffusion_"
"""Keys of vLLM's own diffusion model in `extra_args`; its admission check would let them pass unused."""


class RequestError(VLLMValidationError, ValueError):
    """A request that cannot be served: HTTP 400 from a server, ValueError from `LLM`."""

    def __init__(self, message: str, *, parameter: str, value: object = None) -> None:
        super().__init__(message, parameter=parameter, value=value)  # type: ignore[call-arg]  # vLLM is not followed


def refuse_unsupported(params: SamplingParams) -> None:
    """Check a request's sampling parameters and `dllm_*` keys, which need no knowledge of its prompt.

    Raises: RequestError naming the parameter, its value and what is allowed.
    """
    _options(params)
    for name, (is_used, allowed) in _REFUSED.items():
        value = getattr(params, name)
        if is_used(value):
            raise RequestError(
                f"{name} is {value!r}, but diffusion models unmask tokens in any order and do not support it; "
                f"allowed is {allowed}; remove it from the request",
                parameter=name,
                value=value,
            )
    for name in ("seed", "max_tokens", "top_k"):
        value = getattr(params, name)
        if value is not None and type(value) is not int:
            raise RequestError(
                f"{name} is {value!r}, allowed are whole numbers; give one of these", parameter=name, value=value
            )
    if params.seed is not None and not -(2**63) <= params.seed < 2**63:
        raise RequestError(
            f"seed is {params.seed}, allowed are 64-bit signed integers; choose a smaller one",
            parameter="seed",
            value=params.seed,
        )
    for key in params.extra_args or ():
        if str(key).startswith(_FOREIGN_PREFIX):
            raise RequestError(
                f"{key} is an option of another diffusion model; allowed are {', '.join(REQUEST_KEYS)}; remove it "
                "from the request",
                parameter=key,
                value=(params.extra_args or {})[key],
            )


def check_admission(request: "EngineCoreRequest", settings: DllmConfig, max_model_len: int, mask_token_id: int) -> int:
    """Check what depends on the prompt; returns how many positions the request generates at most.

    Raises: RequestError for a prompt that leaves less than one block, or whose tail could not be told from what is
        masked, for options that the policy ignores, and for steps that do not divide over the request's blocks.
    """
    params = request.sampling_params
    if params is None or request.prompt_token_ids is None:
        raise RequestError(
            "the prompt has no token ids, allowed are text and token ids; send one of these", parameter="prompt"
        )
    if request.resumable:
        raise RequestError(
            "the prompt arrives in parts, allowed are whole prompts; send one request per prompt",
            parameter="prompt",
        )
    assert params.max_tokens is not None, "vLLM fills max_tokens before it makes the request"
    prompt_len = len(request.prompt_token_ids)
    blocks = row_blocks(prompt_len, params.max_tokens, settings, max_model_len)
    if not len(blocks):
        raise _too_long(prompt_len, settings, max_model_len)
    tail = request.prompt_token_ids[blocks.begin :]
    if mask_token_id in tail:
        raise RequestError(
            f"the prompt has the mask token {mask_token_id} at position {blocks.begin + tail.index(mask_token_id)} "
            f"(from 0), but the block of {settings.block_length} that begins at {blocks.begin} could not tell it from "
            "what is to be generated; allowed are other tokens there; remove it",
            parameter="prompt",
            value=mask_token_id,
        )
    options = _options(params)
    try:
        check_policy_options(options, settings)
        request_steps(options, settings, blocks)
    except InvalidOptionError as error:
        raise RequestError(str(error), parameter=error.parameter, value=error.value) from None
    return blocks.end - prompt_len


def _too_long(prompt_len: int, settings: DllmConfig, max_model_len: int) -> RequestError:
    longest = max_prompt_len(settings, max_model_len)
    what = "a block and as much behind it need" if settings.kv_policy == "block_causal" else "a block needs"
    return RequestError(
        f"the prompt has {prompt_len} tokens and leaves {max_model_len - prompt_len} of max_model_len "
        f"{max_model_len}, but {what} {max_model_len - longest}; shorten the prompt to at most {longest} tokens",
        parameter="prompt",
        value=prompt_len,
    )


def finish_admission(processor: "InputProcessor", request: "EngineCoreRequest") -> None:
    """Check a request that vLLM admitted, end it with the blocks that fit, and at the family's end-of-turn token too.

    Raises: RequestError.
    """
    model_config = processor.model_config
    if not is_ours(model_config):
        return
    eot_token_id, mask_token_id = model_config.hf_config.eot_token_id, model_config.hf_config.mask_token_id
    settings = settings_of(processor.vllm_config)
    length = check_admission(request, settings, model_config.max_model_len, mask_token_id)
    params = request.sampling_params
    assert params is not None, "check_admission refuses requests without"
    params.max_tokens = min(params.max_tokens or length, length)
    if eot_token_id is not None:
        params.update_from_generation_config({"eos_token_id": [eot_token_id]}, params.eos_token_id)


def resolve_params(
    params: SamplingParams,
    *,
    request_id: str,
    prompt_len: int,
    settings: DllmConfig,
    rules: UnmaskRules,
    max_model_len: int,
) -> RequestParams:
    """Merge a request's options into the server's settings.

    Without a seed one is drawn from the request's id, which vLLM makes random: the same on every tensor-parallel rank
    and after a preemption, without a message between them.
    """
    options = _options(params)
    blocks = row_blocks(prompt_len, params.max_tokens or 0, settings, max_model_len)
    steps = request_steps(options, settings, blocks)
    merged = settings.model_copy(update=options.model_dump(exclude={"steps"}, exclude_none=True))
    has_alg_temp = "alg_temp" in POLICY_OPTIONS[merged.policy]
    return RequestParams(
        policy_id=POLICY_IDS[merged.policy],
        threshold=merged.threshold,
        factor=merged.factor,
        entropy_bound=merged.entropy_bound,
        alg_temp=(merged.alg_temp or 0.0) if has_alg_temp else 0.0,
        counts=count_table(rules, settings.block_length, steps),
        times=reveal_times(settings.block_length, steps),
        prompt_len=prompt_len,
        row_len=blocks.end,
        temperature=params.temperature,
        top_k=min(max(params.top_k, 0), _INT64_MAX),
        top_p=params.top_p,
        seed=_wrap(params.seed) if params.seed is not None else _seed_of(request_id),
    )


def _wrap(seed: int) -> int:
    """Wrap into 64 bits: for `n` completions vLLM adds 0..n-1 to the seed that was checked."""
    return (seed + 2**63) % 2**64 - 2**63


def _seed_of(request_id: str) -> int:
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _options(params: SamplingParams) -> RequestOptions:
    try:
        return parse_request_options(params.extra_args)
    except InvalidOptionError as error:
        raise RequestError(str(error), parameter=error.parameter, value=error.value) from None
