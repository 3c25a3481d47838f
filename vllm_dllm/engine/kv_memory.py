"""How much memory the K/V of some requests take, for engines that are started for a known workload."""

from vllm.config import ModelConfig, ParallelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

from vllm_dllm.blocks import max_prompt_len
from vllm_dllm.engine.configs import settings_of

logger = init_logger("vllm.dllm")

PAGE_TOKENS = 128
"""Tokens of the largest page that vLLM uses by default, a CPU's."""


def kv_bytes(model_config: ModelConfig, num_seqs: int, max_model_len: int) -> int:
    """Return the memory of the K/V of `num_seqs` requests of `max_model_len` tokens, in whole pages."""
    num_pages = num_seqs * -(-max_model_len // PAGE_TOKENS) + 1  # vLLM keeps one for itself
    return num_pages * _page_bytes(model_config, ParallelConfig(), model_config.dtype.itemsize, PAGE_TOKENS)


def least_kv_bytes(vllm_config: VllmConfig) -> int:
    """Return the memory below which no engine starts: that of the pages of `least_num_pages`, in each rank."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    itemsize = kv_cache_dtype_str_to_dtype(cache.cache_dtype, model).itemsize
    page_bytes = _page_bytes(model, vllm_config.parallel_config, itemsize, page_tokens(vllm_config))
    return least_num_pages(vllm_config) * page_bytes


def least_num_pages(vllm_config: VllmConfig) -> int:
    """Return the pages of the longest request that must fit, and the one that vLLM keeps for itself.

    That is one of `max_model_len`; the shortest that there is where vLLM lowers `max_model_len` to what fits.
    """
    length = vllm_config.model_config.max_model_len
    if fits_itself(vllm_config.model_config):
        length -= max_prompt_len(settings_of(vllm_config), length) - 1
    return -(-length // page_tokens(vllm_config)) + 1


def fits_itself(model_config: ModelConfig) -> bool:
    """Tell whether `--max-model-len` is `auto`: vLLM lowers it, at the engine's start, to what memory holds."""
    return bool(model_config.original_max_model_len == -1)


def fit_max_model_len(vllm_config: VllmConfig, num_pages: int) -> None:
    """Lower an `auto` to what the pages hold, for vLLM reckons with the one that it keeps for itself too.

    Args:
        vllm_config: changed; front ends hear of it when the engine is ready.
        num_pages: all.
    """
    model, page_size = vllm_config.model_config, vllm_config.cache_config.block_size
    longest = (num_pages - 1) * page_size
    if fits_itself(model) and longest < model.max_model_len:
        logger.info("Lowering max_model_len from %d to %d, what %d pages hold", model.max_model_len, longest, num_pages)
        model.max_model_len = longest


def page_tokens(vllm_config: VllmConfig) -> int:
    """Return the tokens of a page before an engine starts: by default vLLM 0.33 decides a CPU's in the worker alone."""
    is_default = not vllm_config.cache_config.user_specified_block_size
    return PAGE_TOKENS if is_default and current_platform.is_cpu() else int(vllm_config.cache_config.block_size)


def _page_bytes(model_config: ModelConfig, parallel: ParallelConfig, itemsize: int, page_tokens: int) -> int:
    """Return the memory of a page in all layers of a rank."""
    per_token = 2 * model_config.get_head_size() * model_config.get_num_kv_heads(parallel) * itemsize
    return model_config.get_num_layers(parallel) * per_token * page_tokens
