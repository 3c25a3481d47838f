"""Attention over paged context and own rows in plain torch: the semantics that faster implementations share.

The cache of a layer is `[num_pages, num_kv_heads, page_size, 2 * head_dim]` under any strides, keys before values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vllm_dllm.attention.layout import Context, ForwardLayout, PagedIndex

CHUNK_BYTES = 256 << 20
"""Bound of the K/V that are gathered at a time: 4 requests of LLaDA-8B's 4,096 positions in bf16."""


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
    num_rows = query.shape[0]
    own_len = num_rows // layout.num_groups if layout.ragged is None else layout.ragged.row.shape[1]
    width = own_len + (0 if layout.context is None else layout.context.is_visible.shape[1])
    group_bytes = width * 2 * key[0].numel() * key.element_size()
    chunk = layout.num_nodes * max(1, CHUNK_BYTES // (group_bytes * layout.num_nodes))  # groups, with all their nodes
    out = query.new_empty(num_rows + 1, *query.shape[1:])  # the last row takes what belongs to no row
    for begin in range(0, layout.num_groups, chunk):
        part = slice(begin, begin + chunk)
        own_query, own_key, own_value = (_group(rows, layout, part) for rows in (query, key, value))
        attended = _attend(own_query, own_key, own_value, kv_cache, _visible(layout, part), scale).flatten(0, 1)
        if layout.ragged is None:
            out[begin * own_len : begin * own_len + len(attended)] = attended
        else:
            row, is_own = layout.ragged.row[part], layout.ragged.is_own[part]
            out[row.masked_fill(~is_own, num_rows).flatten()] = attended
    return out[:num_rows]


@dataclass(frozen=True, slots=True)
class _Visible:
    """What some groups see: stored positions, and own rows (None: all of them)."""

    context: Context | None
    num_nodes: int
    is_own: Tensor | None  # [num_groups, own_len] bool


def _visible(layout: ForwardLayout, part: slice) -> _Visible:
    context = layout.context
    if context is not None:
        contexts = slice(part.start // layout.num_nodes, part.stop // layout.num_nodes)
        index = PagedIndex(context.index.page[contexts], context.index.offset[contexts])
        context = Context(index, context.is_visible[contexts])
    return _Visible(context, layout.num_nodes, None if layout.ragged is None else layout.ragged.is_own[part])


def _group(rows: Tensor, layout: ForwardLayout, part: slice) -> Tensor:
    """Arrange packed rows of some groups by group; [num_groups, own_len, num_heads, head_dim]."""
    if layout.ragged is None:
        return rows.view(layout.num_groups, -1, *rows.shape[1:])[part]
    return rows[layout.ragged.row[part]]


def _attend(query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, visible: _Visible, scale: float) -> Tensor:
    """Attend within some groups; all tensors but the cache are [num_groups, own_len, num_heads, head_dim]."""
    is_visible = visible.is_own
    if visible.context is not None:
        index = visible.context.index
        stored = kv_cache[index.page, :, index.offset].to(key.dtype)  # once for all nodes
        stored_key, stored_value = stored.repeat_interleave(visible.num_nodes, 0).chunk(2, dim=-1)
        is_own = is_visible if is_visible is not None else index.page.new_ones(key.shape[:2], dtype=torch.bool)
        is_stored = visible.context.is_visible.repeat_interleave(visible.num_nodes, 0)
        is_visible = torch.cat([is_stored, is_own], dim=1)
        key = torch.cat([stored_key, key], dim=1)
        value = torch.cat([stored_value, value], dim=1)
    return scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=None if is_visible is None else is_visible[:, None, None, :],
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    ).transpose(1, 2)
