"""The model families: what their checkpoints are called, which classes serve them, how they decode by default."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """Facts of a family of checkpoints.

    Attributes:
        architecture: the name in a checkpoint's `architectures`.
        model_type: the name in a checkpoint's `model_type`.
        model_class: "module:Class" of the vLLM model.
        config_class: "module:Class" of the configuration.
        generation_defaults: published decoding defaults that a checkpoint's generation config may override.
    """

    architecture: str
    model_type: str
    model_class: str
    config_class: str
    generation_defaults: Mapping[str, Any]


FAMILIES = (
    ModelFamily(
        architecture="LLaDAModelLM",
        model_type="llada",
        model_class="vllm_dllm.models.llada:LLaDAModelLM",
        config_class="vllm_dllm.models.llada_config:LLaDAConfig",
        generation_defaults={"temperature": 0.0},
    ),
)

FAMILY_BY_ARCHITECTURE = {family.architecture: family for family in FAMILIES}


def family_of(architectures: list[str] | None) -> ModelFamily | None:
    """Return the family that serves a checkpoint, or None when it is not ours."""
    for architecture in architectures or ():
        if architecture in FAMILY_BY_ARCHITECTURE:
            return FAMILY_BY_ARCHITECTURE[architecture]
    return None
