"""Which kernel is replaced by what, and how a launch finds its arguments: by name.

A vLLM version may add, drop or move kernel arguments. What we do not use may change freely; what we use must exist,
which is checked once, at activation.
"""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from vllm_dllm.engine.cpu import kernels
from vllm_dllm.errors import INSTALL_SUPPORTED, UnsupportedVllmError

Kernel = Callable[..., Any]

_RUNNER = "vllm.v1.worker.gpu"

REPLACEMENTS: Mapping[str, Callable[..., None]] = MappingProxyType(
    {
        f"{_RUNNER}.buffer_utils._apply_write_kernel": kernels.apply_write,
        f"{_RUNNER}.input_batch._expand_idx_mapping_kernel": kernels.expand_idx_mapping,
        f"{_RUNNER}.input_batch._prepare_prefill_inputs_kernel": kernels.prepare_prefill_inputs,
        f"{_RUNNER}.input_batch._prepare_pos_seq_lens_kernel": kernels.prepare_pos_seq_lens,
        f"{_RUNNER}.input_batch._combine_sampled_and_draft_tokens_kernel": kernels.combine_sampled_and_draft_tokens,
        f"{_RUNNER}.input_batch._post_update_kernel": kernels.post_update,
    }
)
"""Full name of each kernel the V2 runner launches for our models (vLLM 0.32, 0.33) and its replacement."""


def kernel_arg_names(kernel: Kernel) -> tuple[str, ...]:
    """Return a kernel's argument names; without Triton it is the plain function under the decorator."""
    names = getattr(kernel, "arg_names", None) or inspect.signature(kernel).parameters
    return tuple(names)


def bind(name: str, arg_names: tuple[str, ...], impl: Callable[..., None]) -> Kernel:
    """Make a function that takes a kernel's launch arguments and calls `impl` with those it names.

    Args:
        name: the kernel's full name, for messages.
        arg_names: the kernel's arguments in launch order.
        impl: the replacement; its parameters without default must be arguments of the kernel.

    Raises:
        UnsupportedVllmError: the kernel lacks an argument that `impl` needs.
    """
    parameters = inspect.signature(impl).parameters.values()
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in arg_names]
    if missing:
        raise UnsupportedVllmError(
            f"{name} of the installed vLLM has no argument {', '.join(missing)}; it has {', '.join(arg_names)}; "
            f"{INSTALL_SUPPORTED}"
        )
    wanted = frozenset(p.name for p in parameters)

    def launch(*args: Any, **kwargs: Any) -> None:
        named = zip(arg_names, args, strict=False)
        impl(**{arg: value for arg, value in (*named, *kwargs.items()) if arg in wanted})

    launch.__name__ = impl.__name__
    return launch
