"""Who serves an architecture that vLLM, or another plugin, has a model for, too: ours or theirs, never both.

Ours take an architecture over when they are registered, and an engine's start says so. What was registered behind us
is not touched: an engine that would get one's model and the other's configuration is refused.
"""

from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from vllm_dllm.errors import ConfigError
from vllm_dllm.models.interface import ModelFamily

logger = init_logger("vllm.dllm")

WORKERS = ("vllm_dllm.engine.cpu.worker.DllmCpuWorker", "vllm_dllm.engine.gpu_worker.DllmWorker")
"""Of a CPU, and of a GPU."""

_ONE = "allowed is one of the two; VLLM_PLUGINS names the plugins that are loaded, and 'dllm' is vllm-dllm"

_replaced: dict[str, str] = {}
"""Models in whose place ours were put, by architecture."""


def take_over(family: ModelFamily, hook: type[VerifyAndUpdateConfig]) -> None:
    """Register a family's model and the hook of its configuration, in the place of any others."""
    registered = _registered(family.architecture)
    if registered not in (None, _ours(family)):
        _replaced[family.architecture] = str(registered)
    ModelRegistry.register_model(family.architecture, family.model_class)
    MODELS_CONFIG_MAP[family.architecture] = hook


def check_model(family: ModelFamily) -> None:
    """Check, where our hook is called, that our model is what vLLM will make. Raises: ConfigError."""
    registered = _registered(family.architecture)
    if registered != _ours(family):
        raise ConfigError(
            f"{family.architecture} was registered again, as {registered}, behind vllm-dllm, whose model it was; {_ONE}"
        )


def check_hook(vllm_config: VllmConfig) -> None:
    """Check, where our model is made, that our hook made its configuration. Raises: ConfigError."""
    if vllm_config.parallel_config.worker_cls not in WORKERS:
        (architecture, *_) = vllm_config.model_config.architectures
        hook: Any = MODELS_CONFIG_MAP.get(architecture)
        raise ConfigError(
            f"the configuration of {architecture} was made by {hook and _name(hook)}, and not by vllm-dllm, whose "
            f"model it has; {_ONE}"
        )


def tell(family: ModelFamily, vllm_config: VllmConfig) -> None:
    """Log what is served here in another's place, if anything is."""
    if family.architecture in _replaced:
        logger.info(
            "%s is served by vllm-dllm, in the place of %s, which serves it where 'dllm' is not among VLLM_PLUGINS",
            family.architecture,
            _replaced[family.architecture],
        )
    if vllm_config.diffusion_config is not None:
        logger.info("diffusion_config was set to %s by vLLM; vllm-dllm sets its own", vllm_config.diffusion_config)


def _ours(family: ModelFamily) -> str:
    return family.model_class.replace(":", ".")


def _registered(architecture: str) -> str | None:
    model: Any = ModelRegistry.models.get(architecture)
    if model is None:
        return None
    if hasattr(model, "module_name"):  # imported when it is made
        return f"{model.module_name}.{model.class_name}"
    return _name(model.model_cls)


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
