"""The keywords of JSON schemas that can be enforced, and what is allowed of each."""

import math
from collections.abc import Callable, Mapping

from vllm_dllm.constraint.apart import Json

_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_DAY = f"{_YEAR}-(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:0[0-9]|1[0-3]):[0-5][0-9])"
_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
FORMATS = {
    "date": _DAY,
    "time": _TIME,
    "date-time": f"{_DAY}T{_TIME}",
    "uuid": "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "ipv4": rf"{_OCTET}(?:\.{_OCTET}){{3}}",
    "email": r"[a-z0-9]+(?:[._+-][a-z0-9]+)*@[a-z0-9]+(?:-[a-z0-9]+)*(?:\.[a-z0-9]+(?:-[a-z0-9]+)*)+",
}
"""Of each format that is known, texts that have it; days up to the 28th."""

ANNOTATIONS = {
    *("title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated", "readOnly"),
    *("writeOnly", "$defs", "definitions", "discriminator", "strict"),
}
OF_TYPE = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems", "prefixItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": {"minimum"},
    "boolean": set(),
    "null": set(),
}
TYPES: dict[str, Callable[[Json], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
}


def is_number(value: Json) -> bool:
    """Tell whether a value is a number, and finite."""
    return TYPES["number"](value) and (isinstance(value, int) or math.isfinite(value))


def _is_count(value: Json) -> bool:
    return TYPES["integer"](value) and value >= 0


def _is_schema(value: Json) -> bool:
    return isinstance(value, bool | Mapping)


def _is_filled(value: Json) -> bool:
    return isinstance(value, list) and bool(value)


VALUES: dict[str, tuple[Callable[[Json], bool], str]] = {
    "enum": (_is_filled, "lists of one value and more"),
    **dict.fromkeys(("anyOf", "oneOf", "allOf"), (_is_filled, "lists of one schema and more")),
    "properties": (lambda v: isinstance(v, Mapping), "objects of schemas by name"),
    "required": (lambda v: isinstance(v, list) and all(isinstance(each, str) for each in v), "lists of names"),
    **dict.fromkeys(("additionalProperties", "items"), (_is_schema, "true, false and schemas")),
    "prefixItems": (lambda v: isinstance(v, list), "lists of schemas"),
    **dict.fromkeys(("minItems", "maxItems", "minLength", "maxLength"), (_is_count, "whole numbers from 0")),
    "pattern": (lambda v: isinstance(v, str), "texts"),
    "format": (lambda v: isinstance(v, str), "texts"),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), (is_number, "finite numbers")),
}
"""Of keywords, which values mean something, and what these are."""
