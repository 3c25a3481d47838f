"""`additional_config.dllm.mode`: a checkpoint that is an autoregressive model, too, can be served as one.

With `ar` it is left to vLLM; with `self_speculation` it is served here (`engine.window_scheduler`).
"""

from collections.abc import Mapping
from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger

from vllm_dllm.additional_config import mode_in, settings_in
from vllm_dllm.config import DllmConfig, InvalidOptionError
from vllm_dllm.errors import ConfigError
from vllm_dllm.models.interface import FAMILIES, family_of

logger = init_logger("vllm.dllm")

SELF_SPECULATION_SETTINGS = ("block_length", "attention")
"""Those that decide something beside mode `self_speculation`."""


def take_mode(args: EngineArgs, model_config: ModelConfig) -> dict[str, Any] | None:
    """Return fields of config.json by which vLLM serves a model of ours autoregressively; None: it is not asked to.

    Raises: ConfigError for a mode that is unknown, or that the family has not, and for settings of diffusion that would
        have no effect.
    """
    family, mode = family_of(model_config.architectures), mode_in(args.additional_config)
    if family is None or mode == "diffusion":
        return None
    if family.causal_class is None:
        able = ", ".join(family.architecture for family in FAMILIES if family.causal_class)
        raise InvalidOptionError(
            f"additional_config.dllm.mode is {mode!r}, but {family.architecture} is trained for diffusion alone; "
            f"allowed is 'diffusion', and {mode!r} for {able}; leave mode out",
            "additional_config.dllm.mode",
            mode,
        )
    settings = settings_in(args.additional_config)
    others = [name for name in settings if name != "mode"] if isinstance(settings, Mapping) else []
    if mode == "self_speculation":
        _check_settings([name for name in others if name not in SELF_SPECULATION_SETTINGS])
        return None
    if others:
        raise ConfigError(
            f"additional_config.dllm has {', '.join(others)} beside mode 'ar', which decodes without diffusion; "
            "allowed is mode alone; remove the others or the mode"
        )
    if callable(args.hf_overrides):
        raise ConfigError(
            "hf_overrides is a function, but additional_config.dllm.mode 'ar' adds a field to them; allowed are "
            "objects; give one"
        )
    name = family.causal_class.partition(":")[2]
    logger.info("Mode ar: vLLM serves %s autoregressively, as %s", family.architecture, name)
    return {"architectures": [name]}


def _check_settings(others: list[str]) -> None:
    """Check that nothing is set that would have no effect with self-speculation, names of settings or no names."""
    known = [name for name in others if name in DllmConfig.names()]
    if known:
        raise ConfigError(
            f"additional_config.dllm has {', '.join(known)} beside mode 'self_speculation', which decodes "
            f"autoregressively what one forward drafts; allowed are {' and '.join(SELF_SPECULATION_SETTINGS)}; remove "
            "the others or the mode"
        )


def check_self_speculation(config: VllmConfig, settings: DllmConfig) -> None:
    """Check that nothing is asked for that self-speculation cannot do. Raises: ConfigError."""
    if settings.mode != "self_speculation":
        return
    mode = "additional_config.dllm.mode is 'self_speculation'"
    if config.scheduler_config.async_scheduling:
        raise ConfigError(
            f"async_scheduling is on, but {mode}, where the host must know how many drafts of a step were accepted "
            "before it schedules the next one; allowed is off; remove --async-scheduling"
        )
    if config.lora_config:
        raise ConfigError(
            f"enable_lora is on, but {mode}, where drafts take the checkpoint's own adapter; adapters of requests are "
            "allowed in the modes 'diffusion' and 'ar'; remove --enable-lora or the mode"
        )
