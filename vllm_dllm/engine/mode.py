"""`additional_config.dllm.mode`: a checkpoint that is an autoregressive model, too, is left to vLLM as one."""

import reprlib
from collections.abc import Mapping
from typing import Any

from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger

from vllm_dllm.additional_config import mode_in, settings_in
from vllm_dllm.config import InvalidOptionError
from vllm_dllm.errors import ConfigError
from vllm_dllm.models.interface import FAMILIES, family_of

logger = init_logger("vllm.dllm")


def take_mode(args: EngineArgs, model_config: ModelConfig) -> dict[str, Any] | None:
    """Return fields of config.json by which vLLM serves a model of ours autoregressively; None: it is not asked to.

    Raises: ConfigError for a mode that is unknown, or that the family has not, and for settings of diffusion that would
        have no effect.
    """
    family = family_of(model_config.architectures)
    if family is None or mode_in(args.additional_config) == "diffusion":
        return None
    if family.causal_class is None:
        able = ", ".join(family.architecture for family in FAMILIES if family.causal_class)
        raise InvalidOptionError(
            f"additional_config.dllm.mode is 'ar', but {family.architecture} is trained for diffusion alone; allowed "
            f"is 'diffusion', and 'ar' for {able}; leave mode out",
            "additional_config.dllm.mode",
            "ar",
        )
    settings = settings_in(args.additional_config)
    if settings:
        names = ", ".join(settings) if isinstance(settings, Mapping) else reprlib.repr(settings)
        raise ConfigError(
            f"additional_config.dllm has {names} beside mode 'ar', which decodes without diffusion; allowed is mode "
            "alone; remove the others or the mode"
        )
    if callable(args.hf_overrides):
        raise ConfigError(
            "hf_overrides is a function, but additional_config.dllm.mode 'ar' adds a field to them; allowed are "
            "objects; give one"
        )
    name = family.causal_class.partition(":")[2]
    logger.info("Mode ar: vLLM serves %s autoregressively, as %s", family.architecture, name)
    return {"architectures": [name]}
