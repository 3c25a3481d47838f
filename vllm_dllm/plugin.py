"""Entry point of the plugin: tell vLLM of our models and hooks, in every process that loads plugins."""

import importlib.metadata
import logging
from pkgutil import resolve_name

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from vllm_dllm.errors import UnsupportedVllmError
from vllm_dllm.models.interface import FAMILIES, FAMILY_BY_ARCHITECTURE

SUPPORTED_VLLM = SpecifierSet(">=0.32,<0.34")


def register() -> None:
    """Register the model families; safe to call any number of times.

    A vLLM that we do not know keeps serving its own models: the reason is logged and nothing of ours is registered.
    """
    try:
        check_vllm_version()
        _register()
    except (UnsupportedVllmError, ImportError, AttributeError) as error:
        # The two latter: a name of vLLM's that we import or wrap is gone.
        logging.getLogger("vllm.dllm").error("vllm-dllm is not active, its models cannot be served: %s", error)


def check_vllm_version() -> None:
    """Raise: UnsupportedVllmError when the installed vLLM is not one this plugin was written for."""
    version = Version(importlib.metadata.version("vllm"))
    if not SUPPORTED_VLLM.contains(Version(version.base_version)):
        raise UnsupportedVllmError(
            f"vLLM {version} is installed, vllm-dllm supports {SUPPORTED_VLLM}; install a supported vLLM or another "
            "version of vllm-dllm"
        )


def _register() -> None:
    from transformers import AutoConfig
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from vllm_dllm.engine import (
        compat,
        config_hook,
        cpu,
        parameter_types,
        refusals,
        request,
        serving,
        spiffy_arguments,
        start_checks,
        start_errors,
        stat_logger,
    )
    from vllm_dllm.engine.generation_defaults import family_defaults, read_generation_config
    from vllm_dllm.engine.step_sizes import ASYNC_SCHEDULER, SCHEDULER
    from vllm_dllm.spiffy_config import METHOD, read_speculative_config

    cpu.install_gate(frozenset(FAMILY_BY_ARCHITECTURE))
    compat.around_argument_defaults(config_hook.refuse_explicit_flags, config_hook.clear_flags)
    compat.extend_speculative_arguments(read_speculative_config, METHOD)
    compat.before_speculative_config(spiffy_arguments.take_spiffy)
    compat.replace_diffusion_check(config_hook.is_ours, refusals.refuse_unsupported)
    compat.around_admission(parameter_types.check_types, request.finish_admission)
    compat.around_tokenization(request.prompt_that_fits)
    compat.explain_start_errors(start_errors.explain)
    compat.before_engine_processes(start_checks.check_start)
    compat.choose_scheduler({SCHEDULER, ASYNC_SCHEDULER})
    compat.describe_config(config_hook.is_ours, spiffy_arguments.speculation_of)
    compat.around_generation_config(read_generation_config)
    compat.add_sampling_defaults(family_defaults)
    compat.before_serving(config_hook.is_ours, serving.install)
    stat_logger.add_to_vllm()
    for family in FAMILIES:
        config_class = resolve_name(family.config_class)
        _CONFIG_REGISTRY[family.model_type] = config_class
        AutoConfig.register(family.model_type, config_class, exist_ok=True)
        ModelRegistry.register_model(family.architecture, family.model_class)
        MODELS_CONFIG_MAP[family.architecture] = config_hook.DllmConfigHook
