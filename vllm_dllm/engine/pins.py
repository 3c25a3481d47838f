"""Partly filled answers: from a request's `dllm_canvas` or `suffix` to the pins that scheduler and workers go by.

A front end reads what was sent, with its tokenizer, and sends token ids in `extra_args`.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from vllm.sampling_params import SamplingParams

from vllm_dllm.arrays import IntArray, to_device
from vllm_dllm.engine.configs import served_family, settings_of
from vllm_dllm.engine.plan import Role, StepPlan
from vllm_dllm.engine.refusals import RequestError, check_length, not_allowed, request_options, reserved
from vllm_dllm.state.pins import OPEN, Pins, PinState

if TYPE_CHECKING:
    from vllm.v1.engine.input_processor import InputProcessor

CANVAS, SUFFIX = "dllm_canvas", "dllm_suffix"
SENT = "vllm_dllm_pins"
"""The key of `extra_args` under which a front end sends token ids, `OPEN` among them; nobody else may set it."""
FOLLOWS = "vllm_dllm_follows"
"""The same, from a server's app: the request named no length, and vLLM's default is none that its canvas must have."""

_FIELDS = {CANVAS: "dllm_canvas", SUFFIX: "suffix (dllm_suffix)"}
_KV_POLICIES = ("dual", "prefix", "block_causal")
_MAX_DIGITS = 6  # of a mark's count


def pins_of(params: SamplingParams | None, prompt_len: int) -> Pins | None:
    """Return the pins of an admitted request; None: it has none."""
    sent = ((params and params.extra_args) or {}).get(SENT)
    return None if sent is None else Pins(prompt_len, np.array(sent, dtype=np.int64))


def answer_length(params: SamplingParams | None, max_tokens: int | None) -> int:
    """Return how many positions an admitted request's sequence has behind its prompt, at least: a suffix lies behind
    the `max_tokens` of its reply.
    """
    sent = ((params and params.extra_args) or {}).get(SENT, ())
    return max(max_tokens or 0, len(sent))


def put_pins_in(processor: "InputProcessor", params: SamplingParams, *, follows: bool) -> None:
    """Read what a request gives of its answer, and put it into its parameters.

    Args:
        processor: of the front end.
        params: of the request, changed in place; `max_tokens` follows a canvas.
        follows: whether the request left `max_tokens` open.

    Raises: RequestError.
    """
    args = dict(params.extra_args or {})
    if SENT in args:
        raise reserved(SENT)
    follows = bool(args.pop(FOLLOWS, False)) or follows
    options = request_options(params)
    if options.canvas is None and options.suffix is None:
        params.extra_args = params.extra_args and args
        return
    _refuse(processor, params, CANVAS if options.suffix is None else SUFFIX)
    assert params.max_tokens is not None, "vLLM fills max_tokens before"
    longest = processor.model_config.max_model_len
    if options.canvas is not None:
        check_length(CANVAS, options.canvas, longest)
        sent = _canvas(processor, options.canvas)
        if not follows and params.max_tokens != len(sent):
            raise RequestError(
                f"max_tokens is {params.max_tokens}, but {CANVAS} has {len(sent)} tokens; allowed are {len(sent)} and "
                "none; leave it out",
                parameter="max_tokens",
                value=params.max_tokens,
            )
        params.max_tokens = len(sent)
    else:
        check_length("suffix", options.suffix or [], longest)
        if params.max_tokens > longest:  # what is little enough to be made, `check_fits` checks with the prompt
            raise RequestError(
                f"max_tokens is {params.max_tokens} before a suffix, which lies behind so many tokens; allowed are "
                f"{longest} at most (max_model_len), less the prompt and the suffix; lower it",
                parameter="max_tokens",
                value=params.max_tokens,
            )
        sent = [OPEN] * params.max_tokens + _ids(processor, SUFFIX, options.suffix or [])
    if params.min_tokens > params.max_tokens:
        raise not_allowed("min_tokens", params.min_tokens, f"numbers from 0 to {params.max_tokens}, those of {CANVAS}")
    params.extra_args = {name: value for name, value in args.items() if name not in _FIELDS} | {SENT: sent}


def _refuse(processor: "InputProcessor", params: SamplingParams, key: str) -> None:
    """Check that the model can be given a part of its answer, and that nothing else contradicts it."""
    settings, args = settings_of(processor.vllm_config), params.extra_args or {}
    why, todo = "", "remove it"
    if args.get(CANVAS) is not None and args.get(SUFFIX) is not None:
        why, todo = f"{CANVAS} is set too, and says what lies behind the reply as well", "send one of them"
    elif settings.mode == "self_speculation":
        why = "the server's mode is 'self_speculation', which decodes from left to right, without a canvas"
    elif key == SUFFIX and settings.is_block_causal:
        why = (
            "the model is block-causal: no position sees what lies behind its block, so a reply could not fit the "
            "suffix"
        )
        todo = "serve a bidirectional model (LLaDA, Dream), or put the suffix into the prompt"
    elif served_family(processor.model_config).stores_alone:
        why = (
            "the model predicts the first position of each block from what is before it, as an autoregressive model, "
            "whatever the block has"
        )
    elif settings.has_windows or settings.kv_policy not in _KV_POLICIES:
        why = f"kv_policy is {settings.kv_policy!r}; with {', '.join(map(repr, _KV_POLICIES))} it is served"
    elif params.bad_words:
        why = "bad_words is set, of which a given token could complete one across the end of a block"
    if why:
        raise RequestError(f"{_FIELDS[key]} is set, but {why}; allowed is null; {todo}", parameter=_name(key))


def _name(key: str) -> str:
    return "suffix" if key == SUFFIX else key


def _canvas(processor: "InputProcessor", canvas: str | Sequence[int | None]) -> list[int]:
    """Return a canvas as token ids and `OPEN`."""
    mask = processor.model_config.hf_config.mask_token_id
    if isinstance(canvas, str):
        sent = _read(processor, canvas)
    else:
        sent = [OPEN if token is None or token == mask else token for token in canvas]
    if not sent:
        raise not_allowed(CANVAS, canvas, "texts and lists of one token and more")
    _check_ids(processor, CANVAS, sent)
    return sent


def _read(processor: "InputProcessor", text: str) -> list[int]:
    """Read a text with the mask token's in it, each for a token to be generated; `<|mask*8|>` are eight `<|mask|>`."""
    mark = _mark(processor)
    stem, closing = re.fullmatch(r"(.*?)(\W*)", mark, re.DOTALL).groups()  # type: ignore[union-attr]  # it matches
    longest = processor.model_config.max_model_len
    sent: list[int] = []
    parts = re.split(rf"({re.escape(stem)}(?:\*\d+)?{re.escape(closing)})", text)
    for number, part in enumerate(parts):
        if number % 2 == 0:
            sent += _ids(processor, CANVAS, part)
            continue
        digits = part[len(stem) + 1 : len(part) - len(closing)] if part != mark else "1"
        if len(digits) > _MAX_DIGITS or not 1 <= int(digits) <= longest - len(sent):
            raise RequestError(
                f"{CANVAS} has {part:.40} behind {len(sent)} tokens, allowed are counts from 1 to what max_model_len "
                f"{longest} leaves; give one of these",
                parameter=CANVAS,
            )
        sent += [OPEN] * int(digits)
    return sent


def _mark(processor: "InputProcessor") -> str:
    """Return the text of the mask token."""
    added = getattr(processor.tokenizer, "added_tokens_decoder", {})
    token = added.get(processor.model_config.hf_config.mask_token_id)
    if token is None:
        raise RequestError(
            f"{CANVAS} is text, but the server has no tokenizer that knows a text of the mask token; allowed are lists "
            "of token ids, with null for what is to be generated; send one",
            parameter=CANVAS,
        )
    return str(getattr(token, "content", token))


def _ids(processor: "InputProcessor", key: str, text: str | Sequence[int]) -> list[int]:
    """Return the tokens of a text, without special ones around it; token ids as they are."""
    if not isinstance(text, str):
        found = list(text)
    elif processor.tokenizer is None:
        raise RequestError(
            f"{_FIELDS[key]} is text, but the server has no tokenizer (--skip-tokenizer-init); allowed are lists of "
            "token ids; send one",
            parameter=_name(key),
        )
    else:
        found = list(processor.tokenizer.encode(text, add_special_tokens=False)) if text else []
    _check_ids(processor, key, found)
    return found


def _check_ids(processor: "InputProcessor", key: str, ids: Sequence[int]) -> None:
    config = processor.model_config
    size, mask = config.get_vocab_size(), config.hf_config.mask_token_id
    for place, token in enumerate(ids):
        is_open = key == CANVAS and token == OPEN
        if not is_open and (not 0 <= token < size or token == mask):
            allowed = f"token ids from 0 to {size - 1} without the mask token"
            raise RequestError(
                f"{_FIELDS[key]} has {token} at position {place}; allowed are {allowed}"
                f"{', and null' if key == CANVAS else ''}; correct it",
                parameter=_name(key),
                value=token,
            )


def check_fits(params: SamplingParams, num_positions: int, prompt_len: int, max_model_len: int) -> None:
    """Check that a request's pins lie in its sequence.

    Args:
        params: as admitted.
        num_positions: of its blocks, behind the prompt.
        prompt_len, max_model_len: positions.

    Raises: RequestError.
    """
    length = answer_length(params, params.max_tokens)
    if SENT in (params.extra_args or {}) and length > num_positions:
        raise RequestError(
            f"the prompt has {prompt_len} tokens and {CANVAS}, or the reply with its suffix, has {length}, but behind "
            f"the prompt max_model_len {max_model_len} has whole blocks of {num_positions} positions; allowed are "
            f"{num_positions} tokens; shorten the prompt, max_tokens or what is given",
            parameter=CANVAS if length == params.max_tokens else "suffix",
            value=length,
        )


def write_pinned_rows(input_ids: Tensor, plan: StepPlan, pins: PinState, slots: IntArray) -> None:
    """Put pins of the blocks behind into the rows of refreshes, where blocks that are not begun are masked.

    Args:
        input_ids: [num_rows] int32, of the step; written to.
        plan: of the step.
        pins: of the slots.
        slots: [num_reqs], of its requests.
    """
    rows, tokens = [], []
    for request, own in pins.of(slots):
        for segment in np.flatnonzero((plan.request == request) & (plan.role == Role.REFRESH)).tolist():
            behind = int(plan.block_start[request]) + plan.block_length
            given = own.of(behind, max(0, int(plan.end[segment]) - behind))
            place = np.flatnonzero(given != OPEN)
            rows.append(int(plan.first_row[segment]) + behind - int(plan.begin[segment]) + place)
            tokens.append(given[place])
    if rows and sum(map(len, rows)):
        packed = np.stack([np.concatenate(rows), np.concatenate(tokens)])
        index, given_tokens = to_device(packed, input_ids.device)
        input_ids[index] = given_tokens.to(input_ids.dtype)
