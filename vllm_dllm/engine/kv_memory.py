"""How much memory the K/V of some requests take, for engines that are started for a known workload."""

from vllm.config import ModelConfig, ParallelConfig

PAGE_TOKENS = 128
"""Tokens of the largest page that vLLM uses by default, a CPU's."""


def kv_bytes(model_config: ModelConfig, num_seqs: int, max_model_len: int) -> int:
    """Return the memory of the K/V of `num_seqs` requests of `max_model_len` tokens, in whole pages."""
    parallel = ParallelConfig()
    per_token = 2 * model_config.get_head_size() * model_config.get_num_kv_heads(parallel) * model_config.dtype.itemsize
    num_pages = num_seqs * -(-max_model_len // PAGE_TOKENS) + 1  # vLLM keeps one for itself
    return model_config.get_num_layers(parallel) * per_token * PAGE_TOKENS * num_pages
