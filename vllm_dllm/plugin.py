"""Entry point of the plugin: tell vLLM of our models and hooks, in every process that loads plugins."""

from vllm_dllm.errors import UnsupportedVllmError
from vllm_dllm.models.interface import FAMILIES, FAMILY_BY_ARCHITECTURE


def register() -> None:
    """Register the model families; safe to call any number of times.

    A vLLM that we do not know keeps serving its own models: the reason is logged and nothing of ours is registered.
    """
    from vllm.logger import init_logger

    from vllm_dllm.engine import compat

    try:
        compat.check_vllm_version()
        _register()
    except UnsupportedVllmError as error:
        init_logger("vllm.dllm").error("vllm-dllm is not active, its models cannot be served: %s", error)


def _register() -> None:
    from transformers import AutoConfig
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from vllm_dllm.engine import compat, config_hook, cpu, request

    compat.before_argument_defaults(config_hook.refuse_explicit_flags)
    compat.replace_diffusion_check(config_hook.is_ours, request.refuse_unsupported)
    compat.after_admission(request.finish_admission)
    cpu.install_gate(frozenset(FAMILY_BY_ARCHITECTURE))
    for family in FAMILIES:
        config_class = compat.load(family.config_class)
        _CONFIG_REGISTRY[family.model_type] = config_class
        AutoConfig.register(family.model_type, config_class, exist_ok=True)
        ModelRegistry.register_model(family.architecture, family.model_class)
        MODELS_CONFIG_MAP[family.architecture] = config_hook.DllmConfigHook
