"""Why vLLM's class of a request could not be made, in the client's own fields.

The schema library says it in the types of vLLM's classes, once for each member of a union.
"""

import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm_dllm.engine.refusals import RequestError, not_allowed

_KINDS = {
    **dict.fromkeys(("string_type", "string_sub_type", "string_unicode"), "text"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "whole numbers"),
    **dict.fromkeys(("float_type", "float_parsing"), "numbers"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true and false"),
    **dict.fromkeys(("list_type", "tuple_type", "set_type", "iterable_type"), "lists"),
    **dict.fromkeys(("dict_type", "mapping_type", "model_type", "model_attributes_type", "dataclass_type"), "objects"),
    "finite_number": "finite numbers",
    "bytes_type": "base64 text",
    "none_required": "null",
    "callable_type": "functions",
}
"""The schema library's types of errors -> what is allowed."""

_LIMITS = {
    **{"greater_than_equal": "numbers from {ge} on", "less_than_equal": "numbers up to {le}"},
    **{"greater_than": "numbers above {gt}", "less_than": "numbers below {lt}"},
    **{"string_too_short": "text of at least {min_length} characters"},
    **{"string_too_long": "text of at most {max_length} characters"},
    "is_instance_of": "a {class}",
    **{"too_short": "at least {min_length} entries", "too_long": "at most {max_length} entries"},
}
"""Those that tell what is allowed beside."""

MEDIA = (
    *("image", "image_url", "input_image", "image_embeds", "image_pil", "input_file", "file", "document"),
    *("input_audio", "audio_url", "audio_embeds", "video_url", "video_embeds", "prompt_embeds"),
)
"""Types of content parts that are no text."""


def explain_validation(errors: Sequence[Any], body: object) -> RequestError:
    """Say in the client's words why vLLM's class of a request could not be made.

    Args:
        errors: of FastAPI's or pydantic's error, with "body" in front of each location, if at all.
        body: the request's JSON.
    """
    found = [error for error in errors if isinstance(error, Mapping)]
    if not found:
        return RequestError(
            f"the request cannot be read: {'; '.join(map(str, errors)) or 'it has no JSON'}", parameter="body"
        )
    places = [_Place(error, body) for error in found]
    likely = _likely([each for each in places if each.field == places[0].field])
    return likely[0].refusal(dict.fromkeys(each for place in likely for each in place.allowed()))


class _Place:
    """An error of the schema library, and where it is in the client's JSON.

    A location of a union's member holds its type's name too, which is no key there.
    """

    def __init__(self, error: Mapping[str, Any], body: object) -> None:
        self.error, self.kind = error, str(error["type"])
        self.keys: tuple[str | int, ...] = ()
        self.member: tuple[str | int, ...] = ()
        self.value = body
        location = tuple(error["loc"])
        self.location = location[1:] if location[:1] == ("body",) else location
        for i, key in enumerate(self.location):
            if _has(self.value, key):
                self.keys, self.value = (*self.keys, key), self.value[key]  # type: ignore[index]  # it has the key
            elif self.kind == "missing" and i == len(self.location) - 1:
                self.keys = (*self.keys, key)
            else:
                self.member = self.location[: i + 1]

    @property
    def field(self) -> str | int | None:
        return self.keys[0] if self.keys else None

    @property
    def is_tag(self) -> bool:
        """Whether the value says which member of a union is meant, and this one is not."""
        return self.kind in ("literal_error", "union_tag_invalid") and self.keys[-1:] in (("type",), ("role",))

    def is_of(self, other: "_Place") -> bool:
        """Whether this error is in a member of a union that another one says is not meant."""
        return other.member != () and self.location[: len(other.member)] == other.member

    def allowed(self) -> tuple[str, ...]:
        context = self.error.get("ctx", {})
        if self.kind in ("literal_error", "enum", "union_tag_invalid"):
            names = re.findall(r"'[^']*'", context.get("expected") or context["expected_tags"])
            return tuple(name for name in names if name.strip("'") not in MEDIA)
        if self.kind in _LIMITS:
            return (_LIMITS[self.kind].format(**context),)
        return (_KINDS.get(self.kind) or str(self.error["msg"]),)

    def refusal(self, allowed: Iterable[str]) -> RequestError:
        name = named(self.keys) or "body"
        if self.kind == "missing":
            return RequestError(f"{name} is missing; add it to the request", parameter=name)
        if self.kind == "json_invalid":
            (position,) = self.error["loc"][-1:]
            why = self.error.get("ctx", {}).get("error")
            return RequestError(
                f"the body of the request is no JSON ({why} at character {position}); allowed is an object",
                parameter="body",
            )
        if self.kind in ("value_error", "assertion_error"):
            why = str(self.error.get("ctx", {}).get("error") or self.error["msg"])
            return RequestError(f"{name} is {reprlib.repr(self.value)}, which is refused: {why}", parameter=name)
        *others, last = allowed
        return not_allowed(name, self.value, " or ".join([", ".join(others), last] if others else [last]))


def _likely(places: list[_Place]) -> list[_Place]:
    """Return the errors at the place that the client would call the cause: the deepest of the union's member meant."""
    tags = [place for place in places if place.is_tag]
    meant = [place for place in places if not place.is_tag and not any(map(place.is_of, tags))]
    candidates = max(meant, tags, key=lambda found: max((len(place.keys) for place in found), default=-1))
    deepest = max(candidates, key=lambda place: len(place.keys))
    return [place for place in candidates if place.keys == deepest.keys]


def _has(value: object, key: str | int) -> bool:
    if isinstance(value, Mapping):
        return key in value
    return isinstance(value, list) and isinstance(key, int) and 0 <= key < len(value)


def named(keys: Iterable[str | int]) -> str:
    """Return the keys that lead to a value of a JSON object as one name, like `messages[0].content`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")
