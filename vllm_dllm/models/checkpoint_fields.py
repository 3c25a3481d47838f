"""What the configuration classes share: fields whose values would ask for other arithmetic are refused by name."""

from collections.abc import Mapping
from typing import Any

from vllm_dllm.errors import ConfigError


def refuse_other_arithmetic(fields: Mapping[str, Any], implemented: Mapping[str, tuple[Any, ...]], model: str) -> None:
    """Compare fields of a checkpoint's config.json with what a model class implements.

    Args:
        fields: those given; one that is absent passes.
        implemented: the values that pass, by field.
        model: the model's name, for the message.

    Raises: ConfigError for a field whose value asks for arithmetic that the model class does not implement.
    """
    for name, allowed in implemented.items():
        if name in fields and fields[name] not in allowed:
            raise ConfigError(
                f"{name} in the checkpoint's config.json is {fields[name]!r}; the {model} model implements "
                f"{' or '.join(map(repr, allowed))} only; serve a checkpoint with that value"
            )
