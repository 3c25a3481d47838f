"""JSON of a request that vLLM's classes let pass, and that ends in a TypeError of the tokenizer or of an iterator."""

import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vllm_dllm.engine.explain import MEDIA, named
from vllm_dllm.engine.refusals import RequestError, not_allowed

_TEXT_FIELDS = {"text": "text", "refusal": "refusal", "thinking": "thinking", "tool_reference": "name"}
"""Types of content parts that vLLM takes in the chat API and that are text -> the field that holds it."""

_ROLES = ("user", "assistant", "system", "developer", "tool", "function")
"""Those of the chat API; vLLM takes any other one too, with content of any kind."""

_PROMPTS = "a text, a list of token ids, and a list of texts or of such lists, none of them empty"


def refuse_malformed(path: str, body: Mapping[str, Any]) -> None:
    """Refuse what vLLM would fail on without a word of the field.

    Args:
        path: of the API.
        body: the request's JSON.

    Raises: RequestError naming the field, its value and what is allowed.
    """
    for where, text in _texts(body):
        _refuse_half_character(where, text)
    if path.endswith("/v1/completions"):
        _check_prompt(body.get("prompt"))
    elif path.endswith("/v1/chat/completions"):
        _check_conversation("messages", body.get("messages"))
    elif path.endswith("/v1/chat/completions/batch"):
        for i, messages in enumerate(_list("messages", body.get("messages"), "lists of messages")):
            _check_conversation(f"messages[{i}]", messages)
    elif path.endswith("/v1/responses") and not isinstance(body.get("input"), str | list | None):
        raise not_allowed("input", body["input"], "text and lists of objects")
    for field in ("messages", "input", "system"):
        _refuse_media(field, body.get(field))
    if (tools := body.get("tools")) is not None:
        _list("tools", tools, "objects", is_empty_allowed=True)


def _list(name: str, value: object, of: str, *, is_empty_allowed: bool = False) -> list[Any]:
    if not isinstance(value, list) or not (value or is_empty_allowed):
        raise not_allowed(name, value, f"lists of {of}" + ("" if is_empty_allowed else ", at least one"))
    return value


def _texts(value: object) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield the texts of a JSON value that are not plain ASCII, its keys included, with where they are."""
    left: list[tuple[tuple[str | int, ...], object]] = [((), value)]
    while left:
        where, item = left.pop()
        if isinstance(item, str):
            if not item.isascii():
                yield where, item
        elif isinstance(item, Mapping):
            yield from ((where, key) for key in item if isinstance(key, str) and not key.isascii())
            left.extend(((*where, key), each) for key, each in item.items())
        elif isinstance(item, list):
            left.extend(((*where, i), each) for i, each in enumerate(item) if isinstance(each, str | Mapping | list))


def _refuse_half_character(where: tuple[str | int, ...], text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        name = named(where) or "a name in the body"
        raise RequestError(
            f"{name} has {text[error.start]!r} at character {error.start}, which is half of a surrogate pair; allowed "
            "are whole characters; send both halves, or none",
            parameter=name,
        ) from None


def _check_prompt(prompt: object) -> None:
    if prompt is None:
        raise RequestError(f"prompt is missing; allowed are {_PROMPTS}; add one", parameter="prompt")
    if not isinstance(prompt, str | list) or not prompt:
        raise not_allowed("prompt", prompt, _PROMPTS)
    if isinstance(prompt, str):
        return
    is_alike: Callable[[object], bool] = next((is_ for is_ in (_is_id, _is_text) if is_(prompt[0])), _is_ids)
    for i, each in enumerate(prompt):
        if not is_alike(each):
            raise RequestError(
                f"prompt[{i}] is {reprlib.repr(each)}; allowed for prompt are {_PROMPTS}; correct this entry",
                parameter="prompt",
            )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_id(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and value != [] and all(map(_is_id, value))


def _check_conversation(name: str, messages: object) -> None:
    for i, message in enumerate(_list(name, messages, "objects with a role and content")):
        at = f"{name}[{i}]"
        if not isinstance(message, Mapping):
            raise not_allowed(at, message, "objects with a role and content")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise not_allowed(f"{at}.role", role, ", ".join(map(repr, _ROLES[:5])))
        if content is not None and not isinstance(content, str | list):
            raise not_allowed(f"{at}.content", content, "text and lists of parts")
        if isinstance(content, list) and role in _ROLES:
            _check_parts(f"{at}.content", content)
        if message.get("tool_calls") is not None:
            _check_tool_calls(f"{at}.tool_calls", message["tool_calls"])


def _check_parts(name: str, parts: list[Any]) -> None:
    for i, part in enumerate(parts):
        at = f"{name}[{i}]"
        if not isinstance(part, Mapping):
            raise not_allowed(at, part, "objects like {'type': 'text', 'text': '...'}")
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in _TEXT_FIELDS:
            raise not_allowed(
                f"{at}.type", kind, f"{', '.join(map(repr, _TEXT_FIELDS))}, since the model reads text alone"
            )
        if not isinstance(part.get(_TEXT_FIELDS[kind]), str):
            raise not_allowed(f"{at}.{_TEXT_FIELDS[kind]}", part.get(_TEXT_FIELDS[kind]), "text")


def _check_tool_calls(name: str, calls: object) -> None:
    for i, call in enumerate(_list(name, calls, "objects", is_empty_allowed=True)):
        at = f"{name}[{i}]"
        if not isinstance(call, Mapping):
            raise not_allowed(at, call, "objects with an id, type 'function' and a function")
        if not isinstance(call.get("id"), str):
            raise not_allowed(f"{at}.id", call.get("id"), "text")
        if call.get("type") != "function":
            raise not_allowed(f"{at}.type", call.get("type"), "'function'")
        function = call.get("function")
        if not isinstance(function, Mapping):
            raise not_allowed(f"{at}.function", function, "objects with a name and arguments")
        for field in ("name", "arguments"):
            if not isinstance(function.get(field), str):
                raise not_allowed(f"{at}.function.{field}", function.get(field), "text")


def _refuse_media(name: str, value: object) -> None:
    """Refuse parts that are no text wherever messages may have them; other kinds of parts are vLLM's to know."""
    left: list[tuple[str, object]] = [(name, value)]
    while left:
        at, item = left.pop()
        if isinstance(item, list):
            left.extend((f"{at}[{i}]", each) for i, each in enumerate(item))
        elif isinstance(item, Mapping):
            kind = item.get("type")
            if isinstance(kind, str) and kind in MEDIA:
                raise not_allowed(f"{at}.type", kind, "parts of text, since the model reads text alone")
            left.append((f"{at}.content", item.get("content")))
