"""A JSON schema as a regular expression.

What is written meets the schema; it may be less than what the schema allows: properties come in the order of the schema
and no others, and what a schema leaves open is not nested deeper than `FREE_DEPTH`. A keyword that would not be met is
refused: nothing is ignored but annotations.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_dllm.constraint.apart import Json, is_apart
from vllm_dllm.constraint.keywords import ANNOTATIONS, FORMATS, OF_TYPE, TYPES, VALUES, is_number
from vllm_dllm.constraint.regex import MAX_LENGTH, ConstraintError, UnfinishedError, byte_automaton

FREE_DEPTH = 1
"""How deep objects and arrays are nested in what a schema leaves open."""
_MAX_RANGE = 1000

CHARACTER = r'(?:[^"\\\x00-\x1F\x7F-\x9F]|\\["\\/bfnrt])'
STRING = f'"{CHARACTER}*"'
_WHOLE = "(?:0|[1-9][0-9]*)"
NUMBER = rf"-?{_WHOLE}(?:\.[0-9]+)?(?:[eE][+-][0-9]+)?"
_PLAIN = r'[^"\\\x00-\x1F\x7F-\x9F]*'  # what means itself within a string of JSON


MAX_PARTS = 20_000
MAX_PATTERNS = 16
"""Of a schema. Whoever asks for one waits, and so does the server."""


def schema_regex(schema: Json, space: str = " ?") -> str:
    """Return the expression of a schema.

    Args:
        schema: as parsed from JSON.
        space: an expression of the white space between parts.

    Raises: ConstraintError naming the place in the schema.
    """
    return _Writer(schema, space).write(schema)


@dataclass(frozen=True, slots=True)
class _Writer:
    root: Json
    space: str
    path: str = "#"
    refs: tuple[str, ...] = ()  # on the way here
    parts: list[str] = field(default_factory=list)  # that were written so far
    patterns: set[str] = field(default_factory=set)

    def at(self, *names: object) -> "_Writer":
        return replace(self, path="/".join([self.path, *map(str, names)]))

    def error(self, what: str) -> ConstraintError:
        return ConstraintError(f"at {self.path} of the schema {what}")

    def write(self, schema: Json) -> str:
        """Return the expression of a part of the schema; one that `$ref` leads to again is written again."""
        self.parts.append(self.path)
        if len(self.parts) > MAX_PARTS:
            raise self.error(f"stands part {MAX_PARTS + 1} of it, counted as often as $ref leads there; write fewer")
        text = self._write(schema)
        if len(text) > MAX_LENGTH:
            raise self.error(
                f"stands what has {len(text)} characters as a regular expression, allowed are {MAX_LENGTH}; write less"
            )
        return text

    def _write(self, schema: Json) -> str:
        if schema is True:
            return self._free(FREE_DEPTH)
        if not isinstance(schema, Mapping):
            raise self.error(f"stands {json.dumps(schema, default=str)[:80]}, allowed are schemas that can be met")
        own = {key: value for key, value in schema.items() if key not in ANNOTATIONS and not key.startswith("x-")}
        self._check_values(own)
        for name, writes in self._compound().items():
            if name in own:
                return writes(own.pop(name), own)
        types = own.pop("type", None)
        if types is None:
            types = [name for name, keys in OF_TYPE.items() if keys & own.keys()][:1]
            if not types:
                self._refuse(own)
                return self._free(FREE_DEPTH)
        types = types if isinstance(types, list) else [types]
        self._refuse({key: value for key, value in own.items() if not any(key in OF_TYPE[each] for each in types)})
        parts = [self._typed(each, {key: v for key, v in own.items() if key in OF_TYPE[each]}) for each in types]
        return _any_of(parts)

    def _check_values(self, own: Mapping[str, Any]) -> None:
        """Check that no keyword has a value that means nothing. Raises: ConstraintError."""
        for name, value in own.items():
            if name == "type":
                names = value if isinstance(value, list) else [value]
                is_right, allowed = bool(names) and all(each in [*OF_TYPE] for each in names), ", ".join(OF_TYPE)
            else:
                test, allowed = VALUES.get(name, (lambda _: True, ""))
                is_right = test(value)
            if not is_right:
                shown = json.dumps(value, default=str)[:80]
                raise self.error(f"{name} is {shown}, allowed are {allowed}; give one of these, or leave it out")

    def _compound(self) -> dict[str, Callable[[Any, dict[str, Any]], str]]:
        return {
            "$ref": self._ref,
            "enum": self._enum,
            "const": lambda value, own: self._enum([value], own),
            "anyOf": self._branches,
            "oneOf": self._one_of,
            "allOf": self._all_of,
        }

    def _refuse(self, others: Mapping[str, Any]) -> None:
        for key in others:
            known = sorted({each for keys in OF_TYPE.values() for each in keys})
            raise self.error(
                f"stands {key!r}, which cannot be enforced there; known are {', '.join(known)}, each with its type, "
                "and type, enum, const, anyOf, oneOf, $ref alone"
            )

    def _ref(self, ref: Json, own: dict[str, Any]) -> str:
        self._refuse(own)
        if ref in self.refs:
            raise self.error(
                f"$ref {ref!r} leads back to itself: a recursive schema is no regular language; write out as many "
                "levels as the answer may have"
            )
        target: Json = self.root
        for name in str(ref).removeprefix("#").split("/")[1:]:
            name = name.replace("~1", "/").replace("~0", "~")
            target = target.get(name) if isinstance(target, Mapping) else None
        if target is None or not str(ref).startswith("#"):
            raise self.error(f"$ref is {ref!r}, allowed are places in the schema, like '#/$defs/name'")
        return replace(self, refs=(*self.refs, ref)).write(target)

    def _enum(self, values: Json, own: dict[str, Any]) -> str:
        types = own.pop("type", None)
        self._refuse(own)
        names = types if isinstance(types, list) else [types]
        fitting = [v for v in values if types is None or any(TYPES[name](v) for name in names)]
        if not fitting:
            raise self.error(
                f"none of the values {json.dumps(values, default=str)[:80]} has the type {types}; leave it out"
            )
        return _any_of([self._literal(value) for value in fitting])

    def _literal(self, value: Json) -> str:
        separators = (",", ":")
        try:
            return escape(json.dumps(value, ensure_ascii=False, separators=separators, allow_nan=False))
        except ValueError:
            raise self.error(f"stands {value!r:.80}, which JSON has no number for; allowed are finite ones") from None

    def _branches(self, branches: list[Json], own: dict[str, Any], name: str = "anyOf") -> str:
        kind = own.pop("type", None)
        self._refuse(own)
        if kind is not None:  # holds for all of them
            branches = [{"type": kind, **each} if isinstance(each, Mapping) else each for each in branches]
            if any(isinstance(each, Mapping) and each["type"] != kind for each in branches):
                raise self.error(f"branches of {name} have another type than the one beside them; leave that out")
        return _any_of([self.at(name, place).write(each) for place, each in enumerate(branches)])

    def _one_of(self, branches: list[Json], own: dict[str, Any]) -> str:
        for place, branch in enumerate(branches):
            self.at("oneOf", place).write(branch)
            if any(not is_apart(branch, other, self.root) for other in branches[:place]):
                raise self.error(
                    "the branches of oneOf may be met together; use anyOf, or a const that tells them apart"
                )
        return self._branches(branches, own, "oneOf")

    def _all_of(self, branches: list[Json], own: dict[str, Any]) -> str:
        self._refuse(own)
        if len(branches) != 1:
            raise self.error("allOf joins several schemas, which is not supported; write them as one")
        return self.at("allOf", 0).write(branches[0])

    def _typed(self, name: str, own: dict[str, Any]) -> str:
        writes: dict[str, Callable[[dict[str, Any]], str]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "integer": self._integer,
            "number": self._number,
            "boolean": lambda _: "(?:true|false)",
            "null": lambda _: "null",
        }
        return writes[name](own)

    def _object(self, own: dict[str, Any]) -> str:
        properties, required = own.get("properties"), own.get("required", [])
        others = own.get("additionalProperties", True)
        missing = [name for name in required if name not in (properties or {})]
        if missing:
            raise self.error(f"required names {missing[0]!r}, which is not among the properties; add it there")
        space = self.space
        if properties is None and others is not False:
            value = self._free(FREE_DEPTH) if others is True else self.at("additionalProperties").write(others)
            pair = f"{STRING}{space}:{space}{value}"
            return rf"\{{{space}(?:{pair}(?:{space},{space}{pair})*{space})?\}}"
        pairs = [
            (f"{self._literal(name)}{space}:{space}{self.at('properties', name).write(value)}", name in required)
            for name, value in (properties or {}).items()
        ]
        return rf"\{{{space}{self._pairs(pairs)}\}}"

    def _pairs(self, pairs: list[tuple[str, bool]]) -> str:
        """Write properties in their order, of which those that are not required may be missing."""
        space, comma = self.space, f"{self.space},{self.space}"
        first = next((place for place, (_, is_required) in enumerate(pairs) if is_required), None)
        behind = [f"{comma}{pair}" if is_required else f"(?:{comma}{pair})?" for pair, is_required in pairs]
        if first is not None:
            before = "".join(f"(?:{pair}{comma})?" for pair, _ in pairs[:first])
            return f"{before}{pairs[first][0]}{''.join(behind[first + 1 :])}{space}"
        starts = [pair + "".join(behind[place + 1 :]) + space for place, (pair, _) in enumerate(pairs)]
        return f"{_any_of(starts)}?" if starts else ""

    def _array(self, own: dict[str, Any]) -> str:
        space, comma = self.space, f"{self.space},{self.space}"
        if "prefixItems" in own:
            self._refuse({key: own[key] for key in ("minItems", "maxItems") if key in own})
            parts = [self.at("prefixItems", n).write(each) for n, each in enumerate(own["prefixItems"])]
            return rf"\[{space}{comma.join(parts)}{space}\]"
        least, most = self._bounds(own, "minItems", "maxItems")
        item = self.at("items").write(own.get("items", True)) if most != 0 else ""
        more = f"{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        filled = f"{item}(?:{comma}{item}){more}{space}" if most != 0 else ""
        return rf"\[{space}{filled}\]" if least else rf"\[{space}(?:{filled})?\]"

    def _bounds(self, own: dict[str, Any], low: str, high: str) -> tuple[int, int | None]:
        least, most = own.get(low, 0), own.get(high)
        if most is not None and most < least:
            raise self.error(f"{low} is {least} and {high} {most}, allowed is {high} from {low} on; raise it")
        return least, most

    def _string(self, own: dict[str, Any]) -> str:
        ways = [key for key in ("pattern", "format") if key in own]
        if not ways:
            least, most = self._bounds(own, "minLength", "maxLength")
            is_open = least == 0 and most is None
            return STRING if is_open else f'"{CHARACTER}{{{least},{"" if most is None else most}}}"'
        if len(own) > 1:
            raise self.error(f"stand {' and '.join(own)}, of which one alone can be enforced")
        if "format" in own:
            if own["format"] not in FORMATS:
                raise self.error(f"format is {own['format']!r}, allowed are {', '.join(FORMATS)}; give a pattern")
            return f'"{FORMATS[own["format"]]}"'
        return self._pattern(own["pattern"])

    def _pattern(self, pattern: str) -> str:
        self.patterns.add(pattern)
        if len(self.patterns) > MAX_PATTERNS:
            raise self.error(f"stands pattern {MAX_PATTERNS + 1}, and each is built by itself; write fewer")
        body = pattern.removeprefix("^")
        if body.endswith("$") and not re.search(r"(?<!\\)(?:\\\\)*\\\$$", body):
            body = body[:-1]
        try:
            escapes = byte_automaton(body).escapes(byte_automaton(_PLAIN))
        except UnfinishedError:  # another time it may be served
            raise
        except ConstraintError as error:
            raise self.error(f"stands a pattern that cannot be served: {error}") from None
        if escapes:
            raise self.error(
                f"the pattern {pattern!r} matches quotes, backslashes or control characters, which a string of JSON "
                'has only escaped; use classes without them, such as [^"\\\\\\x00-\\x1f\\x7f-\\x9f] in place of a dot'
            )
        return f'"(?:{body})"'

    def _integer(self, own: dict[str, Any]) -> str:
        low = _least(own.get("minimum"), own.get("exclusiveMinimum"))
        below = _least(_negative(own.get("maximum")), _negative(own.get("exclusiveMaximum")))
        high = None if below is None else -below
        if low is not None and high is not None and 0 <= high - low < _MAX_RANGE:
            return _any_of([str(number) for number in range(low, high + 1)])
        written = {None: f"-?{_WHOLE}", 0: _WHOLE, 1: "[1-9][0-9]*"}.get(low)
        if written is None or high is not None:
            raise self.error(
                f"integers have the bounds {own}, allowed are minimum 0 or 1 alone, and ranges of up to "
                f"{_MAX_RANGE} numbers; give both ends of such a range, or leave others out"
            )
        return written

    def _number(self, own: dict[str, Any]) -> str:
        if own.get("minimum", 0) != 0:
            raise self.error(f"numbers have the bounds {own}, allowed is minimum 0; leave others out")
        return NUMBER.removeprefix("-?") if own else NUMBER

    def _free(self, depth: int) -> str:
        """Write any value, objects and arrays in it as deep as given."""
        kinds = [STRING, NUMBER, "true", "false", "null"]
        if depth:
            space, value = self.space, self._free(depth - 1)
            pair = f"{STRING}{space}:{space}{value}"
            kinds += [
                rf"{opens}{space}(?:{each}(?:{space},{space}{each})*{space})?{closes}"
                for opens, each, closes in ((r"\{", pair, r"\}"), (r"\[", value, r"\]"))
            ]
        return _any_of(kinds)


def _any_of(parts: list[str]) -> str:
    return f"(?:{'|'.join(parts)})"


def escape(text: str) -> str:
    """Escape a text for Rust's syntax."""
    return re.sub(r"[\\.+*?()|\[\]{}^$#&\-~]", r"\\\g<0>", text)


def _negative(value: Json) -> Json:
    return -value if is_number(value) else None


def _least(bound: Json, exclusive: Json) -> int | None:
    """Return the least whole number that both lower bounds allow; None: there is none."""
    bounds = [-(-bound // 1)] if is_number(bound) else []
    bounds += [exclusive // 1 + 1] if is_number(exclusive) else []
    return int(max(bounds)) if bounds else None
