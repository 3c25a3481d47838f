"""Changes of a config.json that ask for other rotations, and what a change is."""

from dataclasses import dataclass
from typing import Any

ABSENT = object()
"""The value of a field that is taken out."""

ROTATION = ("rope_scaling", "rope_parameters")
"""The two names of the object of rotation."""

NOT_SIZES = (0, -1, True, "8", 2.5, [4])
NOT_POSITIVE = (0, -1e-6, True, "0.1", float("inf"), float("nan"))


@dataclass(frozen=True)
class Change:
    """One change.

    Attributes:
        group: changes of one group touch the same thing, so that only one of them is made.
        fields: the new values.
        names: of which a refusal must have one; empty where the change is to be served.
        only: `file` or `overrides`, where the two differ.
    """

    group: str
    fields: dict[str, Any]
    names: tuple[str, ...] = ()
    only: str | None = None


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def _served(part: float) -> list[dict[str, Any]]:
    yarn = YARN
    return [
        {"type": "default"},
        *({key: "linear", "factor": factor} for key in ("type", "rope_type") for factor in (1, 2, 4.0, 2.5)),
        *({key: "dynamic", "factor": factor} for key in ("type", "rope_type") for factor in (1, 2, 4.0, 2.7)),
        yarn,
        {"type": "yarn", "factor": 3},
        yarn | {"beta_fast": 4, "beta_slow": 0.5},
        yarn | {"truncate": False},
        yarn | {"attention_factor": 1.7},
        yarn | {"mscale": 0.7, "mscale_all_dim": 1.3},
        yarn | {"factor": 8.5, "rope_theta": None, "partial_rotary_factor": part},
        {"rope_type": "linear", "type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    ]


def _refused(part: float) -> list[tuple[dict[str, Any], str]]:
    """Return what is refused of the object, and the field that is named."""
    yarn = YARN
    return [
        *(
            ({"rope_type": kind, "factor": 4.0}, "rope_type")
            for kind in ("llama3", "longrope", "ntk", "su", "mrope", 1)
        ),
        *(({"type": kind}, "factor") for kind in ("linear", "dynamic", "yarn")),
        *(
            ({"type": "linear", "factor": value}, "factor")
            for value in (0.5, 0, -2, "4", True, [2.0], 1e300, float("inf"))
        ),
        ({"factor": 4.0}, "factor"),
        ({"rope_type": "linear", "type": "dynamic", "factor": 2.0}, "type"),
        ({"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}, "low_freq_factor"),
        ({"rope_type": "linear", "factor": 2.0, "truncate": True}, "truncate"),
        ({"rope_type": "dynamic", "alpha": 1000.0}, "alpha"),
        ({"rope_type": "default", "mrope_section": [1, 1, 2]}, "mrope_section"),
        ({"rope_type": "default", "partial_rotary_factor": part / 2}, "partial_rotary_factor"),
        ({"full_attention": {"rope_type": "linear", "factor": 2.0}}, "full_attention"),
        (yarn | {"factor": 2.0}, "max_position_embeddings"),
        (yarn | {"original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        (yarn | {"mscale": 0.7}, "mscale"),
        ({"rope_type": "dynamic", "factor": 5e5}, "factor"),
        (yarn | {"original_max_position_embeddings": 1 << 40}, "factor"),
        *((yarn | {name: value}, name) for name in ("beta_fast", "mscale_all_dim") for value in (0, 1e300)),
        (yarn | {"attention_factor": -1.0}, "attention_factor"),
    ]


def ropes(positions: str, part: float) -> list[Change]:
    """Return changes of rotation.

    Args:
        positions: the field of the longest row.
        part: of a head that is rotated.
    """
    found = [Change("rope", {name: value}) for name in ROTATION for value in _served(part)]
    found += [Change("rope", {name: value}, (wrong,)) for name in ROTATION for value, wrong in _refused(part)]
    found += [Change("rope", {name: value}, (name,)) for name in ROTATION for value in ("linear", 4.0, ["linear"])]
    found += [Change("rope", {positions: n}) for n in (16, 64)]
    found += [Change("rope", {positions: n}, (positions,)) for n in (*NOT_SIZES, 1 << 40, None, ABSENT)]
    found += [Change("rope", {"rope_theta": value}) for value in (100.0, 500, 1e6)]
    found += [Change("rope", {"rope_theta": v}, ("rope_theta",)) for v in (1.0, 0, -5.0, "1e4", True, float("inf"))]
    found += [Change("rope", {"rope_theta": gone}, ("rope_theta",), only="file") for gone in (None, ABSENT)]
    linear = {"rope_type": "linear", "factor": 2.0}
    found += [
        Change("rope", {"rope_theta": ABSENT, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        Change("rope", {"rope_parameters": linear | {"rope_theta": 500.0}}, ("rope_theta",), only="file"),
        Change("rope", {"rope_parameters": linear | {"rope_theta": 500.0}}, only="overrides"),
        Change("rope", {"rope_theta": 600.0, "rope_parameters": linear | {"rope_theta": 500.0}}, ("rope_theta",)),
        Change("rope", {"rope_scaling": linear, "rope_parameters": linear}),
        Change("rope", {"rope_scaling": linear, "rope_parameters": linear | {"factor": 3.0}}, ("factor",)),
    ]
    return found


def query_scales() -> list[Change]:
    """Return changes of Nemotron's query scale, in the object of rotation that its files have it in."""
    name, again = "llama_4_scaling_beta", {"max_position_embeddings": 48}
    yarn = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 1,
        "mscale_all_dim": 1,
    }
    served = [({**rope, name: beta}) for rope in (yarn, {"type": "linear", "factor": 2.0}) for beta in (0, 0.1, 2)]
    wrong = (-0.1, "0.1", True, 101, float("nan"), [0.1])
    found = [Change("rope", {where: rope | again}) for where in ROTATION for rope in (yarn, *served)]
    found += [Change("rope", {where: {**yarn, name: beta}}, (name,)) for where in ROTATION for beta in wrong]
    two = {"rope_scaling": yarn | {name: 0.1}, "rope_parameters": yarn | {name: 0.2}}
    paradigms = ("bidirectional", "autoregressive", "block_diff", "sbd_block_diff", None)
    return [*found, Change("rope", two, (name,)), *(Change("paradigm", {"dlm_paradigm": p}) for p in paradigms)]
