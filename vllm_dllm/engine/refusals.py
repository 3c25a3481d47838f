"""What a request may not ask of a diffusion model; each is refused under the name it was sent by."""

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_dllm.config import REQUEST_PREFIX, InvalidOptionError, RequestOptions, parse_request_options, request_keys
from vllm_dllm.unmask.logprobs import MAX_LOGPROBS

# Sampling parameters that only left-to-right sampling gives a meaning to, or that are not implemented: the test that
# finds them in use, and what is allowed. A test asks for a decision on each field that a new vLLM brings.
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prompt_logprobs": (lambda v: v is not None, "null"),
    "prompt_logprob_token_ids": (lambda v: v is not None, "null"),
    "prompt_logprob_start": (lambda v: v is not None, "null"),
    "logprob_token_ids": (lambda v: v is not None, "null"),
    "thinking_token_budget": (lambda v: v is not None, "null"),
    "repetition_detection": (lambda v: v is not None, "null"),
    "trace_decode_token_ids": (bool, "null"),
}

_COUNTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    name: (
        lambda v: isinstance(v, Integral) and int(v) not in range(MAX_LOGPROBS + 1),
        f"null and whole numbers from 0 to {MAX_LOGPROBS}",
    )
    for name in ("logprobs", "top_logprobs")
}
"""How many of the likeliest tokens may be asked for, by the names of the APIs."""

_FORMATS = (None, "text", "json_object", "json_schema")
_ALLOWED_FORMATS = "null and an object with type 'text', 'json_object' or 'json_schema'"

# Fields of the APIs' requests that become a sampling parameter of another name or value, or that vLLM would ignore or
# give advice on.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "use_beam_search": (bool, "false"),
    "best_of": (lambda v: v not in (None, 1), "null"),  # not a set: a list has no hash
    "structural_tag": (lambda v: v is not None, "null"),
    "prompt_embeds": (lambda v: v is not None, "null and a prompt of text or token ids"),
}

# Fields whose values are wrong: what is asked of a reply's structure, which is served.
_STRUCTURE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "structured_outputs": (
        lambda v: not (isinstance(v, Mapping) and v),
        "null and an object with one of json, json_object, regex and choice",
    ),
    "response_format": (lambda v: _part(v, "type") not in _FORMATS, _ALLOWED_FORMATS),
    "text.format": (lambda v: _part(v, "type") not in _FORMATS, _ALLOWED_FORMATS),
    "tool_choice": (lambda v: not isinstance(v, str | Mapping), "null, a word and an object"),
    **{
        f"guided_{kind}": (lambda v: v is not None, f"null, and the same as {{{kind!r}: ...}} in structured_outputs")
        for kind in ("json", "regex", "choice")
    },
    "guided_json_object": (bool, "null, and {'json_object': true} in structured_outputs"),
    "guided_grammar": (lambda v: v is not None, "null, and json, json_object, regex or choice in structured_outputs"),
}

# The same by their names in a body: an API that does not know a field ignores it.
_IN_BODY = {**REFUSED, **_FIELDS, **_STRUCTURE, **_COUNTS}

_OWNERS = tuple({name.partition(".")[0]: None for name in _IN_BODY if "." in name})
"""Fields of a body that are objects whose own fields are refused."""

_NEVER: tuple[Callable[[Any], bool], str] = (lambda _: False, "")

_LENGTHS = ("max_completion_tokens", "max_output_tokens")
"""Names that APIs have for `max_tokens`."""

_MISPLACED = {
    "extra_body": "the fields in it, which the client library merges into the request; send 'vllm_xargs' at the top",
    "extra_args": "'vllm_xargs'; send it at the top",
    "sampling_params": "its fields and 'vllm_xargs'; send them at the top",
}
"""Names from client libraries and offline use that a server ignores, and what is allowed instead."""

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0
"""vLLM's own range above 0, which it keeps when parameters are made, and not when they are changed later. In it the
native ops and torch draw the same tokens; at 1e38 they do not."""

_SHORT = 80
"""Characters of a text that an error repeats."""

_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "top_p": (lambda v: 0.0 < v <= 1.0, "numbers above 0 and up to 1"),
    "min_p": (lambda v: 0.0 <= v <= 1.0, "numbers from 0 to 1"),
    "min_tokens": (lambda v: v >= 0, "whole numbers from 0 on"),
    "presence_penalty": (lambda v: -2.0 <= v <= 2.0, "numbers from -2 to 2"),
    "frequency_penalty": (lambda v: -2.0 <= v <= 2.0, "numbers from -2 to 2"),
    "repetition_penalty": (lambda v: 0.01 <= v <= 100.0, "numbers from 0.01 to 100"),
}
"""vLLM's ranges, which parameters may have left since they were made; and one within which logits stay finite, where
vLLM's has no end."""

CHARACTERS_PER_TOKEN = 64
"""A text of more of them than of `max_model_len` tokens is refused before it is tokenized."""

_FOREIGN_PREFIX = "diffusion_"
"""Keys of vLLM's own diffusion model in `extra_args`; its admission check would let them pass unused."""


class RequestError(VLLMValidationError, ValueError):
    """A request that cannot be served: HTTP 400 from a server, ValueError from `LLM`."""

    def __init__(self, message: str, *, parameter: str, value: object = None) -> None:
        super().__init__(message, parameter=parameter, value=value)  # type: ignore[call-arg]  # vLLM is not followed


def request_options(params: SamplingParams) -> RequestOptions:
    """Read a request's `dllm_*` keys.

    Raises: RequestError.
    """
    try:
        return parse_request_options(params.extra_args)
    except InvalidOptionError as error:
        raise RequestError(str(error), parameter=error.parameter, value=error.value) from None


def refuse_unsupported(params: SamplingParams) -> None:
    """Check a request's sampling parameters and `dllm_*` keys, which need no knowledge of its prompt.

    Raises: RequestError naming the parameter, its value and what is allowed.
    """
    request_options(params)
    for name, (is_used, allowed) in REFUSED.items():
        value = getattr(params, name)
        if is_used(value):
            raise _unsupported(name, value, allowed)
    if params.structured_outputs is not None:  # a request's is taken out before
        raise RequestError(
            "structured_outputs is a default of the server, allowed is none; send it with requests",
            parameter="structured_outputs",
        )
    _check_numbers(params)
    for key in params.extra_args or ():
        if str(key).startswith(_FOREIGN_PREFIX):
            raise RequestError(
                f"{key} is an option of another diffusion model; allowed are {', '.join(request_keys())}; remove it "
                "from the request",
                parameter=key,
                value=(params.extra_args or {})[key],
            )


def check_logprobs(params: SamplingParams) -> None:
    """Check what a request asks of log-probabilities, before vLLM does in the words of its own models.

    Raises: RequestError.
    """
    value, (is_wrong, allowed) = params.logprobs, _COUNTS["logprobs"]
    if value is None:
        return
    if is_wrong(value):
        raise not_allowed("logprobs", value, allowed)
    if params.skip_clone and not params.detokenize and value and params.max_tokens == 1:  # vLLM's own, for each beam
        raise RequestError(
            f"logprobs is {value} for a beam of LLM.beam_search, which grows answers from left to right; allowed are "
            "requests without beams; call LLM.generate",
            parameter="logprobs",
            value=int(value),
        )


def _check_numbers(params: SamplingParams) -> None:
    for name in ("seed", "max_tokens", "top_k"):
        value = getattr(params, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise not_allowed(name, value, "whole numbers")
    for name in ("n", "max_tokens"):
        if getattr(params, name) is not None and getattr(params, name) < 1:
            raise not_allowed(name, getattr(params, name), "whole numbers from 1 on")
    if params.seed is not None and not -(2**63) <= params.seed < 2**63:
        raise not_allowed("seed", params.seed, "64-bit signed integers")
    if params.temperature != 0 and not MIN_TEMPERATURE <= params.temperature <= MAX_TEMPERATURE:
        allowed = f"0 (greedy) and {MIN_TEMPERATURE} to {MAX_TEMPERATURE}"
        raise not_allowed("temperature", params.temperature, allowed)
    for name, (is_within, allowed) in _RANGES.items():
        if not is_within(getattr(params, name)):
            raise not_allowed(name, getattr(params, name), allowed)


def refuse_body(body: Mapping[str, Any]) -> None:
    """Check a request's JSON, which still has the fields that vLLM's class of it ignores, converts or fails on.

    Raises: RequestError naming the field, its value and what is allowed.
    """
    for name, value in body.items():
        _refuse_misplaced(name, value)
        _refuse_used(name, value)
        if name in _LENGTHS and type(value) is int and value < 1:
            raise not_allowed(name, value, "null and whole numbers from 1")
        if name == "label_token_ids":
            raise RequestError(
                f"label_token_ids is {reprlib.repr(value)}, but scoring needs the logprobs of a next token, which "
                "diffusion models do not have; allowed is no scoring; score by a model that generates from left to "
                "right",
                parameter=name,
            )
    is_shown = body.get("logprobs") is not None and body["logprobs"] is not False
    if body.get("echo") and (body.get("messages") is not None or is_shown):
        raise RequestError(
            f"echo is {body['echo']!r:.80}{' beside logprobs' * is_shown}, but tokens of a prompt are unmasked by no "
            "step, so that they have no log-probabilities; allowed is false; remove it",
            parameter="echo",
        )
    for owner in _OWNERS:
        for name, value in body[owner].items() if isinstance(body.get(owner), Mapping) else ():
            _refuse_used(f"{owner}.{name}", value)


def refuse_token_body(body: Mapping[str, Any]) -> None:
    """Do the same for the API whose body has `token_ids`, and its sampling parameters in an object of their own.

    Raises: RequestError.
    """
    parameters = body.get("sampling_params")
    at_the_top = {name: value for name, value in body.items() if name != "sampling_params"}
    for where, fields in (("", at_the_top), ("sampling_params.", parameters)):
        for name, value in fields.items() if isinstance(fields, Mapping) else ():
            is_option = name in ("vllm_xargs", *_MISPLACED) or name.startswith(REQUEST_PREFIX)
            if value is not None and is_option and where + name != "sampling_params.extra_args":
                raise RequestError(
                    f"{where}{name} is {reprlib.repr(value)}, where it has no effect; allowed is "
                    "{'sampling_params': {'extra_args': {...}}}; move it there",
                    parameter=where + name,
                )
            _refuse_used(name, value, where)


def _refuse_used(name: str, value: object, where: str = "") -> None:
    is_used, allowed = _IN_BODY.get(name, _NEVER)
    if value is not None and is_used(value):
        is_value_wrong = name in _STRUCTURE or name in _COUNTS
        raise (not_allowed if is_value_wrong else _unsupported)(where + name, value, allowed)


def _refuse_misplaced(name: str, value: object) -> None:
    allowed = _MISPLACED.get(name) if value is not None else None
    if name.startswith(REQUEST_PREFIX):
        allowed = f"{{'vllm_xargs': {{{name!r}: ...}}}}; move it there"
    if allowed:
        raise RequestError(
            f"{name} is {reprlib.repr(value)} at the top of the request, where it has no effect; allowed is {allowed}",
            parameter=name,
            value=_scalar(value),
        )


def _unsupported(name: str, value: object, allowed: str) -> RequestError:
    return RequestError(
        f"{name} is {reprlib.repr(value)}, which this server's decoding does not support; allowed is {allowed}; remove "
        "it from the request",
        parameter=name,
        value=_scalar(value),
    )


def _scalar(value: object) -> object:
    """What vLLM may print behind the message, whole and by its `repr`."""
    is_short = not isinstance(value, str) or len(value) <= _SHORT
    return value if isinstance(value, str | int | float) and is_short else None


def not_allowed(name: str, value: object, allowed: str) -> RequestError:
    """Return the error for a value of a field, with what is allowed of it."""
    shown = value if isinstance(value, float) and math.isfinite(value) else reprlib.repr(value)
    return RequestError(
        f"{name} is {shown}, allowed are {allowed}; give one of these", parameter=name, value=_scalar(value)
    )


def reserved(key: str) -> RequestError:
    """Return the error for a key of `extra_args` that nobody but a front end may set."""
    return RequestError(f"{key} is set, which the front end sets itself; allowed is none; remove it", parameter=key)


def check_length(name: str, given: str | Sequence[object], longest: int) -> None:
    """Check that a text or a list of token ids can fit, before anything is made of it: a text by its characters.

    Raises: RequestError.
    """
    is_text = isinstance(given, str)
    most, what = (longest * CHARACTERS_PER_TOKEN, "characters") if is_text else (longest, "tokens")
    if len(given) > most:
        of_each = f"{CHARACTERS_PER_TOKEN} for each of " * is_text
        raise RequestError(
            f"{name} has {len(given)} {what}, allowed are {most} at most ({of_each}max_model_len {longest}); shorten "
            "it",
            parameter=name,
            value=len(given),
        )


def _part(value: object, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None


def _forces_tool(choice: Any) -> bool:
    """Tell whether a `tool_choice` of any API demands a call: a word or an object, if not one of mode 'auto'."""
    if choice is None or isinstance(choice, str):
        return choice not in (None, "none", "auto")
    return _part(choice, "mode") != "auto" and _part(choice, "type") not in ("auto", "none")


def refuse_strict_tools(body: Mapping[str, Any], *, in_text: bool, if_forced: bool) -> None:
    """Refuse strict tools whose calls nobody's grammar says, as the server's tool parser has none.

    Args:
        body: a request's tools and its choice of them.
        in_text: whether the parser said what calls look like in free text.
        if_forced: whether it said what a reply is like that is a call.

    Raises: RequestError.
    """
    is_forced = _forces_tool(body.get("tool_choice"))
    if if_forced if is_forced else in_text:
        return
    where, what, others = (
        ("where a tool is forced", "", "")
        if is_forced
        else ("where no tool is forced", " in free text", ", or tool_choice 'required' or a named tool")
    )
    for path in _strict_tools(body):
        raise RequestError(
            f"{path} is True {where}, but the server's tool parser does not say what calls look like{what} beside what "
            f"else the request asks for, so that they are not enforced; allowed is false and null{others}; send one of "
            "these, or serve the model with another --tool-call-parser, as 'hermes'",
            parameter=path,
        )


def _strict_tools(body: Mapping[str, Any]) -> Iterator[str]:
    """Find strict tools that may be called."""
    tools, may_call = body.get("tools"), body.get("tool_choice") != "none"
    for i, tool in enumerate(tools if isinstance(tools, list) and may_call else ()):
        for owner, path in ((tool, "strict"), (_part(tool, "function"), "function.strict")):
            if _part(owner, "strict"):
                yield f"tools[{i}].{path}"
