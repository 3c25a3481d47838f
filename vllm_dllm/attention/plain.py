"""Attention in plain torch, on every device: gather each node's context, then torch's own attention.

It is the semantics that the other implementations are tested against.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vllm_dllm.attention.interface import Heads, Setting, Support
from vllm_dllm.attention.layout import ForwardLayout, PagedIndex

CHUNK_BYTES = 256 << 20
"""Bound of the K/V that are gathered at a time: 4 requests of LLaDA-8B's 4,096 positions in bf16."""


class PlainAttention:
    """`torch`: gathered context and `scaled_dot_product_attention`."""

    support: ClassVar[Support] = Support(
        device_types={"cpu", "cuda"},
        dtypes={torch.float32, torch.float16, torch.bfloat16},
        head_dims=range(1, 1025),
        page_sizes=range(1, 1 << 20),
        casts_cache=True,
        cuda_graphs=False,
    )

    @staticmethod
    def unavailable(setting: Setting) -> str | None:
        """Return None: torch is there."""
        return None

    @staticmethod
    def temporary_bytes(query: Tensor, max_context_len: int) -> int:
        """Return the bytes of a chunk's gathered K/V and of their concatenation with the rows' own."""
        return 2 * CHUNK_BYTES

    def __init__(self, heads: Heads, kv_cache: Tensor) -> None:
        self.heads = heads

    def plan(self, layout: ForwardLayout) -> "PlainPlan":
        """Make the index tensors of all chunks of nodes."""
        return PlainPlan(tuple(_chunk(layout, part) for part in self._parts(layout)), self.heads.scale)

    def _parts(self, layout: ForwardLayout) -> Iterator[slice]:
        """Cut the nodes into slices of bounded K/V."""
        host = layout.host
        if host.first_row[-1] == 0:
            return
        position_bytes = 2 * self.heads.num_kv_heads * self.heads.head_dim * self.heads.dtype.itemsize
        node_bytes = (host.own_len.max() + host.context_len.max()) * position_bytes
        step = max(1, CHUNK_BYTES // int(node_bytes))
        for begin in range(0, host.num_nodes, step):
            yield slice(begin, min(begin + step, host.num_nodes))


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some nodes as a padded rectangle; its columns are the context's positions, then the own rows."""

    rows: slice  # of the forward
    row: Tensor  # [num_nodes, max_own_len] int64, packed row; any row where the node has none
    place: Tensor  # [num_rows] int64, where each row is in the flattened rectangle
    stored: PagedIndex  # [num_nodes, max_context_len]; anywhere where the node sees nothing
    # [num_nodes, 1 or max_own_len, max_context_len + max_own_len] bool, 1: a node's rows see the same; None: all do
    is_visible: Tensor | None


@dataclass(frozen=True, slots=True)
class PlainPlan:
    """Index tensors of a forward."""

    chunks: tuple[_Chunk, ...]
    scale: float

    def run(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, out: Tensor) -> None:
        """Attend, chunk by chunk."""
        for chunk in self.chunks:
            seen_key, seen_value = _visible_kv(chunk, key, value, kv_cache)
            attended = scaled_dot_product_attention(
                query[chunk.row].transpose(1, 2),
                seen_key.transpose(1, 2),
                seen_value.transpose(1, 2),
                attn_mask=None if chunk.is_visible is None else chunk.is_visible[:, None],
                scale=self.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            out[chunk.rows] = attended.transpose(1, 2).flatten(0, 1)[chunk.place]


def _visible_kv(chunk: _Chunk, key: Tensor, value: Tensor, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Gather what each node sees; twice [num_nodes, num_columns, num_kv_heads, head_dim]."""
    own_key, own_value = key[chunk.row], value[chunk.row]
    width = chunk.stored.page.shape[1]
    if width == 0:
        return own_key, own_value
    stored = kv_cache[chunk.stored.page, :, chunk.stored.offset].to(key.dtype)
    if chunk.is_visible is not None:  # what is there may be NaN, which no weight of 0 hides
        stored.masked_fill_(~chunk.is_visible[:, 0, :width, None, None], 0)
    stored_key, stored_value = stored.chunk(2, dim=-1)
    return torch.cat([stored_key, own_key], 1), torch.cat([stored_value, own_value], 1)


def _chunk(layout: ForwardLayout, part: slice) -> _Chunk:
    host, device = layout.host, layout.context.device
    own_len, context_len = host.own_len[part], host.context_len[part]
    first, last = int(host.first_row[part.start]), int(host.first_row[part.stop])
    row = layout.first_row[part.start : part.stop, None] + torch.arange(int(own_len.max()), device=device)
    is_own = row < layout.first_row[part.start + 1 : part.stop + 1, None]
    stored, is_stored = _stored(layout, part, int(context_len.max()))
    is_ragged = bool(np.ptp(own_len) or np.ptp(context_len))
    node = torch.arange(len(own_len), device=device)
    begin = node * is_own.shape[1] - (layout.first_row[part] - first)  # place of a row = begin of its node + its number
    place = torch.repeat_interleave(begin, is_own.sum(1), output_size=last - first)
    return _Chunk(
        rows=slice(first, last),
        row=row.clamp(max=int(host.first_row[-1]) - 1).long(),
        place=place + torch.arange(last - first, device=device),
        stored=stored,
        is_visible=_visible(layout, part, is_stored, is_own) if is_ragged or host.is_causal[part].any() else None,
    )


def _visible(layout: ForwardLayout, part: slice, is_stored: Tensor, is_own: Tensor) -> Tensor:
    """Return `_Chunk.is_visible` from which columns some nodes have, stored and own."""
    if not layout.host.is_causal[part].any():
        return torch.cat([is_stored, is_own], 1)[:, None]
    width = is_own.shape[1]
    is_before = torch.ones(width, width, dtype=torch.bool, device=is_own.device).tril()
    is_seen = is_own[:, None] & (is_before | (layout.is_causal[part, None, None] == 0))
    return torch.cat([is_stored[:, None].expand(-1, width, -1), is_seen], 2)


def _stored(layout: ForwardLayout, part: slice, width: int) -> tuple[PagedIndex, Tensor]:
    """Return where some nodes find their context, and which columns are part of it; [num_nodes, width]."""
    device = layout.context.device
    begin0, end0, begin1, end1 = layout.context[part, :, None].unbind(1)
    column = torch.arange(width, device=device)
    length = end0 - begin0
    position = torch.where(column < length, begin0 + column, begin1 - length + column)
    is_stored = column < length + end1 - begin1
    position = position.masked_fill_(~is_stored, 0)
    requests = torch.arange(layout.host.num_requests, device=device)
    request = torch.repeat_interleave(requests, layout.first_node.diff(), output_size=layout.host.num_nodes)[part]
    page = layout.page_table[request[:, None], position // layout.page_size]
    return PagedIndex(page.masked_fill_(~is_stored, 0).long(), (position % layout.page_size).long()), is_stored
