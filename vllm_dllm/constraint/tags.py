"""Structural tags, in which vLLM's tool parsers say what a forced call looks like, as a regular expression."""

from collections.abc import Callable, Mapping
from typing import Any

from vllm_dllm.constraint.apart import Json
from vllm_dllm.constraint.regex import ConstraintError
from vllm_dllm.constraint.schema import escape, schema_regex

_OBJECT = {"type": "object"}


def tag_regex(tag: Json, space: str) -> str:
    """Return the expression of a structural tag.

    Args:
        tag: as parsed from JSON.
        space: as of `schema_regex`.

    Raises: ConstraintError for one in which text is free but for what begins calls.
    """
    if isinstance(tag, Mapping) and tag.get("type") == "structural_tag" and isinstance(tag.get("format"), Mapping):
        return _written(tag["format"], space)
    raise ConstraintError("a structural tag has no format; allowed are those of forced tool calls")


def _written(part: Mapping[str, Any], space: str) -> str:
    def each(name: str) -> list[str]:
        return [_written(element, space) for element in part[name]]

    writes: dict[str, Callable[[], str]] = {
        "const_string": lambda: escape(part["value"]),
        # Parsers leave the arguments of tools that are not strict open; whoever reads them expects an object.
        "json_schema": lambda: schema_regex(
            _OBJECT if part["json_schema"] in (True, {}) else part["json_schema"], space
        ),
        "sequence": lambda: "".join(each("elements")),
        "or": lambda: f"(?:{'|'.join(each('elements'))})",
        "tag": lambda: f"{escape(part['begin'])}{_written(part['content'], space)}{escape(part['end'])}",
        "tags_with_separator": lambda: _tags(part, each("tags")),
    }
    kind = part.get("type")
    if kind not in writes or (kind == "tag" and not isinstance(part["end"], str)):
        raise ConstraintError(
            f"a structural tag has a part of type {kind!r}, allowed are {', '.join(writes)}: text with calls in it is "
            "not enforced; send tool_choice 'required' or a named tool, tools that are not strict, or response_format"
        )
    return writes[str(kind)]()


def _tags(part: Mapping[str, Any], tags: list[str]) -> str:
    one = f"(?:{'|'.join(tags)})"
    more = "" if part.get("stop_after_first") else f"(?:{escape(part['separator'])}{one})*"
    return f"{one}{more}" if part.get("at_least_one") else f"(?:{one}{more})?"
