"""Generated constraints, each with a check of answers that shares nothing with our automata: jsonschema, re, ==."""

import datetime
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jsonschema

from benchmarks.fuzz.schemas import draw_schema

_SPACES: list[dict[str, Any]] = [{}, {}, {"disable_any_whitespace": True}, {"whitespace_pattern": r"[ \n]{0,2}"}]
_WORDS = [
    "yes",
    "no",
    "yes, (and) more",
    "a",
    "ab",
    "a|b",
    "[x]",
    "é",
    "日本",
    '"q"',
    "back\\slash",
    " lead",
    "{}",
    "1.5",
]
_ATOMS = [
    "a",
    "b",
    "ab",
    "a|ab",
    "[a-c]",
    "[^a-z]",
    "[0-9]",
    "é",
    "日",
    r"\.",
    r"\{",
    " ",
    "[a-z0-9 ]",
    ".",
    "x-y",
    r"\n",
]
KINDS = ("json", "regex", "choice", "json_object", "structural_tag")
"""Of constraints: fields of vLLM's `StructuredOutputsParams`."""


@dataclass(frozen=True)
class Asked:
    """What a request asks of its answer.

    Attributes:
        kind: one of `KINDS`.
        params: fields of vLLM's `StructuredOutputsParams`.
        check: raises ValueError for a text that does not meet it.
    """

    kind: str
    params: dict[str, Any]
    check: Callable[[str], None]


def draw_asked(rng: random.Random) -> Asked:
    """Draw a constraint of any kind."""
    kind = rng.choices(KINDS, [45, 30, 15, 5, 5])[0]
    if kind == "json":
        schema = draw_schema(rng)
        return Asked(kind, {"json": rng.choice([schema, json.dumps(schema)]), **rng.choice(_SPACES)}, meets(schema))
    if kind == "regex":
        regex = _regex(rng, depth=3, may_repeat=True)
        return Asked(kind, {"regex": regex}, matches(regex))
    if kind == "choice":
        texts = [_text(rng) for _ in range(rng.randint(1, 6))]
        return Asked(kind, {"choice": texts}, is_one_of(texts))
    if kind == "structural_tag":
        return _forced_call(rng)
    return Asked(kind, {"json_object": True}, meets({"type": "object"}))


def _forced_call(rng: random.Random) -> Asked:
    """What vLLM's parsers make of a forced call of a strict tool."""
    schema, begin, end = draw_schema(rng), rng.choice(["<call>", '{"name": "a", "parameters": ']), "</c>"
    content = {"type": "json_schema", "json_schema": schema}
    tag = {"type": "structural_tag", "format": {"type": "tag", "begin": begin, "content": content, "end": end}}
    inner = meets(schema)

    def check(text: str) -> None:
        if not (text.startswith(begin) and text.endswith(end)):
            raise ValueError(f"{text!r} does not begin with {begin!r}, or not end with {end!r}")
        inner(text.removeprefix(begin).removesuffix(end))

    return Asked("structural_tag", {"structural_tag": json.dumps(tag)}, check)


def _text(rng: random.Random) -> str:
    return "".join(rng.choice(_WORDS) for _ in range(rng.randint(1, 3)))


def _regex(rng: random.Random, depth: int, *, may_repeat: bool) -> str:
    """Draw an expression that Rust and Python read alike; what may repeat without bound holds nothing of the kind,
    since Python would take forever for some texts.
    """
    if depth == 0:
        return f"(?:{rng.choice(_ATOMS)})"
    form = rng.choice(["sequence", "sequence", "either", "repeat", "some", "atom"])
    inner = [_regex(rng, depth - 1, may_repeat=may_repeat and form != "repeat") for _ in range(rng.randint(1, 3))]
    if form == "repeat" and may_repeat:
        return f"(?:{''.join(inner)}){rng.choice(['*', '+', '{2,}'])}"
    if form in ("repeat", "some"):
        return f"(?:{inner[0]}){rng.choice(['?', '{2}', '{1,3}', '{0,4}'])}"
    if form == "either":
        return f"({'|'.join(inner)}{rng.choice(['', '', '|'])})"
    return "".join(inner) if form == "sequence" else f"(?:{rng.choice(_ATOMS)})"


def matches(regex: str) -> Callable[[str], None]:
    """Return the check of a regular expression."""

    def check(text: str) -> None:
        if not re.fullmatch(regex, text):
            raise ValueError(f"{text!r} does not match {regex}")

    return check


def is_one_of(texts: list[str]) -> Callable[[str], None]:
    """Return the check of a choice."""

    def check(text: str) -> None:
        if text not in texts:
            raise ValueError(f"{text!r} is none of {texts}")

    return check


_formats = jsonschema.FormatChecker(["date", "uuid", "ipv4", "email"])


@_formats.checks("time", raises=ValueError)
def _is_time(text: object) -> bool:
    return not isinstance(text, str) or datetime.time.fromisoformat(text).tzinfo is not None


@_formats.checks("date-time", raises=ValueError)
def _is_date_time(text: object) -> bool:
    return not isinstance(text, str) or datetime.datetime.fromisoformat(text).tzinfo is not None


def meets(schema: Any) -> Callable[[str], None]:
    """Return the check of a JSON schema."""
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema, format_checker=_formats)

    def check(text: str) -> None:
        try:
            validator.validate(json.loads(text))
        except (ValueError, jsonschema.ValidationError) as error:
            raise ValueError(f"{text!r} does not meet {json.dumps(schema)}: {error.args[0]}") from None

    return check
