"""The CPU backend: vLLM's stock V2 model runner without Triton, for our models alone.

`activate()`, before our worker makes the runner, turns the runner's small kernels into numpy code; `worker`
is our worker of a CPU, `engine.configs` lets our models have the V2 runner.

Nothing changes for other models. Without Triton vLLM gives them the V1 runner, which shares no kernel with V2, and a
V2 kernel without Triton is a plain function that cannot be launched: nobody can depend on one that we replace.
"""

import importlib
from functools import cache

from vllm.logger import init_logger

from vllm_dllm.engine.cpu.binding import REPLACEMENTS, bind, kernel_arg_names
from vllm_dllm.engine.cpu.gate import is_needed

__all__ = ["activate", "is_needed"]

logger = init_logger(f"vllm.{__name__}")  # vLLM prints the messages of loggers below its own name


@cache
def activate() -> None:
    """Replace the V2 runner's Triton kernels in this process; the first call does it.

    Raises:
        RuntimeError: a kernel of the installed vLLM lacks an argument that its replacement needs.
    """
    if not is_needed():
        return
    # Imported late: where `vllm.v1.worker.cpu.shm` is to patch torch, it must be imported before the runner.
    from vllm.triton_utils.dispatcher import register_kernels
    from vllm.utils.math_utils import next_power_of_2

    from vllm_dllm.engine.patches import add_to_module

    launches = {}
    for name, impl in REPLACEMENTS.items():
        module_name, kernel_name = name.rsplit(".", 1)
        kernel = getattr(importlib.import_module(module_name), kernel_name)
        launches[name] = bind(name, kernel_arg_names(kernel), impl)
    register_kernels(launches)
    # Host code around the kernels sizes their tiles with it; vLLM's stand-in for the triton module lacks it.
    add_to_module("triton_utils.triton", "next_power_of_2", next_power_of_2)
    logger.info("No Triton for this CPU: %d kernels of the V2 runner run as numpy code.", len(launches))
