"""Types of sampling parameters that were changed after vLLM checked them.

Some wrong ones end in a TypeError without the parameter's name, and those that only the engine's decoder finds end the
thread that reads its requests: every client then waits forever.
"""

import re
import reprlib
import types
from enum import Enum
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import msgspec
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_dllm.config import plain_number
from vllm_dllm.engine.configs import is_ours
from vllm_dllm.engine.refusals import REFUSED, RequestError, not_allowed

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor

_WORDS = {bool: "True and False", int: "whole numbers", float: "numbers", str: "text", dict: "objects", Any: "anything"}

_FIELDS = {
    field.name: field.type
    for field in msgspec.structs.fields(SamplingParams)
    if not field.name.startswith("_") and field.name not in {*REFUSED, "structured_outputs"}
}
"""Parameters that a request may set -> the type that the engine decodes."""

_OF_STRUCTURE = {name: of for name, of in get_type_hints(StructuredOutputsParams).items() if not name.startswith("_")}


def check_types(processor: "InputProcessor", params: Any) -> None:
    """Check the sampling parameters of a request to a model of ours, before anything else reads them.

    Raises: RequestError naming the parameter, its value and what is allowed.
    """
    if not is_ours(processor.model_config) or not isinstance(params, SamplingParams):
        return
    for name, of in _FIELDS.items():
        value = getattr(params, name)
        if type(value) is not of and not _is(plain_number(value), of):
            raise not_allowed(name, value, _allowed(of))
    _check_structure(params.structured_outputs)
    for word in params.bad_words or ():
        if not word.isascii() and any("\ud800" <= character <= "\udfff" for character in word):
            raise not_allowed("bad_words", params.bad_words, "texts of whole characters, not of half surrogate pairs")
    for key, value in (params.extra_args or {}).items():
        try:
            # Without vLLM's own extensions: an array reaches the engine core, which dies when it hands it on.
            msgspec.msgpack.encode(str(value) if isinstance(value, str) else plain_number(value))
        except (TypeError, ValueError, OverflowError, RecursionError):
            raise RequestError(
                f"{key} is {reprlib.repr(value)}, allowed are numbers, text, and lists and objects of these, which can "
                "be sent to the engine; give one of these",
                parameter=str(key),
            ) from None


def _check_structure(asked: object) -> None:
    if asked is not None and not isinstance(asked, StructuredOutputsParams):
        raise not_allowed("structured_outputs", asked, "None and StructuredOutputsParams")
    for name, of in _OF_STRUCTURE.items() if asked else ():
        value = getattr(asked, name)
        if not _is(value, of):
            raise not_allowed(f"structured_outputs.{name}", value, _allowed(of))


def check_sent(request: "EngineCoreRequest") -> None:
    """Check that the engine can decode what is sent of an admitted request: its salt, its priority and so on.

    Raises: RequestError naming the field, its value and what is allowed.
    """
    sent = msgspec.structs.replace(request, prompt_token_ids=None)  # whole numbers, as its admission saw to
    try:
        MsgpackDecoder(type(request)).decode(MsgpackEncoder().encode(sent))
    except (TypeError, ValueError, OverflowError) as error:
        place = re.search(r"Expected (.*), got .* at `\$\[(\d+)\]", str(error))
        name = request.__struct_fields__[int(place[2])] if place else _first_unsendable(request)
        value = getattr(request, name, getattr(request.sampling_params, name, None))
        allowed = place[1].replace("`", "") if place else "what can be sent to the engine"
        raise RequestError(
            f"{name} is {reprlib.repr(value)}, allowed is {allowed} ({error}); give one of these", parameter=name
        ) from None


def _first_unsendable(request: "EngineCoreRequest") -> str:
    """Return the name of the first field, of the request or of its sampling parameters, that cannot be encoded."""
    for of in filter(None, (request.sampling_params, request)):
        for name in of.__struct_fields__:
            try:
                MsgpackEncoder().encode(getattr(of, name))
            except (TypeError, ValueError, OverflowError):
                return name
    return "request"


def _is(value: object, of: Any) -> bool:
    if isinstance(value, tuple | set | frozenset):
        return False  # a decoder takes them for lists, what reads the parameters before does not
    try:
        msgspec.convert(value, of)
    except msgspec.ValidationError:
        return False
    return True


def _allowed(of: Any) -> str:
    if get_origin(of) in (Union, types.UnionType):
        return " and ".join(_allowed(each) for each in get_args(of))
    if get_origin(of) is list:
        return f"lists of {_allowed(get_args(of)[0])}"
    if isinstance(of, type) and issubclass(of, Enum):
        return ", ".join(str(member) for member in of)
    return "None" if of is type(None) else _WORDS[get_origin(of) or of]
