"""What would end an engine while it starts, told before its processes are: their messages lie deep in the log."""

import ast
import math
import sys
from pathlib import Path

from vllm.config import ModelConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node
from vllm.utils.system_utils import get_mp_context

from vllm_dllm.engine.configs import is_ours
from vllm_dllm.engine.kv_memory import fits_itself, kv_bytes, least_kv_bytes, least_num_pages, page_tokens
from vllm_dllm.errors import ConfigError

GIB = 1 << 30


def check_start(vllm_config: VllmConfig) -> None:
    """Check what the processes of an engine with one of our models need of this one and of the machine.

    Raises: ConfigError.
    """
    if not is_ours(vllm_config.model_config):
        return
    check_num_pages(vllm_config)
    if get_mp_context().get_start_method() == "spawn":
        check_main_guard()
    if current_platform.is_cpu():
        check_kv_memory(vllm_config)
        check_memory(vllm_config)


def check_main_guard() -> None:
    """Refuse a script that would start an engine again in each process that is spawned, since these import it.

    Raises: ConfigError naming the line, when it is code of the main module itself under no `if`.
    """
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    frame = sys._getframe()
    while frame.f_back is not None and not (frame.f_globals is vars(main) and frame.f_code.co_name == "<module>"):
        frame = frame.f_back
    if path is None or frame.f_globals is not vars(main) or not Path(path).is_file():
        return
    line = frame.f_lineno
    tree = ast.parse(Path(path).read_bytes())
    if not any(isinstance(node, ast.If) and node.lineno <= line <= (node.end_lineno or 0) for node in tree.body):
        raise ConfigError(
            f"{path}, line {line} starts an engine whenever the file is imported, and the processes of the engine, "
            "which are spawned, import it; allowed is code behind a guard; put what the script does under "
            '`if __name__ == "__main__":`'
        )


def check_kv_memory(vllm_config: VllmConfig) -> None:
    """Refuse memory for K/V that does not hold one request.

    Raises: ConfigError with what it takes.
    """
    given, least = vllm_config.cache_config.kv_cache_memory_bytes, least_kv_bytes(vllm_config)
    if given is not None and given < least:
        raise ConfigError(
            f"kv_cache_memory_bytes is {given}, but the K/V of one request {_of_length(vllm_config.model_config)} "
            f"take {least}, with the page that vLLM keeps; allowed are this "
            "number and more; raise --kv-cache-memory-bytes or lower --max-model-len"
        )


def _of_length(model_config: ModelConfig) -> str:
    return "of one token" if fits_itself(model_config) else f"of max_model_len {model_config.max_model_len}"


def check_num_pages(vllm_config: VllmConfig) -> None:
    """Refuse a number of pages that does not hold one request.

    Raises: ConfigError with what it takes.
    """
    cache = vllm_config.cache_config
    given, least = cache.num_gpu_blocks_override, least_num_pages(vllm_config)
    if given is not None and given < least:
        raise ConfigError(
            f"num_gpu_blocks_override is {given}, but the K/V of one request {_of_length(vllm_config.model_config)} "
            f"take {least} pages of {page_tokens(vllm_config)} tokens, with the page that vLLM keeps; allowed are this "
            "number and more; leave it out or lower --max-model-len"
        )


def check_memory(vllm_config: VllmConfig) -> None:
    """Refuse to take more memory than a CPU's machine has free, by the figures that vLLM's worker goes by.

    Where memory has several nodes, one of them is enough here: which one a worker is bound to is not known yet.

    Raises: ConfigError with the figures, and with values that fit.
    """
    nodes = [get_memory_node_info(node) for node in get_visible_memory_node()]
    if not nodes:
        return
    node = max(nodes, key=lambda node: node.available_memory)
    total, free = node.total_memory, node.available_memory
    cache = vllm_config.cache_config
    share, num_bytes = cache.gpu_memory_utilization, cache.kv_cache_memory_bytes
    wanted = math.ceil(total * share) if num_bytes is None else num_bytes
    if wanted <= free:
        return
    asked = (
        f"gpu_memory_utilization is {share}, on a CPU too, which asks for {wanted / GIB:.1f} GiB"
        if num_bytes is None
        else f"kv_cache_memory_bytes is {num_bytes}, which is {wanted / GIB:.1f} GiB"
    )
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    for_kv = min(kv_bytes(model, scheduler.max_num_seqs, model.max_model_len), free // 2)
    raise ConfigError(
        f"{asked}, but {free / GIB:.1f} of the {total / GIB:.1f} GiB of memory are free; allowed is what is free; "
        f"start with --kv-cache-memory-bytes {for_kv}, which is taken for K/V beside the weights, or with "
        f"--gpu-memory-utilization {math.floor(80 * free / total) / 100}, for both together"
    )
