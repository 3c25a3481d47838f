"""Attention over paged context and own rows in plain torch: the semantics that faster implementations share.

The cache of a layer is `[num_pages, num_kv_heads, page_size, 2 * head_dim]` under any strides, keys before values.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vllm_dllm.attention.layout import ForwardLayout, PagedIndex


def store_kv(key: Tensor, value: Tensor, kv_cache: Tensor, index: PagedIndex) -> None:
    """Write rows' keys and values into the cache.

    Args:
        key, value: [num_rows, num_kv_heads, head_dim].
        kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_dim], written.
        index: [num_rows], without repetition.
    """
    kv_cache[index.page, :, index.offset] = torch.cat([key, value], dim=-1).to(kv_cache.dtype)


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, layout: ForwardLayout, scale: float
) -> Tensor:
    """Attend from every row to its group's context and to its group's own rows, all of them, in both directions.

    Args:
        query: [num_rows, num_heads, head_dim].
        key, value: [num_rows, num_kv_heads, head_dim], of the same rows.
        kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_dim], read where the layout says.
        layout: groups, context and own rows.
        scale: factor of the scores.

    Returns: [num_rows, num_heads, head_dim].
    """
    query, key, value = (_group(rows, layout) for rows in (query, key, value))
    is_visible = _visibility(layout, own_len=key.shape[1])
    if layout.context is not None:
        index = layout.context.index
        stored_key, stored_value = kv_cache[index.page, :, index.offset].to(key.dtype).chunk(2, dim=-1)
        key = torch.cat([stored_key, key], dim=1)
        value = torch.cat([stored_value, value], dim=1)
    out = scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=None if is_visible is None else is_visible[:, None, None, :],
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    ).transpose(1, 2)
    rows = out.flatten(0, 1)
    return rows if layout.ragged is None else rows[layout.ragged.place]


def _group(rows: Tensor, layout: ForwardLayout) -> Tensor:
    """Arrange packed rows by group; [num_groups, own_len, num_heads, head_dim]."""
    if layout.ragged is None:
        return rows.view(layout.num_groups, -1, *rows.shape[1:])
    return rows[layout.ragged.row]


def _visibility(layout: ForwardLayout, own_len: int) -> Tensor | None:
    """Tell which columns, context then own rows, a group sees; [num_groups, columns] bool, None for all."""
    if layout.context is None and layout.ragged is None:
        return None
    parts = [] if layout.context is None else [layout.context.is_visible]
    if layout.ragged is not None:
        parts.append(layout.ragged.is_own)
    else:
        parts.append(parts[0].new_ones(layout.num_groups, own_len))
    return torch.cat(parts, dim=1)
