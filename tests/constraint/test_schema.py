"""What a schema's expression writes meets the schema, and what would not be met is refused."""

import json
import random
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from vllm_dllm.constraint.apart import Json
from vllm_dllm.constraint.json_object import MAX_DEPTH, json_object_automaton
from vllm_dllm.constraint.keywords import FORMATS
from vllm_dllm.constraint.regex import ByteAutomaton, ConstraintError, build_table, parse_table
from vllm_dllm.constraint.schema import schema_regex
from vllm_dllm.constraint.tags import tag_automaton


def automaton(regex: str) -> ByteAutomaton:
    return parse_table(build_table(regex))


def some_text(found: ByteAutomaton, rng: random.Random, length: int = 40) -> str | None:
    """Walk at random, then the shortest way to an end; None where the bytes are no text."""
    distance = {state: 0 for state in range(len(found.step)) if found.is_accepting[state]}
    while True:
        more = {s for s in range(len(found.step)) if s not in distance and distance.keys() & {*found.step[s].tolist()}}
        if not more:
            break
        distance |= dict.fromkeys(more, max(distance.values()) + 1)
    bytes_of = [[byte for byte in range(256) if found.class_of[byte] == each] for each in range(found.step.shape[1])]
    state, text = 0, bytearray()
    while len(text) < 400:
        ways = [(c, int(s)) for c, s in enumerate(found.step[state]) if int(s) in distance]
        if found.is_accepting[state] and (len(text) >= length or not ways or rng.random() < 0.3):
            break
        if len(text) >= length:
            ways = [way for way in ways if distance[way[1]] < distance[state]]
        token_class, state = rng.choice(ways)
        text.append(rng.choice(bytes_of[token_class]))
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [
        {"type": "string"},
        {"type": "string", "minLength": rng.randrange(3), "maxLength": 3 + rng.randrange(3)},
        {"type": "string", "pattern": "^[a-z]+[0-9]?$", "title": "t"},
        {"type": "string", "format": rng.choice([*FORMATS])},
        {"type": "integer", "minimum": rng.randrange(2)},
        {"type": "integer", "minimum": -5, "exclusiveMaximum": 7},
        {"type": "number", "minimum": 0},
        {"type": ["string", "null"], "maxLength": 4},
        {"enum": ['a"b', "é", 3, None, {"k": [1, True]}]},
        {"type": "boolean"},
        {},
    ]
    if not depth:
        return rng.choice(kinds)

    def inner() -> dict[str, Any]:
        return random_schema(rng, depth - 1)

    names = rng.sample(["a", "b.c", 'quo"te', "d e", "日"], rng.randrange(1, 5))
    kinds += [
        {"anyOf": [inner(), inner()]},
        {"oneOf": [{"type": "integer"}, {"type": "null"}, {"const": "x"}]},
        {"type": "array", "items": inner(), "minItems": rng.randrange(2), "maxItems": 2},
        {"type": "array", "prefixItems": [inner(), inner()]},
        {
            "type": "object",
            "properties": {name: inner() for name in names},
            "required": rng.sample(names, rng.randrange(len(names) + 1)),
            "additionalProperties": False,
        },
        {"type": "object", "additionalProperties": inner()},
        {"$ref": "#/$defs/one"},
    ]
    return rng.choice(kinds)


def test_what_is_written_meets_the_schema() -> None:
    seen = 0
    for number in range(150):
        rng = random.Random(number)
        schema = {**random_schema(rng, 2), "$defs": {"one": {"type": "array", "items": {"type": "boolean"}}}}
        found = automaton(schema_regex(schema))
        for _ in range(6):
            text = some_text(found, rng)
            if text is not None:
                jsonschema.Draft202012Validator(schema).validate(json.loads(text))
                seen += 1
    assert seen > 600


def test_there_is_no_year_0() -> None:
    """RFC 3339 has one, and clients' libraries of dates do not."""
    found = automaton(schema_regex({"type": "string", "format": "date"}))
    years = ["0000", "0001", "0010", "0100", "1000", "0909", "9999"]
    assert [year for year in years if not found.accepts(f'"{year}-02-28"'.encode())] == ["0000"]


def test_a_reply_of_any_usual_writing_is_possible() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["b"]}
    found = automaton(schema_regex(schema))
    for text in ('{"a": 1, "b": "x"}', '{"b":"\\n"}', '{ "a" : -10,"b": "日" }'):
        assert found.accepts(text.encode()), text
    assert not automaton(schema_regex(schema, "")).accepts(b'{"a": 1, "b": "x"}')


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            {"type": "integer", "multipleOf": 3},
            "at # of the schema stands 'multipleOf', which cannot be enforced there",
        ),
        ({"type": "array", "items": {"type": "int"}}, 'at #/items of the schema type is "int", allowed are object'),
        ({"$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"}, "leads back to itself"),
        ({"$ref": "#/$defs/x"}, "allowed are places in the schema"),
        ({"type": "object", "properties": {}, "required": ["x"]}, "required names 'x', which is not among"),
        ({"type": "string", "pattern": ".*"}, "matches quotes, backslashes or control characters"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "of which one alone can be enforced"),
        ({"type": "string", "format": "uri"}, "format is 'uri', allowed are date, time"),
        ({"oneOf": [{"type": "string"}, {"const": "a"}]}, "branches of oneOf may be met together"),
        ({"allOf": [{"type": "string"}, {"type": "string"}]}, "allOf joins several schemas"),
        ({"type": "integer", "minimum": 5}, "allowed are minimum 0 or 1 alone, and ranges of up to 1000 numbers"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems is 3 and maxItems 2"),
        ({"enum": ["a"], "type": "integer"}, "none of the values"),
        (
            {"type": "integer", "minimum": "5"},
            'at # of the schema minimum is "5", allowed are finite numbers; give one',
        ),
        ({"minimum": 0, "exclusiveMinimum": True}, "exclusiveMinimum is true, allowed are finite numbers"),
        ({"type": "number", "minimum": False}, "minimum is false, allowed are finite numbers"),
        ({"type": "integer", "minimum": float("inf")}, "minimum is Infinity, allowed are finite numbers"),
        ({"type": "integer", "maximum": None}, "maximum is null, allowed are finite numbers"),
        ({"type": "number", "minimum": 1}, "allowed is minimum 0; leave others out"),
        ({"enum": [float("nan")]}, "stands nan, which JSON has no number for"),
        ({"enum": "abc"}, 'enum is "abc", allowed are lists of one value and more; give one of these, or leave it out'),
        ({"enum": []}, "enum is [], allowed are lists of one value and more"),
        ({"pattern": 5}, "pattern is 5, allowed are texts"),
        ({"format": ["date"]}, 'format is ["date"], allowed are texts'),
        ({"type": None}, "type is null, allowed are object, array"),
        ({"type": [["string"]]}, 'type is [["string"]], allowed are object, array'),
        ({"type": "string", "maxLength": -1}, "maxLength is -1, allowed are whole numbers from 0"),
        ({"type": "string", "minLength": True}, "minLength is true, allowed are whole numbers from 0"),
        ({"properties": ["a"]}, 'properties is ["a"], allowed are objects of schemas by name'),
        ({"properties": {}, "required": "a"}, 'required is "a", allowed are lists of names'),
        ({"properties": {}, "additionalProperties": "no"}, 'additionalProperties is "no", allowed are true, false and'),
        ({"maxItems": 0, "items": 5}, "items is 5, allowed are true, false and schemas"),
        ({"prefixItems": {}}, "prefixItems is {}, allowed are lists of schemas"),
        (
            {"properties": {"a": {"oneOf": 5}}},
            "at #/properties/a of the schema oneOf is 5, allowed are lists of one sch",
        ),
        ({"anyOf": []}, "anyOf is [], allowed are lists of one schema and more"),
        ({"type": "string", "oneOf": [{"type": "null"}]}, "branches of oneOf have another type"),
        (False, "stands false, allowed are schemas that can be met"),
        ({"not": {}}, "stands 'not'"),
    ],
)
def test_what_would_not_be_met_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(ConstraintError) as refused:
        schema_regex(schema)
    assert message in str(refused.value)


def test_objects_of_any_kind_as_deep_as_there_are_states() -> None:
    found = json_object_automaton()
    nested = '{"a":' * MAX_DEPTH + "1" + "}" * MAX_DEPTH
    assert found.accepts(nested.encode())
    assert not found.accepts(nested.replace("1", "{}").encode())
    assert not found.accepts(b"[1]")
    assert not found.accepts(b'{"a":1}}')
    seen = 0
    for number in range(100):
        text = some_text(found, random.Random(number), length=30)
        if text is not None:
            assert isinstance(json.loads(text), dict)
            seen += 1
    assert seen > 50


def test_a_forced_call_is_written_as_its_parser_reads_it() -> None:
    content = {"type": "json_schema", "json_schema": {"type": "boolean"}}
    tags = [{"type": "tag", "begin": '<c>{"a": ', "content": content, "end": "}</c>"}]
    part = {"type": "tags_with_separator", "tags": tags, "separator": "", "at_least_one": True}
    found = tag_automaton({"type": "structural_tag", "format": {**part, "stop_after_first": False}}, "")
    assert found.accepts(b'<c>{"a": true}</c><c>{"a": false}</c>')
    assert not found.accepts(b"")
    once = tag_automaton({"type": "structural_tag", "format": {**part, "stop_after_first": True}}, "")
    assert not once.accepts(b'<c>{"a": true}</c><c>{"a": false}</c>')
    with pytest.raises(ConstraintError, match="a structural tag has a part of type 'star', allowed are"):
        tag_automaton({"type": "structural_tag", "format": {"type": "star", "content": part}}, "")
    xml = {**tags[0], "content": {**content, "style": "qwen_xml"}}
    with pytest.raises(ConstraintError, match="writes parameters in the style 'qwen_xml', allowed is 'json'"):
        tag_automaton({"type": "structural_tag", "format": xml}, "")


def test_free_text_may_have_calls_of_its_tools_alone() -> None:
    content = {"type": "json_schema", "json_schema": {"type": "boolean"}, "style": "json"}
    tag = {"type": "tag", "begin": '<c>{"a": ', "content": content, "end": "}</c>"}
    part = {"type": "triggered_tags", "triggers": ["<c>"], "tags": [tag], "excludes": ["<think>"]}
    found = tag_automaton({"type": "structural_tag", "format": {**part, "stop_after_first": False}}, "")
    for text in (b"", b"a < b", b'x<c>{"a": true}</c>, <c>{"a": false}</c>y', b'<c>{"a": true}</c>'):
        assert found.accepts(text), text
    for text in (b"<c>", b'<c>{"a": 1}</c>', b'<c>{"b": true}</c>', b'x<c>{"a": true}', b"a <think> b"):
        assert not found.accepts(text), text


def doubling(depth: int, join: Callable[[Json], Json]) -> Json:
    """A small schema whose parts each have the next one twice."""
    parts = {f"d{i}": join({"$ref": f"#/$defs/d{i + 1}"}) for i in range(depth)}
    return {"$ref": "#/$defs/d0", "$defs": {**parts, f"d{depth}": {"type": "null"}}}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            doubling(40, lambda part: {"type": "object", "properties": {"a": part, "b": part}, "required": ["a", "b"]}),
            "characters as a regular expression, allowed are 131072",
        ),
        (doubling(40, lambda part: {"anyOf": [part, part]}), "stands part 20001 of it"),
        (
            {"type": "object", "properties": {str(i): {"type": "string", "pattern": "a" * i} for i in range(1, 40)}},
            "stands pattern 17, and each is built by itself",
        ),
    ],
)
def test_a_small_schema_that_is_much_is_refused_at_once(schema: Json, message: str) -> None:
    with pytest.raises(ConstraintError, match=message):
        schema_regex(schema)
