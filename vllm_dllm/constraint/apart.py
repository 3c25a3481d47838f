"""Which schemas cannot be met together, as far as their types and constants say: branches of `oneOf`."""

from collections.abc import Mapping
from typing import Any

Json = Any
"""A value as parsed from JSON."""


def is_apart(one: Json, other: Json, root: Json) -> bool:
    """Tell whether two schemas cannot be met together, as far as types and constants say."""
    values = [_values(each, root) for each in (one, other)]
    if values[0] is not None and values[1] is not None:
        return not any(value in values[1] for value in values[0])
    kinds = [_kinds(each, root) for each in (one, other)]
    if kinds[0] and kinds[1] and not kinds[0] & kinds[1]:
        return True
    parts = [_resolved(each, root) for each in (one, other)]
    shared = [name for name in parts[0].get("required", []) if name in parts[1].get("required", [])]
    properties = [part.get("properties", {}) for part in parts]
    return any(_is_told(properties[0].get(name), properties[1].get(name), root) for name in shared)


def _is_told(one: Json, other: Json, root: Json) -> bool:
    values = _values(one, root), _values(other, root)
    return values[0] is not None and values[1] is not None and not any(v in values[1] for v in values[0])


def _resolved(schema: Json, root: Json) -> Mapping[str, Any]:
    for _ in range(8):
        ref = schema.get("$ref") if isinstance(schema, Mapping) else None
        if ref is None:
            break
        target = root
        for name in str(ref).split("/")[1:]:
            target = target.get(name, {}) if isinstance(target, Mapping) else {}
        schema = target
    return schema if isinstance(schema, Mapping) else {}


def _values(schema: Json, root: Json) -> list[Any] | None:
    schema = _resolved(schema, root)
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _kinds(schema: Json, root: Json) -> set[str]:
    values = _values(schema, root)
    if values is not None:
        return {_kind(value) for value in values}
    found = _resolved(schema, root).get("type")
    kinds = set(found) if isinstance(found, list) else {found} if found else set()
    return (kinds - {"integer"}) | ({"number"} if "integer" in kinds else set())


def _kind(value: Json) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
