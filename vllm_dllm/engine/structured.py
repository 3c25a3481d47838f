"""Structured output: from a request's parameters to the automaton that its workers follow.

vLLM's engine core would fill bit masks from left to right, and vLLM refuses structured output for diffusion models. So
a front end takes the parameters out of a request before vLLM checks it, compiles them, and sends the automaton in
`extra_args`: neither the engine core nor a worker needs a grammar, a tokenizer or a compiler for it.
"""

import copy
import functools
import json
import reprlib
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from vllm_dllm.config import DllmConfig
from vllm_dllm.constraint.answer import Answer
from vllm_dllm.constraint.automaton import NEVER, Automaton
from vllm_dllm.constraint.compile import TokenBytes, compile_tokens
from vllm_dllm.constraint.json_object import json_object_automaton
from vllm_dllm.constraint.reach import BlockConstraint
from vllm_dllm.constraint.regex import ByteAutomaton, ConstraintError, byte_automaton, kept
from vllm_dllm.constraint.schema import escape, schema_regex
from vllm_dllm.constraint.tags import tag_automaton
from vllm_dllm.engine.configs import settings_of
from vllm_dllm.engine.pins import CANVAS, pins_of
from vllm_dllm.engine.refusals import RequestError, reserved
from vllm_dllm.state.request_params import RequestParams

if TYPE_CHECKING:
    from vllm.v1.engine.input_processor import InputProcessor

logger = init_logger("vllm.dllm")

SENT = "vllm_dllm_automaton"
"""The key of `extra_args` under which a front end sends what a worker follows; nobody else may set it."""

_FIELD = "structured_outputs"
_SPACE = " ?"
_ANY_SPACE = r"[ \t\r\n]*"
_KINDS = ("json", "json_object", "regex", "choice", "structural_tag", "grammar")

Source = tuple[tuple[str, str, str | None], tuple[Any, frozenset[int], int, tuple[int, ...]]]
"""What a constraint is compiled from: its kind, its value, the white space of JSON; and the arguments of
`_token_bytes`."""


def take_out(params: SamplingParams) -> tuple[SamplingParams, StructuredOutputsParams | None]:
    """Return a request's parameters without what is asked of its structure, and that. Raises: RequestError."""
    if SENT in (params.extra_args or {}):
        raise reserved(SENT)
    if params.structured_outputs is None:
        return params, None
    own = copy.copy(params)
    own.structured_outputs = None
    return own, params.structured_outputs


def put_in(processor: "InputProcessor", params: SamplingParams, asked: StructuredOutputsParams) -> None:
    """Compile what is asked, and put it into an admitted request's parameters.

    Raises: RequestError for what cannot be enforced, for what else the request asks for that forbids tokens, and for a
        reply that is too short for any answer.
    """
    _refuse_beside(params, settings_of(processor.vllm_config))
    try:
        packed, shortest = compiled(source_of(processor, params, asked))
    except ConstraintError as error:
        raise refusal(asked, error) from None
    assert params.max_tokens is not None, "finish_admission sets it"
    if params.max_tokens < shortest:
        raise RequestError(
            f"max_tokens is {params.max_tokens} (as far as max_model_len has room), but the shortest answer that meets "
            f"{_FIELD} ({_asked(asked)}) has {shortest} tokens; allowed are {shortest} and more; raise max_tokens",
            parameter="max_tokens",
            value=params.max_tokens,
        )
    _check_pins(params, _unpacked(packed))
    params.extra_args = {**(params.extra_args or {}), SENT: packed}


def refusal(asked: StructuredOutputsParams, error: ConstraintError) -> RequestError:
    """Return the error of a request whose constraint cannot be served."""
    return RequestError(f"{_FIELD} cannot be enforced ({_asked(asked)}): {error}", parameter=_FIELD)


def source_of(processor: "InputProcessor", params: SamplingParams, asked: StructuredOutputsParams) -> Source:
    """Return what is compiled, with nothing of it compiled yet. Raises: ConstraintError."""
    return _read(asked), _vocabulary(processor, _end_ids(processor, params))


def is_kept(source: Source) -> bool:
    """Tell whether `compiled` returns, or raises, at once."""
    asked, vocabulary = source
    return _token_bytes.has(*vocabulary) and _compiled.has(*asked, _token_bytes(*vocabulary))


def compiled(source: Source) -> tuple[bytes, int]:
    """Return the automaton of what is asked, as sent, and the fewest tokens of an answer; what is kept at once.

    Else it takes some tenths of a second, most of them in another process. For any thread.

    Raises: ConstraintError.
    """
    asked, vocabulary = source
    return _compiled(*asked, _token_bytes(*vocabulary))


def _check_pins(params: SamplingParams, automaton: Automaton) -> None:
    """Check that some answer has what a request gives of it. Raises: RequestError naming the first token that none has
    behind those before it.
    """
    pins, length = pins_of(params, 0), params.max_tokens or 0
    if pins is None or pins.end > length:  # behind the answer lies a suffix
        return
    whole = BlockConstraint(automaton, 0, np.equal(automaton.distance, 0), length)
    place = whole.first_unmet(pins.of(0, length))
    if place is not None:
        raise RequestError(
            f"{CANVAS} has the token {pins.token_ids[place]} at position {place} (from 0), which no answer of {length} "
            f"tokens that meets {_FIELD} has there, beside what is given before it; allowed are tokens of one that "
            "does; change one of the two",
            parameter=CANVAS,
            value=int(pins.token_ids[place]),
        )


def _refuse_beside(params: SamplingParams, settings: DllmConfig) -> None:
    """Check that nothing else forbids tokens: what a structure allows at a position might be none of the rest."""
    if settings.has_windows:
        raise RequestError(
            f"{_FIELD} is set, or response_format or a forced tool, but the windows of this model have no masked end "
            "that an answer could be completed in; allowed is none; remove it",
            parameter=_FIELD,
        )
    if settings.mode == "self_speculation":
        raise RequestError(
            f"{_FIELD} is set, or response_format or a forced tool, but the server's mode is 'self_speculation', which "
            "verifies drafts without it; allowed is none; remove it, or serve the model in another mode",
            parameter=_FIELD,
        )
    for name in ("allowed_token_ids", "bad_words", "min_tokens"):
        if value := getattr(params, name):
            raise RequestError(
                f"{name} is {reprlib.repr(value)} beside structured output, and both forbid tokens; allowed is one of "
                "them; say it in the structure",
                parameter=name,
            )


def answer_of(
    params: SamplingParams, resolved: RequestParams, tokens: list[int], block_start: int, block_length: int
) -> Answer | None:
    """Return what a request's answer has to meet; None: nothing.

    Args:
        params: as admitted.
        resolved: the same as workers have them.
        tokens: the known tokens; those behind the prompt that was sent are the answer so far.
        block_start: absolute position of the block that comes next.
        block_length: positions of a block.
    """
    packed = (params.extra_args or {}).get(SENT)
    if packed is None:
        return None
    automaton, begin = _unpacked(packed), resolved.prompt_len
    limit, pins = begin + (params.max_tokens or 0), resolved.pins
    end = resolved.seq_len
    if pins is not None and pins.end > limit:  # a suffix is no part of the answer
        end, pins = limit, None
    return Answer(automaton, begin, limit, end, block_start, block_length, automaton.run(tokens[begin:]), pins)


def _read(asked: StructuredOutputsParams) -> tuple[str, str, str | None]:
    """Return what kind of constraint is asked for, of what, and the expression of white space that is given.

    Raises: ConstraintError.
    """
    if asked.disable_additional_properties:
        raise ConstraintError("disable_additional_properties is true, allowed is false: say additionalProperties false")
    kind = next((kind for kind in _KINDS if getattr(asked, kind) not in (None, False)), None)
    value = None if kind is None else getattr(asked, kind)
    if kind is None or kind == "grammar":
        raise ConstraintError(
            "a grammar is no regular language, allowed are json, json_object, regex and choice; write it as a regex of "
            "bounded depth"
            if kind
            else "nothing is asked for, allowed are json, json_object, regex and choice; give one"
        )
    if kind in ("json", "structural_tag"):
        value = _parsed(value)
    if kind == "choice" and not value:
        raise ConstraintError("choice is [], allowed are lists of one text and more; give one")
    space = "" if asked.disable_any_whitespace else asked.whitespace_pattern
    if kind == "regex":
        return kind, str(value), space
    try:
        return kind, json.dumps(value), space
    except (TypeError, ValueError, RecursionError) as error:
        raise ConstraintError(
            f"{kind} cannot be written as JSON ({error}), allowed are objects, lists, texts, numbers, booleans and "
            "None; write it with these"
        ) from None


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ConstraintError(
            f"{value!r:.80} is no JSON ({error}), allowed are JSON texts and objects; correct it"
        ) from None


def _space(pattern: str | None) -> str:
    if not pattern:
        return _SPACE if pattern is None else ""
    try:
        escapes = byte_automaton(pattern).escapes(byte_automaton(_ANY_SPACE))
    except ConstraintError as error:
        raise type(error)(f"whitespace_pattern is {pattern!r:.80}, and {error}") from None
    if escapes:
        raise ConstraintError(
            f"whitespace_pattern is {pattern!r:.80}, which matches more than white space of JSON; allowed are "
            "expressions of blanks, tabs and line ends alone; give one, or leave it out"
        )
    return f"(?:{pattern})"


@kept(128)
def _compiled(kind: str, value: str, pattern: str | None, vocabulary: TokenBytes) -> tuple[bytes, int]:
    """Compile a constraint; returns the automaton as sent, and the fewest tokens of an answer."""
    automaton = compile_tokens(_over_bytes(kind, value, _space(pattern)), vocabulary)
    shortest = int(automaton.distance[0])
    assert shortest != NEVER, "compile_tokens refuses what no text meets"
    return automaton.to_bytes(), shortest


def _over_bytes(kind: str, value: str, space: str) -> ByteAutomaton:
    if kind == "regex":
        return byte_automaton(value)
    parsed = json.loads(value)
    if kind == "choice":
        return byte_automaton("|".join(escape(each) for each in parsed))
    if kind == "json_object" or (parsed in ({}, {"type": "object"}) and space == _SPACE):
        return json_object_automaton()
    try:
        return tag_automaton(parsed, space) if kind == "structural_tag" else byte_automaton(schema_regex(parsed, space))
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ConstraintError(f"it is malformed ({type(error).__name__}: {error}); correct it") from None


@functools.lru_cache(64)
def _unpacked(packed: bytes) -> Automaton:
    return Automaton.from_bytes(packed)


def _asked(asked: StructuredOutputsParams) -> str:
    """Name what is asked for, as whoever sent it knows it."""
    kind = next((kind for kind in _KINDS if getattr(asked, kind) not in (None, False)), "nothing")
    return {
        "json": "json, as of response_format json_schema or a forced tool call",
        "json_object": "json_object, as of response_format",
        "structural_tag": "a structural tag, as of a forced or strict tool call",
    }.get(kind, kind)


def _end_ids(processor: "InputProcessor", params: SamplingParams) -> tuple[int, ...]:
    """Return the tokens that end a reply, and are no text: the checkpoint's, not those of the request."""
    config = processor.model_config.hf_config
    special = _special_ids(processor)
    found = {config.eos_token_id, config.eot_token_id, params.eos_token_id, *(params.all_stop_token_ids & special)}
    return tuple(sorted(each for each in found if each is not None))


def _special_ids(processor: "InputProcessor") -> set[int]:
    tokenizer = processor.tokenizer
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(token for token, each in added.items() if getattr(each, "special", False))}


def _vocabulary(processor: "InputProcessor", ends: tuple[int, ...]) -> tuple[Any, frozenset[int], int, tuple[int, ...]]:
    """Return the arguments of `_token_bytes`. Raises: ConstraintError."""
    if processor.tokenizer is None:
        raise ConstraintError(
            "the server has no tokenizer to compile it for, allowed is nothing of the kind; remove it, or start the "
            "server without --skip-tokenizer-init"
        )
    config = processor.model_config
    hidden = frozenset({*_special_ids(processor), config.hf_config.mask_token_id})
    return processor.tokenizer, hidden, config.get_vocab_size(), ends


@kept(16)
def _token_bytes(tokenizer: Any, hidden: frozenset[int], vocab_size: int, ends: tuple[int, ...]) -> TokenBytes:
    """Return the bytes of a tokenizer's tokens, those left out that are no text. Raises: ConstraintError."""
    tokens = {token: text for token, text in _texts(tokenizer).items() if token not in hidden}
    logger.info("Structured output: %d of %d tokens are text.", len(tokens), len(tokenizer))
    return TokenBytes.of(tokens, vocab_size, ends)


def _texts(tokenizer: Any) -> dict[int, bytes]:
    """Return the bytes of all tokens. Raises: ConstraintError for tokenizers that are not over bytes."""
    of_character = {character: byte for byte, character in bytes_to_unicode().items()}
    decoder = str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
    if "ByteLevel" not in decoder:
        raise ConstraintError(
            "the model's tokenizer is none over bytes, so that the bytes of its tokens are not known; allowed is "
            "nothing of the kind; remove it, or serve a model whose tokenizer is byte-level BPE"
        )
    added = {token: each.content for token, each in tokenizer.added_tokens_decoder.items()}
    texts = {token: added[token].encode() for token in added}
    for text, token in tokenizer.get_vocab().items():
        if token not in added:
            texts[token] = bytes(of_character[character] for character in text)
    return texts
