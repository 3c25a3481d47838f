"""`additional_config`, which plugins share: the field of ours, and fields that were meant to be. Imports no vLLM."""

import reprlib
from collections.abc import Mapping
from typing import Literal, get_args

from vllm_dllm.config import DllmConfig, InvalidOptionError
from vllm_dllm.errors import did_you_mean, nearest

FIELD = "dllm"

Mode = Literal["diffusion", "ar", "self_speculation"]
MODES: tuple[Mode, ...] = get_args(Mode)
"""How a checkpoint decodes that can do both: `ar` as an autoregressive model of vLLM's own, without us;
`self_speculation` gives autoregression's tokens, which diffusion drafts."""


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
        meant = f"{FIELD}.{key}" if key in DllmConfig.names() else _meant(str(key))
        if meant and key != FIELD:
            name = f"additional_config.{key}"
            raise InvalidOptionError(
                f"{name} is not known; settings of diffusion models are allowed in additional_config.{FIELD}; did you "
                f"mean 'additional_config.{meant}'?",
                name,
                value,
            )
    return additional.get(FIELD, {})


def mode_in(additional: object) -> Mode:
    """Return the mode that `additional_config` asks for.

    Raises: InvalidOptionError for another one.
    """
    settings = additional.get(FIELD) if isinstance(additional, Mapping) else None
    mode = settings.get("mode", "diffusion") if isinstance(settings, Mapping) else "diffusion"
    for known in MODES:
        if mode == known:
            return known
    name = f"additional_config.{FIELD}.mode"
    raise InvalidOptionError(
        f"{name} is {mode!r}; allowed are {', '.join(map(repr, MODES[:-1]))} and {MODES[-1]!r}; "
        f"{did_you_mean(mode, MODES, 'give one of these or leave it out')}",
        name,
        mode,
    )


def _meant(key: str) -> str | None:
    """Return our field for a key that looks like it, as `dlm`, `DLLM`, `vllm_dllm` or `dllm.policy`."""
    return FIELD if FIELD in key.lower() else nearest(key, [FIELD])
