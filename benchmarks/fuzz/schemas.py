"""Generated JSON schemas, of what docs/structured-output.md says is enforced, and a little of what is refused."""

import random
from typing import Any

Schema = dict[str, Any]

_NAMES = ["id", "name", "a b", "ü", "$x", 'q"', "x.y", "tags", "-", "日"]
_VALUES: list[Any] = ["S", "a.b", 'q"', "é", "", 0, -3, 2.5, True, False, None, [1, "x"], {"k": [None]}, "back\\s"]
_PATTERNS = ["^[a-z]{2,4}$", "[0-9]{3}", "^(a|ab)c?$", "[A-Z][a-z]*", "^é+$", "x{0,3}", "(ab|[0-9]-)+"]
_FORMATS = ["date", "time", "date-time", "uuid", "ipv4", "email"]
_REFUSED: list[Schema] = [
    {"type": "string", "format": "uri"},
    {"type": "integer", "minimum": 5},
    {"type": "number", "maximum": 1},
    {"type": "array", "uniqueItems": True},
    {"not": {"type": "null"}},
    {"type": "string", "pattern": "."},
]


def draw_schema(rng: random.Random) -> Schema:
    """Draw a schema, mostly an object, with definitions that parts refer to."""
    definitions = {name: _schema(rng, 1, []) for name in rng.sample(["one", "t/wo", "th~ree"], rng.randint(0, 2))}
    refs = [f"#/$defs/{name.replace('~', '~0').replace('/', '~1')}" for name in definitions]
    schema: Schema = (_object if rng.random() < 0.7 else _schema)(rng, 2, refs)
    if rng.random() < 0.3:
        schema |= {"title": "any", "description": "says nothing", "examples": [1]}
    return schema | ({"$defs": definitions} if definitions else {})


def _schema(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    if rng.random() < 0.002:
        return rng.choice(_REFUSED)
    if refs and rng.random() < 0.2:
        return {"$ref": rng.choice(refs)}
    simple = [_string, _integer, _number, _constant, _several_types, _word]
    return rng.choice([*simple, *([_object, _array, _joined] * 2 if depth else [])])(rng, depth, refs)


def _object(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    if rng.random() < 0.1:
        return {"type": "object", "additionalProperties": rng.choice([True, False, _schema(rng, 0, refs)])}
    names = rng.sample(_NAMES, rng.randint(0, 3))
    schema: Schema = {"type": "object", "properties": {name: _schema(rng, max(depth - 1, 0), refs) for name in names}}
    if rng.random() < 0.8:
        schema["required"] = names if rng.random() < 0.4 else [name for name in names if rng.random() < 0.5]
    if rng.random() < 0.5:
        schema["additionalProperties"] = rng.choice([False, False, True, {"type": "null"}])
    return schema


def _array(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    if rng.random() < 0.2:
        return {"type": "array", "prefixItems": [_schema(rng, 0, refs) for _ in range(rng.randint(1, 3))]}
    least = rng.choice([0, 0, 1, 2])
    schema: Schema = {"type": "array", "items": _schema(rng, depth - 1, refs)}
    bounds = {"minItems": least, "maxItems": least + rng.randint(0, 2)}
    return schema | {name: bound for name, bound in bounds.items() if rng.random() < 0.6}


def _joined(rng: random.Random, depth: int, refs: list[str]) -> Schema:
    kind = rng.choice(["anyOf", "anyOf", "oneOf", "allOf"])
    if kind == "allOf":
        return {"allOf": [_schema(rng, depth - 1, refs)]}
    if kind == "oneOf":
        told = [{"type": "object", "properties": {"kind": {"const": n}}, "required": ["kind"]} for n in range(2)]
        return {"oneOf": rng.choice([told, [{"type": "string"}, {"type": "integer"}, {"type": "null"}]])}
    return {"anyOf": [_schema(rng, depth - 1, refs) for _ in range(rng.randint(1, 3))]}


def _string(rng: random.Random, _depth: int, _refs: list[str]) -> Schema:
    form = rng.choice(["open", "length", "length", "pattern", "format"])
    if form == "pattern":
        return {"type": "string", "pattern": rng.choice(_PATTERNS)}
    if form == "format":
        return {"type": "string", "format": rng.choice(_FORMATS)}
    least = rng.randint(0, 4)
    bounds = {"minLength": least, "maxLength": least + rng.randint(0, 6)} if form == "length" else {}
    return {"type": "string"} | {name: bound for name, bound in bounds.items() if rng.random() < 0.8}


def _integer(rng: random.Random, _depth: int, _refs: list[str]) -> Schema:
    low = rng.randint(-20, 120)
    high = low + rng.choice([0, 1, 9, 40])
    form = rng.choice(["open", "least", "range", "range", "exclusive", "mixed"])
    bounds: dict[str, Schema] = {
        "open": {},
        "least": rng.choice([{"minimum": 0}, {"minimum": 1}, {"exclusiveMinimum": -1}]),
        "range": {"minimum": low, "maximum": high},
        "exclusive": {"exclusiveMinimum": low - 1, "exclusiveMaximum": high + 1},
        "mixed": {"minimum": low - 0.5, "exclusiveMaximum": high + 0.5},
    }
    return {"type": "integer", **bounds[form]}


def _number(rng: random.Random, _depth: int, _refs: list[str]) -> Schema:
    return {"type": "number", **rng.choice([{}, {"minimum": 0}])}


def _constant(rng: random.Random, _depth: int, _refs: list[str]) -> Schema:
    values = rng.sample(_VALUES, rng.randint(1, 4))
    return rng.choice([{"const": values[0]}, {"enum": values}])


def _several_types(rng: random.Random, _depth: int, _refs: list[str]) -> Schema:
    types = rng.sample(["string", "integer", "boolean", "null"], rng.randint(1, 3))
    return {"type": types, **({"maxLength": 3} if "string" in types else {})}


def _word(rng: random.Random, _depth: int, _refs: list[str]) -> Schema:
    return {"type": rng.choice(["boolean", "null"])}
