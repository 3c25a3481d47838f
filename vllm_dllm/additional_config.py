"""`additional_config`, which plugins share: the field of ours, and fields that were meant to be. Imports no vLLM."""

import reprlib
from collections.abc import Mapping

from vllm_dllm.config import DllmConfig, InvalidOptionError
from vllm_dllm.errors import nearest

FIELD = "dllm"


def settings_in(additional: object) -> object:
    """Return what `additional_config` holds for us, an empty object where that is nothing.

    Fields of other plugins are left alone. One that looks like a typo of ours, or is a setting beside ours instead of
    in it, is refused: it would have no effect.

    Raises: InvalidOptionError.
    """
    if not isinstance(additional, Mapping):
        raise InvalidOptionError(
            f"additional_config is {reprlib.repr(additional)}, allowed are objects; give one as {{'{FIELD}': {{}}}}",
            "additional_config",
            additional,
        )
    for key, value in additional.items():
        meant = f"{FIELD}.{key}" if key in DllmConfig.model_fields else _meant(str(key))
        if meant and key != FIELD:
            name = f"additional_config.{key}"
            raise InvalidOptionError(
                f"{name} is not known; settings of diffusion models are allowed in additional_config.{FIELD}; did you "
                f"mean 'additional_config.{meant}'?",
                name,
                value,
            )
    return additional.get(FIELD, {})


def _meant(key: str) -> str | None:
    """Return our field for a key that looks like it, as `dlm`, `DLLM`, `vllm_dllm` or `dllm.policy`."""
    return FIELD if FIELD in key.lower() else nearest(key, [FIELD])
