"""Entry point of the plugin: tell vLLM of our models and hooks, in every process that loads plugins."""

import functools
import importlib.metadata
import logging
import os
from pkgutil import resolve_name

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from vllm_dllm.errors import UnsupportedVllmError
from vllm_dllm.models.interface import FAMILIES, config_classes

SUPPORTED_VLLM = SpecifierSet(">=0.32,<0.34")


def register() -> None:
    """Register the model families; safe to call any number of times.

    All or nothing: what we rely on in vLLM is checked before anything of it is changed. A vLLM that we do not know
    keeps serving its own models: the reason is logged and nothing of ours is registered.
    """
    try:
        check_vllm_version()
        _check_names()
        _import_all()
    except (UnsupportedVllmError, ImportError, AttributeError) as error:
        # The two latter: a name that one of our modules imports is gone.
        logging.getLogger("vllm.dllm").error("vllm-dllm is not active, its models cannot be served: %s", error)
        return
    _register()


def check_vllm_version() -> None:
    """Raise: UnsupportedVllmError when the installed vLLM is not one this plugin was written for."""
    version = Version(importlib.metadata.version("vllm"))
    if not SUPPORTED_VLLM.contains(Version(version.base_version)):
        raise UnsupportedVllmError(
            f"vLLM {version} is installed, vllm-dllm supports {SUPPORTED_VLLM}; install a supported vLLM or another "
            "version of vllm-dllm"
        )


@functools.cache
def _check_names() -> None:
    from vllm_dllm.engine.contracts import CONTRACTS, check_contracts
    from vllm_dllm.engine.patches import PATCHES

    check_contracts((*(patch.contract for patch in PATCHES.values()), *CONTRACTS), str(SUPPORTED_VLLM))


def _import_all() -> None:
    """Import all that `_register` needs, so that it cannot end half way."""
    theirs = ("model_executor.models", "model_executor.models.config", "transformers_utils.config")
    ours = ["compat", "config_hook", "front_end", "mode", "natives", "spiffy_arguments"]
    ours += ["start_checks", "start_errors", "stat_logger"]
    for module in (*(f"vllm.{name}" for name in theirs), *(f"vllm_dllm.engine.{name}" for name in ours)):
        importlib.import_module(module)
    for family in FAMILIES:
        resolve_name(family.config_class)


def _register() -> None:
    from transformers import AutoConfig
    from vllm import envs
    from vllm.model_executor.models import ModelRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from vllm_dllm.engine import (
        compat,
        config_hook,
        configs,
        front_end,
        mode,
        natives,
        refusals,
        request,
        spiffy_arguments,
        start_checks,
        start_errors,
        stat_logger,
    )
    from vllm_dllm.engine.worker_check import VARIABLE
    from vllm_dllm.spiffy_config import METHOD, read_speculative_config

    compat.explain_start_errors(start_errors.explain)
    compat.before_config_class(config_hook.read_config)
    compat.after_model_config(mode.take_mode, config_hook.check_flags)
    compat.extend_speculative_arguments(read_speculative_config, METHOD)
    compat.before_speculative_config(spiffy_arguments.take_spiffy)
    compat.replace_diffusion_check(configs.is_ours, refusals.refuse_unsupported)
    compat.around_tokenization(request.prompt_that_fits)
    compat.before_engine_processes(start_checks.check_start)
    compat.after_front_end(front_end.take_over)
    stat_logger.add_to_vllm()
    if VARIABLE in os.environ:  # vLLM warns of variables with its prefix that it does not know
        envs.environment_variables.setdefault(VARIABLE, lambda: os.environ.get(VARIABLE))
    for family in FAMILIES:
        natives.take_over(family, config_hook.DllmConfigHook)
        if family.causal_class:
            ModelRegistry.register_model(family.causal_class.partition(":")[2], family.causal_class)
    for model_type, name in config_classes().items():
        config_class = resolve_name(name)
        _CONFIG_REGISTRY[model_type] = config_class
        AutoConfig.register(model_type, config_class, exist_ok=True)
