"""Whether a process serves a CPU without Triton, for which the V2 runner's small kernels have other code."""


def is_needed() -> bool:
    """Tell whether this process serves a CPU whose Triton, if any, cannot compile for it."""
    # Imported late: the first use of either resolves the platform, which must not happen when a plugin is loaded.
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    return bool(current_platform.is_cpu() and not HAS_TRITON)
