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


def check_edits(params: SamplingParams, mask_token_id: int) -> None:
    """Check that a request's edits leave every position a token, and make their numbers Python's own.

    Words with the mask token are dropped, since no answer has it.

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
    left = {*(params.allowed_token_ids or ())} - {mask_token_id, *(token for word in words for token in word)}
    left -= params.all_stop_token_ids if params.min_tokens else set()
    if params.allowed_token_ids is not None and not left:
        raise RequestError(
            f"allowed_token_ids is {params.allowed_token_ids!r:.80}, all of which are the mask token, in bad_words or, "
            "with min_tokens, tokens that end a reply, so a position could be left without any; allowed are lists with "
            "one other token; add one",
            parameter="allowed_token_ids",
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
