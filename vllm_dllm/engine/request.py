"""A request's options: checked at admission in the front end, resolved when a worker takes the request."""

import hashlib
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from vllm_dllm.blocks import max_prompt_len
from vllm_dllm.config import OWN_OPTIONS, REQUEST_PREFIX, DllmConfig, InvalidOptionError, RequestOptions, plain_number
from vllm_dllm.engine.configs import is_ours, rules_of, served_family, settings_of
from vllm_dllm.engine.edit_tokens import check_request
from vllm_dllm.engine.edits import check_edits, edits_of
from vllm_dllm.engine.ends import ends_of
from vllm_dllm.engine.parameter_types import check_sent
from vllm_dllm.engine.pins import check_fits, pins_of, put_pins_in
from vllm_dllm.engine.policy_limits import refuse_beside_policy, refuse_of_family, refuse_structure
from vllm_dllm.engine.refusals import RequestError, request_options
from vllm_dllm.engine.sliding_rules import check_options
from vllm_dllm.engine.structured import put_in
from vllm_dllm.engine.targets import blocks_of, put_targets_in, targets_of
from vllm_dllm.policy_options import options_of, own_values
from vllm_dllm.request_checks import check_policy_options, request_steps
from vllm_dllm.state.ends import NEVER, NO_ENDS
from vllm_dllm.state.records import NO_LOGPROBS
from vllm_dllm.state.request_params import RequestParams
from vllm_dllm.unmask.policy import POLICY_IDS
from vllm_dllm.unmask.schedule import UnmaskRules, count_table, reveal_times

if TYPE_CHECKING:
    from vllm.renderers.base import BaseRenderer
    from vllm.renderers.params import TokenizeParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor

_INT64_MAX = 2**63 - 1

_is_counting: ContextVar[bool] = ContextVar("is_counting", default=False)


@contextmanager
def counting() -> Iterator[None]:
    """Tokenize prompts of any length inside: they are counted and not served."""
    token = _is_counting.set(True)
    try:
        yield
    finally:
        _is_counting.reset(token)


@contextmanager
def prompt_that_fits(
    renderer: "BaseRenderer", prompt: Any, params: "TokenizeParams"
) -> Iterator[tuple[Any, "TokenizeParams"]]:
    """Make vLLM's tokenization of a prompt cut it to, or refuse it beyond, what a model of ours can serve.

    Yields: the prompt, its token ids plain integers, and the parameters to tokenize it by.

    Raises: RequestError for token ids of another type, a truncation to nothing or to more than can be served, and a
        prompt that is longer than that.
    """
    max_model_len = params.max_total_tokens
    if max_model_len is None or not is_ours(renderer.model_config):
        yield prompt, params
        return
    if _is_counting.get():
        yield prompt, replace(params, max_total_tokens=None, max_output_tokens=0)
        return
    settings = settings_of(renderer.config)
    longest = max_prompt_len(settings, max_model_len)
    is_text = "prompt_token_ids" not in prompt
    if not is_text:
        prompt = {**prompt, "prompt_token_ids": _plain_ids(prompt["prompt_token_ids"])}
    truncation = params.truncate_prompt_tokens
    if truncation is not None and truncation != -1 and not 1 <= truncation <= longest:
        raise RequestError(
            f"truncate_prompt_tokens is {truncation}, allowed are null, -1 (the longest prompt that can be served) and "
            f"1 to {longest}; give one of these",
            parameter="truncate_prompt_tokens",
            value=truncation,
        )
    if truncation == -1:
        truncation = longest
    try:
        # What the reply may have is checked at admission, and is cut to what the prompt leaves.
        yield prompt, replace(params, max_total_tokens=longest, max_output_tokens=0, truncate_prompt_tokens=truncation)
    except VLLMValidationError as error:
        if error.parameter == "input_tokens":
            # vLLM stops to tokenize a text behind the first token that is too much.
            raise _too_long(error.value, settings, max_model_len, is_at_least=is_text) from None
        if error.parameter == "input_text":
            raise _too_long(longest + 1, settings, max_model_len, is_at_least=True) from None
        raise


def _plain_ids(ids: Any) -> list[int]:
    if type(ids) is list and all(type(token) is int for token in ids):
        return ids
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(ids, list | tuple | range):
        raise RequestError(
            f"prompt_token_ids is {reprlib.repr(ids)}, allowed are lists of whole numbers; give one",
            parameter="prompt_token_ids",
            value=ids,
        )
    for position, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise RequestError(
                f"prompt_token_ids[{position}] is {reprlib.repr(token)}, allowed are whole numbers; give the ids of "
                "tokens, or a text as prompt",
                parameter="prompt_token_ids",
                value=token,
            )
    return [int(token) for token in ids]


def check_admission(request: "EngineCoreRequest", settings: DllmConfig, max_model_len: int, mask_token_id: int) -> int:
    """Check what depends on the prompt; returns how many positions the request generates at most.

    Raises: RequestError for a prompt that leaves less than one block, or whose partial block could not be told from
        what is masked, for options that the policy ignores, and for steps that do not divide over the request's blocks.
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
    blocks = blocks_of(params, prompt_len, params.max_tokens, settings, max_model_len)
    if not len(blocks):
        raise _too_long(prompt_len, settings, max_model_len)
    check_fits(params, blocks.end - prompt_len, prompt_len, max_model_len)
    partial_block = request.prompt_token_ids[blocks.begin :]
    if mask_token_id in partial_block:
        position = blocks.begin + partial_block.index(mask_token_id)
        raise RequestError(
            f"the prompt has the mask token {mask_token_id} at position {position} "
            f"(from 0), but the block of {settings.block_length} that begins at {blocks.begin} could not tell it from "
            "what is to be generated; allowed are other tokens there; remove it",
            parameter="prompt",
            value=mask_token_id,
        )
    options = request_options(params)
    if settings.mode == "self_speculation":
        _refuse_for_windows(params, options)
    if options.stream:
        _check_stream(params)
    if settings.has_windows:
        check_options(params, options)
        return blocks.end - prompt_len
    try:
        check_policy_options(options, settings)
        request_steps(options, settings, min(params.max_tokens, blocks.end - prompt_len))
    except InvalidOptionError as error:
        raise RequestError(str(error), parameter=error.parameter, value=error.value) from None
    refuse_beside_policy(params, options.policy or settings.policy, options)
    return blocks.end - prompt_len


_NOT_OF_WINDOWS = (
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "min_p", "logit_bias", "allowed_token_ids"),
    *("bad_words", "min_tokens"),
)
"""Parameters that choose other tokens, and that windows are not verified by."""


def _refuse_for_windows(params: SamplingParams, options: RequestOptions) -> None:
    """Check that a request asks for nothing that self-speculation ignores, whatever diffusion does with it."""
    usual = SamplingParams()
    for name in _NOT_OF_WINDOWS:
        value = getattr(params, name)
        if value != getattr(usual, name) and value not in ([], {}):
            raise RequestError(
                f"{name} is {reprlib.repr(value)}, but the server's mode is 'self_speculation', which verifies drafts "
                f"without it; allowed is {getattr(usual, name)!r}; remove it, or serve the model in another mode",
                parameter=name,
            )
    for name, value in options.model_dump(exclude_none=True).items():
        raise RequestError(
            f"{REQUEST_PREFIX}{name} is {value!r}, but the server's mode is 'self_speculation', which decodes from "
            "left to right, without a policy or a canvas; allowed is none; remove it",
            parameter=REQUEST_PREFIX + name,
            value=value,
        )


def _check_stream(params: SamplingParams) -> None:
    """Check that a request's canvas can be shown: vLLM puts outputs of several completions into one."""
    obstacle = ""
    if params.output_kind == RequestOutputKind.FINAL_ONLY:
        obstacle = (
            "the reply is not streamed; allowed is null; set stream to true, or output_kind to DELTA or CUMULATIVE"
        )
    elif params.n != 1:
        obstacle = f"n is {params.n}; allowed is n 1; send {params.n} requests"
    if obstacle:
        raise RequestError(f"dllm_stream is 'denoising', but {obstacle}, or remove it", parameter="dllm_stream")


def _too_long(prompt_len: int, settings: DllmConfig, max_model_len: int, *, is_at_least: bool = False) -> RequestError:
    longest = max_prompt_len(settings, max_model_len)
    what = "a block and as much behind it need" if settings.is_block_causal else "a block needs"
    what = "a token of the reply needs" if settings.mode == "self_speculation" or settings.has_windows else what
    return RequestError(
        f"the prompt has {'at least ' if is_at_least else ''}{prompt_len} tokens, but {what} "
        f"{max_model_len - longest} of max_model_len {max_model_len}; shorten the prompt to at most {longest} tokens",
        parameter="prompt",
        value=prompt_len,
    )


def finish_admission(
    processor: "InputProcessor",
    request: "EngineCoreRequest",
    asked: StructuredOutputsParams | None = None,
    *,
    is_open_ended: bool = False,
) -> None:
    """Check a request that vLLM admitted, end it with the blocks that fit, and at the family's end-of-turn token too.

    Args:
        processor: of the front end.
        request: changed in place.
        asked: what its answer has to meet, which vLLM did not see.
        is_open_ended: whether it named no length.

    Raises: RequestError.
    """
    model_config = processor.model_config
    if not is_ours(model_config):
        return
    eot_token_id, mask_token_id = model_config.hf_config.eot_token_id, model_config.hf_config.mask_token_id
    settings = settings_of(processor.vllm_config)
    if request.sampling_params is not None:
        put_pins_in(processor, request.sampling_params, follows=is_open_ended)
        put_targets_in(request.sampling_params)
    length = check_admission(request, settings, model_config.max_model_len, mask_token_id)
    params = request.sampling_params
    assert params is not None, "check_admission refuses requests without"
    params.max_tokens = min(int(params.max_tokens or length), length)
    # Plain numbers: what goes to the engine is packed, and NumPy's are not.
    params.temperature, params.top_p = float(params.temperature), float(params.top_p)
    for name in ("n", "top_k", "seed", "logprobs"):
        setattr(params, name, plain_number(getattr(params, name)))
    params.extra_args = _plain_args(params.extra_args)
    if eot_token_id is not None:
        params.update_from_generation_config({"eos_token_id": [eot_token_id]}, params.eos_token_id)
    options = request_options(params)
    never = rules_of(processor.vllm_config).eos_id if options.logits_eos_inf else None
    check_edits(params, mask_token_id, model_config.get_vocab_size(), never)
    refuse_of_family(options.policy or settings.policy, served_family(model_config))
    check_request(params, options, settings, model_config.hf_config)
    if asked is not None:
        refuse_structure(options.policy or settings.policy, options)
        put_in(processor, params, asked)
    check_sent(request)


def _plain_args(args: dict[str, Any] | None) -> dict[str, Any] | None:
    return args and {key: str(v) if isinstance(v, str) else plain_number(v) for key, v in args.items()}


def check_early(processor: "InputProcessor", prompt: Any, params: Any, **options: Any) -> None:
    """Admit a request whose prompt is tokenized, for the errors only: a streamed reply has begun when vLLM does so.

    Raises: what refuses the request.
    """
    if is_ours(processor.model_config) and isinstance(prompt, dict) and "type" in prompt:
        processor.process_inputs("checked early", prompt, params, ("generate",), **options)


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
    options = request_options(params)
    blocks = blocks_of(params, prompt_len, params.max_tokens, settings, max_model_len)
    steps = request_steps(options, settings, min(params.max_tokens or 0, blocks.end - prompt_len))
    fields = RequestOptions.model_fields.keys() - OWN_OPTIONS
    merged = settings.model_copy(update=options.model_dump(include={*fields}, exclude_none=True))
    has_alg_temp = "alg_temp" in options_of(merged.policy)
    own = None if merged.policy in POLICY_IDS else merged.policy
    return RequestParams(
        policy_id=POLICY_IDS.get(merged.policy, 0),
        own_policy=own,
        request_id=request_id,
        own_values=() if own is None else own_values(own, options.parameters, settings.parameters),
        threshold=merged.threshold,
        factor=merged.factor,
        entropy_bound=merged.entropy_bound,
        position_penalty=merged.position_penalty or 0.0,
        credit_alpha=merged.credit_alpha,
        credit_beta=merged.credit_beta,
        credit_gamma=merged.credit_gamma,
        alg_temp=(merged.alg_temp or 0.0) if has_alg_temp else 0.0,
        counts=count_table(rules, settings.block_length, steps),
        times=reveal_times(settings.block_length, steps),
        prompt_len=prompt_len,
        seq_len=blocks.end,
        temperature=params.temperature,
        top_k=min(max(params.top_k, 0), _INT64_MAX),
        top_p=params.top_p,
        seed=_wrap(params.seed) if params.seed is not None else _seed_of(request_id),
        edits=edits_of(params, rules.eos_id if options.logits_eos_inf else None),
        horizon=NEVER if merged.horizon is None else merged.horizon * settings.block_length,
        ends=NO_ENDS if targets_of(params) else ends_of(params, prompt_len, merged.policy),
        cfg_scale=merged.cfg_scale or 0.0,
        pins=pins_of(params, prompt_len),
        num_logprobs=NO_LOGPROBS if params.logprobs is None else params.logprobs,
        targets=targets_of(params),
    )


def _wrap(seed: int) -> int:
    """Wrap into 64 bits: for `n` completions vLLM adds 0..n-1 to the seed that was checked."""
    return (seed + 2**63) % 2**64 - 2**63


def _seed_of(request_id: str) -> int:
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
