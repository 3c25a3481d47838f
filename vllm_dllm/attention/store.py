"""Where K/V come into the cache."""

import torch
from torch import Tensor

from vllm_dllm.attention.layout import PagedIndex


def store_kv(key: Tensor, value: Tensor, kv_cache: Tensor, index: PagedIndex) -> None:
    """Write rows' keys and values into the cache.

    Args:
        key, value: [num_rows, num_kv_heads, head_dim].
        kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_dim], written.
        index: [num_rows], without repetition.
    """
    kv_cache[index.page, :, index.offset] = torch.cat([key, value], dim=-1).to(kv_cache.dtype)
