"""Structural tags, in which vLLM's tool parsers say what calls look like, as an automaton over bytes."""

from collections.abc import Callable, Mapping
from typing import Any

from vllm_dllm.constraint.apart import Json
from vllm_dllm.constraint.calls_in_text import text_with_calls
from vllm_dllm.constraint.regex import ByteAutomaton, ConstraintError, byte_automaton
from vllm_dllm.constraint.schema import escape, schema_regex

_OBJECT = {"type": "object"}


def tag_automaton(tag: Json, space: str) -> ByteAutomaton:
    """Return the automaton of a structural tag.

    Args:
        tag: as parsed from JSON.
        space: as of `schema_regex`.

    Raises: ConstraintError for one in which text is free otherwise than around calls.
    """
    if not (
        isinstance(tag, Mapping) and tag.get("type") == "structural_tag" and isinstance(tag.get("format"), Mapping)
    ):
        raise ConstraintError("a structural tag has no format; allowed are those of tool calls")
    part = tag["format"]
    if part.get("type") != "triggered_tags":
        return byte_automaton(_written(part, space))
    words = [word.encode() for word in (*part["triggers"], *part.get("excludes", ()))]
    calls = "|".join(_written(each, space) for each in part["tags"])
    needs_one, has_one = (bool(part.get(name)) for name in ("at_least_one", "stop_after_first"))
    return text_with_calls(calls, words, needs_one=needs_one, has_one=has_one)


def _written(part: Mapping[str, Any], space: str) -> str:
    def each(name: str) -> list[str]:
        return [_written(element, space) for element in part[name]]

    writes: dict[str, Callable[[], str]] = {
        "const_string": lambda: escape(part["value"]),
        # Parsers leave the arguments of tools that are not strict open; whoever reads them expects an object.
        "json_schema": lambda: _json(part, space),
        "sequence": lambda: "".join(each("elements")),
        "or": lambda: f"(?:{'|'.join(each('elements'))})",
        "tag": lambda: f"{escape(part['begin'])}{_written(part['content'], space)}{escape(part['end'])}",
        "tags_with_separator": lambda: _tags(part, each("tags")),
    }
    kind = part.get("type")
    if kind not in writes or (kind == "tag" and not isinstance(part["end"], str)):
        raise ConstraintError(
            f"a structural tag has a part of type {kind!r}, allowed are {', '.join(writes)}, and triggered_tags around "
            "all: what the server's tool parser asks for is not enforced; send tools that are not strict, or "
            "response_format"
        )
    return writes[str(kind)]()


def _json(part: Mapping[str, Any], space: str) -> str:
    style = part.get("style") or "json"
    if style != "json":
        raise ConstraintError(
            f"the server's tool parser writes parameters in the style {style!r}, allowed is 'json'; send tools that "
            "are not strict, or serve the model with a parser of calls in JSON"
        )
    return schema_regex(_OBJECT if part["json_schema"] in (True, {}) else part["json_schema"], space)


def _tags(part: Mapping[str, Any], tags: list[str]) -> str:
    one = f"(?:{'|'.join(tags)})"
    more = "" if part.get("stop_after_first") else f"(?:{escape(part['separator'])}{one})*"
    return f"{one}{more}" if part.get("at_least_one") else f"(?:{one}{more})?"
