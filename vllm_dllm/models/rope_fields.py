"""Rotary positions as a checkpoint's config.json asks for them: read, checked, and said in vLLM's words.

Older files say `rope_theta` and `rope_scaling`, newer ones of transformers `rope_parameters`, which holds both; the
type is `type` or `rope_type`. All of them are read, and may not disagree.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_dllm.errors import ConfigError
from vllm_dllm.models.checkpoint_fields import Size, validated

Theta = Annotated[float, Field(gt=1.0, allow_inf_nan=False, description="finite numbers above 1")]
_Factor = Annotated[float, Field(ge=1.0, le=1e6, description="numbers from 1 to 1000000")]
# Of YaRN; beyond, a table's numbers would leave float32.
_Scale = Annotated[float, Field(gt=0.0, le=1e6, description="numbers above 0 and up to 1000000")]
_Part = Annotated[float, Field(gt=0.0, le=1.0, description="numbers above 0 and up to 1")]

ROPE_NAMES = ("rope_theta", "rope_scaling", "rope_parameters")
"""The fields of config.json that are read here."""

_MAX_POSITIONS = 1 << 24
"""A table counts positions in float32, whose whole numbers end here."""

_OBJECTS = ("rope_scaling", "rope_parameters")


class _Rope(BaseModel):
    """Fields of the object, for every type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    rope_type: Annotated[
        Literal["default", "linear", "dynamic", "yarn"],
        Field(description="'default', 'linear', 'dynamic' and 'yarn'"),
    ] = "default"
    rope_theta: Theta
    partial_rotary_factor: _Part | None = None
    factor: _Factor | None = None
    original_max_position_embeddings: Size | None = None
    beta_fast: _Scale | None = None
    beta_slow: _Scale | None = None
    mscale: _Scale | None = None
    mscale_all_dim: _Scale | None = None
    attention_factor: _Scale | None = None
    truncate: Annotated[bool, Field(description="true and false")] | None = None


_TAKES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "attention_factor", "truncate"),
    ),
}
"""What each type reads besides `rope_theta`."""


def read_rope(given: Mapping[str, Any], *, max_positions: int, head_dim: int, rotary_dim: int) -> dict[str, Any]:
    """Read the fields of `ROPE_NAMES`.

    Args:
        given: fields of config.json.
        max_positions: `max_position_embeddings` of the checkpoint.
        head_dim: the size of a head.
        rotary_dim: how many of its elements are rotated.

    Returns: what vLLM and transformers call `rope_parameters`, with `rope_type` and `rope_theta` always, and
        `partial_rotary_factor` where it is not 1.

    Raises: ConfigError for two values of one field, another type, or numbers that cannot work.
    """
    rope = validated(_Rope, _merged(given), "rope_parameters.").model_dump(exclude_none=True)
    factor = rotary_dim / head_dim
    if (said := rope.pop("partial_rotary_factor", factor)) != factor:
        raise ConfigError(
            f"rope_parameters.partial_rotary_factor in the checkpoint's config.json is {said}, but {rotary_dim} of the "
            f"{head_dim} elements of a head are rotated; allowed is {factor:g}; correct it there or remove it"
        )
    kind = rope["rope_type"]
    for name in rope:
        if name not in ("rope_type", "rope_theta", *_TAKES[kind]):
            raise ConfigError(
                f"rope_parameters.{name} in the checkpoint's config.json is {rope[name]!r}, but rope_type {kind!r} "
                f"does not use it; allowed are {', '.join(('rope_theta', *_TAKES[kind]))}; remove it or set rope_type"
            )
    if "factor" not in rope and kind != "default":
        raise ConfigError(
            f"rope_parameters.factor is missing in the checkpoint's config.json, but rope_type is {kind!r}; allowed "
            "are numbers from 1 to 1000000; add it there or with --hf-overrides"
        )
    if kind == "dynamic" and rotary_dim < 4:
        raise ConfigError(
            f"rope_type in the checkpoint's config.json is 'dynamic', but {rotary_dim} elements of a head are rotated; "
            "allowed are 4 and more; set another type"
        )
    if kind == "yarn":
        _check_yarn(rope, max_positions)
    if (reach := num_positions(rope, max_positions)) > _MAX_POSITIONS:
        raise ConfigError(
            f"rope_parameters.factor in the checkpoint's config.json is {rope.get('factor', 1)}, which times "
            "max_position_embeddings (max_sequence_length, or original_max_position_embeddings of rope_parameters) is "
            f"{reach}; allowed are up to {_MAX_POSITIONS} positions; lower one of them there or with --hf-overrides"
        )
    return rope if factor == 1 else rope | {"partial_rotary_factor": factor}


def override_rope(given: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Put overrides of `ROPE_NAMES` in the place of what they replace: the base, the rest, or both.

    Args:
        given: fields of config.json.
        overrides: all overrides so far; two that disagree are both kept, for `read_rope` to refuse.

    Returns: the fields, changed.
    """
    bases = [given.get("rope_theta"), *(_theta_in(given.get(name)) for name in _OBJECTS)]
    kept: dict[str, Any] = {name: value for name, value in given.items() if name not in ROPE_NAMES}
    if overrides.keys().isdisjoint(_OBJECTS):
        kept |= {name: _without_theta(given[name]) for name in _OBJECTS if name in given}
    if "rope_theta" not in overrides and not any(_theta_in(overrides.get(name)) for name in _OBJECTS):
        kept["rope_theta"] = next((base for base in bases if base is not None), None)
    return kept | dict(overrides)


def _theta_in(value: Any) -> Any:
    return value.get("rope_theta") if isinstance(value, Mapping) else None


def _without_theta(value: Any) -> Any:
    return {key: item for key, item in value.items() if key != "rope_theta"} if isinstance(value, Mapping) else value


def _merged(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the one object that the fields of `ROPE_NAMES` say."""
    merged: dict[str, Any] = {}
    for name in _OBJECTS:
        value = given.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(
                f"{name} in the checkpoint's config.json is {value!r}, allowed are null and objects; correct it there "
                "or with --hf-overrides"
            )
        for key, item in (value or {}).items():
            _add(merged, "rope_type" if key == "type" else key, item, f"{name}.{key}")
    _add(merged, "rope_theta", given.get("rope_theta"), "rope_theta")
    return merged


def _add(merged: dict[str, Any], name: str, value: Any, where: str) -> None:
    if value is None:
        return
    if name in merged and merged[name] != value:
        raise ConfigError(
            f"{where} in the checkpoint's config.json is {value!r}, but it says {merged[name]!r} for {name} too; "
            "allowed is one value; remove one of them"
        )
    merged[name] = value


def _check_yarn(rope: dict[str, Any], max_positions: int) -> None:
    """Complete YaRN's fields, and check that its positions reach as far as the checkpoint says."""
    original = rope.setdefault("original_max_position_embeddings", max_positions)
    if ("mscale" in rope) != ("mscale_all_dim" in rope):
        given = "mscale" if "mscale" in rope else "mscale_all_dim"
        raise ConfigError(
            f"rope_parameters.{given} in the checkpoint's config.json is {rope[given]!r}, but YaRN reads mscale and "
            "mscale_all_dim together; give both or neither"
        )
    if num_positions(rope, max_positions) < max_positions:
        raise ConfigError(
            f"max_position_embeddings is {max_positions}, but rope_parameters give factor {rope['factor']} times "
            f"original_max_position_embeddings {original}; allowed are up to {num_positions(rope, max_positions)}; "
            "correct one of them in the checkpoint's config.json or with --hf-overrides"
        )


def num_positions(rope: Mapping[str, Any], max_positions: int) -> int:
    """Return how many positions a table of `rope` has: no row may be longer."""
    base = rope.get("original_max_position_embeddings", max_positions)
    return math.floor(base * rope.get("factor", 1.0))


def table_arguments(rope: Mapping[str, Any], max_positions: int) -> tuple[int, dict[str, Any]]:
    """Return `max_position` and `rope_parameters` of vLLM's `get_rope`.

    vLLM's tables of type `dynamic` are those of one length. Here it is the longest, `factor` times `max_positions`:
    then a request's tokens depend neither on its length nor on --max-model-len. transformers, which sees one sequence
    at a time, takes the same base for one of that length.
    """
    if rope["rope_type"] != "dynamic":
        return max_positions, dict(rope)
    return num_positions(rope, max_positions), {**rope, "max_trained_positions": max_positions}
