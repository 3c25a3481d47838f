"""The sampling parameters that change logits: checked at admission, and as the worker takes them."""

import math
from collections.abc import Mapping
from typing import Any

from vllm.sampling_params import SamplingParams

from vllm_dllm.config import plain_number
from vllm_dllm.engine.refusals import RequestError, not_allowed
from vllm_dllm.state.edits import LogitEdits

_NEUTRAL: dict[str, object] = {
    "min_p": 0,
    "min_tokens": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "allowed_token_ids": None,
    "bad_words": [],
    "logprobs": False,
    "top_logprobs": 0,
}
"""The parameters, and those that ask for what became of logits, with what asks for nothing."""

_UNKNOWN_TO = {
    "/v1/responses": ("allowed_token_ids", "bad_words", "min_tokens"),
    "/v1/messages": tuple(_NEUTRAL),
    "/cohere/v2/chat": tuple(
        name for name in _NEUTRAL if name not in ("presence_penalty", "frequency_penalty", "logprobs")
    ),
}
"""End of an API's path -> the parameters that vLLM's class of its requests drops."""


_MAX_BIAS = 100.0
"""vLLM's own bound, which it keeps when parameters are made by a server, and not offline."""

_MAX_WORD = 32
"""Tokens of a bad word. vLLM bounds their number (VLLM_MAX_NUM_BAD_WORDS), and a step compares every word with every
place of every canvas of the batch."""


def refuse_dropped(path: str, body: Mapping[str, Any]) -> None:
    """Check that a body has no parameter that its API would drop without a word.

    Raises: RequestError.
    """
    for name in next((names for end, names in _UNKNOWN_TO.items() if path.endswith(end)), ()):
        value = body.get(name)
        if value is not None and value != _NEUTRAL[name]:
            raise RequestError(
                f"{name} is {value!r:.80}, which this API does not hand on; allowed is null; send it to "
                "/v1/chat/completions or /v1/completions",
                parameter=name,
            )


def check_edits(params: SamplingParams, mask_token_id: int, vocab_size: int, never: int | None = None) -> None:
    """Check that a request's edits leave every position a token, and make their numbers Python's own.

    Words with the mask token are dropped, since no answer has it.

    Args:
        params: of the request, changed in place.
        mask_token_id, vocab_size: of the model.
        never: a token that the request does not want at all (`dllm_logits_eos_inf`).

    Raises: RequestError.
    """
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty", "min_p"):
        setattr(params, name, float(getattr(params, name)))
    params.min_tokens = int(plain_number(params.min_tokens))  # type: ignore[call-overload]
    for token, added in (params.logit_bias or {}).items():
        if not -_MAX_BIAS <= added <= _MAX_BIAS:
            raise not_allowed(f"logit_bias[{token}]", added, f"numbers from -{_MAX_BIAS:g} to {_MAX_BIAS:g}")
    if params.bad_words and params.bad_words_token_ids is None:
        raise RequestError(
            f"bad_words is {params.bad_words!r:.80}, but the server has no tokenizer to read them "
            "(--skip-tokenizer-init); allowed is null; remove it",
            parameter="bad_words",
        )
    longest = max(map(len, params.bad_words_token_ids or ()), default=0)
    if longest > _MAX_WORD:
        raise RequestError(
            f"bad_words has one of {longest} tokens, allowed are words of up to {_MAX_WORD}; shorten it",
            parameter="bad_words",
        )
    words = [word for word in params.bad_words_token_ids or () if mask_token_id not in word]
    params._bad_words_token_ids = words
    _check_left(params, {mask_token_id, never, *(token for word in words for token in word)}, vocab_size)


def _check_left(params: SamplingParams, barred: set[int | None], vocab_size: int) -> None:
    """Check that some token is barred nowhere, whatever is known beside a position. Raises: RequestError."""
    if params.min_tokens:
        barred = barred | params.all_stop_token_ids
    allowed = params.allowed_token_ids
    if any(token not in barred for token in (range(vocab_size) if allowed is None else allowed)):
        return
    why = "the mask token, in bad_words, with dllm_logits_eos_inf EOS or, with min_tokens, tokens that end a reply"
    if allowed is not None:
        raise RequestError(
            f"allowed_token_ids is {allowed!r:.80}, all of which are {why}, so a position could be left without any; "
            "allowed are lists with one other token; add one",
            parameter="allowed_token_ids",
        )
    name = "stop_token_ids" if params.min_tokens else "bad_words"
    raise RequestError(
        f"{name} is {getattr(params, name)!r:.80}: all {vocab_size} tokens of the vocabulary are {why}, so a position "
        f"could be left without any; allowed are lists that leave one; shorten {name}",
        parameter=name,
    )


def edits_of(params: SamplingParams, never: int | None = None) -> LogitEdits:
    """Return what a request asks of its logits; `never` is a token that it does not want at all."""
    barred = () if never is None else ((never, -math.inf),)
    return LogitEdits(
        allowed_ids=tuple(dict.fromkeys(params.allowed_token_ids or ())),
        bias=(*(params.logit_bias or {}).items(), *barred),
        end_ids=tuple(sorted(params.all_stop_token_ids)) if params.min_tokens else (),
        min_tokens=params.min_tokens,
        repetition=params.repetition_penalty,
        frequency=params.frequency_penalty,
        presence=params.presence_penalty,
        bad_words=tuple(dict.fromkeys(map(tuple, params.bad_words_token_ids or ()))),
        min_p=params.min_p if params.temperature > 0 else 0.0,
    )
