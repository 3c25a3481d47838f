"""How much memory the K/V of some requests take, for engines that are started for a known workload."""

from vllm.config import ModelConfig, ParallelConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

PAGE_TOKENS = 128
"""Tokens of the largest page that vLLM uses by default, a CPU's."""


def kv_bytes(model_config: ModelConfig, num_seqs: int, max_model_len: int) -> int:
    """Return the memory of the K/V of `num_seqs` requests of `max_model_len` tokens, in whole pages."""
    num_pages = num_seqs * -(-max_model_len // PAGE_TOKENS) + 1  # vLLM keeps one for itself
    return num_pages * _page_bytes(model_config, ParallelConfig(), model_config.dtype.itemsize, PAGE_TOKENS)


def least_kv_bytes(vllm_config: VllmConfig) -> int:
    """Return the memory below which vLLM starts no worker: that of one request of `max_model_len`, in each rank."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    itemsize = kv_cache_dtype_str_to_dtype(cache.cache_dtype, model).itemsize
    page_bytes = _page_bytes(model, vllm_config.parallel_config, itemsize, page_tokens(vllm_config))
    return least_num_pages(vllm_config) * page_bytes


def least_num_pages(vllm_config: VllmConfig) -> int:
    """Return the pages of one request of `max_model_len`, and the one that vLLM keeps for itself."""
    return -(-vllm_config.model_config.max_model_len // page_tokens(vllm_config)) + 1


def page_tokens(vllm_config: VllmConfig) -> int:
    """Return the tokens of a page before an engine starts: by default vLLM 0.33 decides a CPU's in the worker alone."""
    is_default = not vllm_config.cache_config.user_specified_block_size
    return PAGE_TOKENS if is_default and current_platform.is_cpu() else int(vllm_config.cache_config.block_size)


def _page_bytes(model_config: ModelConfig, parallel: ParallelConfig, itemsize: int, page_tokens: int) -> int:
    """Return the memory of a page in all layers of a rank."""
    per_token = 2 * model_config.get_head_size() * model_config.get_num_kv_heads(parallel) * itemsize
    return model_config.get_num_layers(parallel) * per_token * page_tokens
