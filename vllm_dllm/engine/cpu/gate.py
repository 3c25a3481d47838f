"""Let vLLM choose its V2 runner for our models on a CPU without Triton.

vLLM asks two members of `VllmConfig` whether the V2 runner is used and whether it can be; both refuse where Triton
is missing. Both are wrapped, and the answer changes only for a config that `is_served` accepts. Every other config
gets the original's answer. Written for vLLM 0.32 and 0.33, where the worker asks for Triton instead of the second.
"""

import inspect
import sys
from collections.abc import Callable
from functools import cache, wraps

from vllm import envs
from vllm.config import VllmConfig

from vllm_dllm.errors import UnsupportedVllmError


def is_needed() -> bool:
    """Tell whether this process serves a CPU whose Triton, if any, cannot compile for it."""
    # Imported late: the first use of either resolves the platform, which must not happen when a plugin is loaded.
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    return bool(current_platform.is_cpu() and not HAS_TRITON)


def is_served(config: VllmConfig, architectures: frozenset[str]) -> bool:
    """Tell whether a config is one of our models on a CPU without Triton."""
    model_config = config.model_config
    is_ours = model_config is not None and not architectures.isdisjoint(model_config.architectures or ())
    return is_ours and is_needed()


@cache
def install_gate(architectures: frozenset[str]) -> None:
    """Wrap the two members of `VllmConfig`; once per process and set of architectures.

    Args:
        architectures: the names of our models, as in a checkpoint's `architectures`.

    Raises:
        UnsupportedVllmError: the installed vLLM does not have the members as we know them.
    """
    chosen = inspect.getattr_static(VllmConfig, "use_v2_model_runner", None)
    validate = inspect.getattr_static(VllmConfig, "_validate_v2_model_runner", None)
    has_features = hasattr(VllmConfig, "_get_v2_model_runner_unsupported_features")
    if not (isinstance(chosen, property) and chosen.fget and inspect.isfunction(validate) and has_features):
        raise UnsupportedVllmError(
            "The installed vLLM chooses its model runner in another way than vLLM 0.32 and 0.33; install one of these."
        )
    VllmConfig.use_v2_model_runner = property(_gated_choice(chosen.fget, architectures), doc=chosen.__doc__)
    VllmConfig._validate_v2_model_runner = _gated_validation(validate, architectures)


def _gated_choice(original: Callable[..., bool], architectures: frozenset[str]) -> Callable[..., bool]:
    """Answer yes for our models, unless the user forbids the V2 runner."""

    @wraps(original)
    def use_v2_model_runner(self: VllmConfig) -> bool:
        is_forbidden = envs.VLLM_USE_V2_MODEL_RUNNER is False
        if is_served(self, architectures) and not is_forbidden:
            _lift_worker_check()
            return True
        return original(self)

    return use_v2_model_runner


def _lift_worker_check() -> None:
    """Tell vLLM 0.33's worker module that Triton is there.

    Its constructor reads `use_v2_model_runner` and, where the answer is yes, refuses without Triton; nothing else in
    the module looks at the flag. In a worker process no hook of ours runs between the module's import and that line
    but the property itself. A stock model's answer is no, so that the flag is not asked for.
    """
    worker_module = sys.modules.get("vllm.v1.worker.gpu_worker")
    if worker_module is not None and "HAS_TRITON" in vars(worker_module):
        vars(worker_module)["HAS_TRITON"] = True


def _gated_validation(original: Callable[..., None], architectures: frozenset[str]) -> Callable[..., None]:
    """For our models, check everything the original does except that Triton is there."""

    @wraps(original)
    def validate_v2_model_runner(self: VllmConfig) -> None:
        if not is_served(self, architectures):
            original(self)
            return
        unsupported = self._get_v2_model_runner_unsupported_features()
        if unsupported:
            raise ValueError(f"Model Runner V2 does not yet support: {', '.join(unsupported)}")

    return validate_v2_model_runner
