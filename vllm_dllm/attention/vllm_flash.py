"""Attention from parts that ship with vLLM: FlashAttention, with a page table for the context, and a merge of states.

FlashAttention reads a sequence's K/V from whole pages, of which only the last may be partly seen, whereas a context
ends before the block and begins again behind it, in the middle of pages. So the whole pages of both intervals make one
page table, and what lies in the others, less than a page at each edge, is gathered and put before the nodes' own rows:

    context      [0 ......... start)      [end ......... seq_len)
    page table   | page | page |              | page | page |..     one call, not causal
    gathered                   |..)       [...|                     with the own rows: one call each for full and causal

A context of one interval that begins with a page, as all of a block-causal model, has nothing to gather.

Written by the sources of vLLM 0.32 and tested with a stand-in; it has not run on a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.arrays import Int32Array, IntArray, to_device
from vllm_dllm.attention.groups import ContextGroups, OwnNodes, context_groups, own_nodes, ranges
from vllm_dllm.attention.interface import Heads, Setting, Support
from vllm_dllm.attention.layout import ForwardLayout, PagedIndex
from vllm_dllm.attention.varlen import SUPPORT, VarlenAttention, offsets, unavailable


class VllmFlashAttention:
    """`vllm`: FlashAttention 2 or 3 as vLLM chooses, twice, and a merge."""

    support: ClassVar[Support] = SUPPORT

    @staticmethod
    def unavailable(setting: Setting) -> str | None:
        """Return why the installed vLLM's library is not there or does not load, with the command that mends it."""
        return unavailable(setting.head_dim)

    @staticmethod
    def temporary_bytes(query: Tensor, max_context_len: int) -> int:
        """Return the bytes of copies of all rows' keys and values, of queries, and of both parts of the output."""
        return query.numel() * query.element_size() * 8

    def __init__(self, heads: Heads, kv_cache: Tensor) -> None:
        self.attend = VarlenAttention(heads)
        self.merge: Callable[..., None] = import_module("vllm.v1.attention.ops.merge_attn_states").merge_attn_states

    def plan(self, layout: ForwardLayout) -> "VllmFlashPlan":
        """Find the whole pages of each context, and the positions beside them."""
        groups = context_groups(layout)
        whole = _whole_pages(groups.context, layout.page_size)
        beside = _beside(groups.context, whole, layout.page_size)
        own = tuple(_own_part(layout, groups, nodes, beside[1]) for nodes in own_nodes(layout.host))
        index = None
        if beside[1].any():
            request = groups.request.astype(np.int64).repeat(beside[1])
            index = _index(layout, request, beside[0])
        return VllmFlashPlan(self, own, index, _paged_part(layout, groups, whole))


@dataclass(frozen=True, slots=True)
class OwnPart:
    """Nodes that see their rows alike, and the stored positions that are gathered for them."""

    rows: Tensor | None  # [num_rows] int64, theirs; None: all
    keys: Tensor | None  # [num_keys] int64, among all rows and, behind them, the gathered; None: all rows
    lengths: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PagedPart:
    """Groups whose contexts have whole pages."""

    rows: Tensor | None  # [num_rows] int64, theirs; None: all
    lengths: dict[str, Any]


@dataclass(frozen=True, slots=True)
class VllmFlashPlan:
    """The groups of a forward."""

    attention: VllmFlashAttention
    own: tuple[OwnPart, ...]
    beside: PagedIndex | None  # [num_gathered], positions beside the whole pages; None: there are none
    paged: PagedPart | None

    def run(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, out: Tensor) -> None:
        """Attend to the own rows and what is beside the pages, and merge what is in the pages."""
        if self.beside is not None:
            stored_key, stored_value = kv_cache[self.beside.page, :, self.beside.offset].chunk(2, dim=-1)
            key, value = torch.cat([key, stored_key]), torch.cat([value, stored_value])
        own, own_lse = self._attend_own(query, key, value)
        if self.paged is None:
            out.copy_(own)
            return
        rows, attention = self.paged.rows, self.attention
        stored_key, stored_value = kv_cache.transpose(1, 2).chunk(2, dim=-1)
        if rows is None:
            seen, seen_lse = attention.attend(query, stored_key, stored_value, self.paged.lengths)
            attention.merge(out, seen, seen_lse, own, own_lse)
            return
        seen, seen_lse = attention.attend(query[rows], stored_key, stored_value, self.paged.lengths)
        merged = torch.empty_like(seen)
        attention.merge(merged, seen, seen_lse, own[rows], own_lse[:, rows].contiguous())
        out.copy_(own.index_copy_(0, rows, merged))

    def _attend_own(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        attend = self.attention.attend
        own = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse = torch.empty(query.shape[1::-1], dtype=torch.float32, device=query.device)
        for part in self.own:
            keys = slice(None) if part.keys is None else part.keys
            if part.rows is None:
                return attend(query, key[keys], value[keys], part.lengths)
            own[part.rows], lse[:, part.rows] = attend(query[part.rows], key[keys], value[keys], part.lengths)
        return own, lse


def _whole_pages(context: Int32Array, page_size: int) -> IntArray:
    """Return the parts of contexts that a page table can have: [num_groups, 4], begin and end of both, in positions.

    Each begins with a page; but for the last one, whose end may be anywhere, each ends with a page.
    """
    whole = context.astype(np.int64)
    is_empty = whole[:, 1::2] <= whole[:, ::2]
    whole[:, ::2] = -(-whole[:, ::2] // page_size) * page_size
    has_more = ~is_empty[:, 1] & (whole[:, 3] > whole[:, 2])  # behind the first interval
    whole[has_more, 1] = whole[has_more, 1] // page_size * page_size
    for first in (0, 2):
        nothing = is_empty[:, first // 2] | (whole[:, first + 1] <= whole[:, first])
        whole[nothing, first : first + 2] = 0
    return whole


def _beside(context: Int32Array, whole: IntArray, page_size: int) -> tuple[IntArray, IntArray]:
    """Return the positions that the whole pages leave, one group's after another's, and how many each has."""
    parts = []
    for first in (0, 2):
        begin, end = context[:, first].astype(np.int64), context[:, first + 1].astype(np.int64)
        has_whole = whole[:, first + 1] > whole[:, first]
        before = np.where(has_whole, whole[:, first], end)
        behind = np.where(has_whole, whole[:, first + 1], end)
        parts += [(begin, np.maximum(before - begin, 0)), (behind, np.maximum(end - behind, 0))]
    begins = np.stack([begin for begin, _ in parts], 1).ravel()
    lengths = np.stack([length for _, length in parts], 1)
    assert int(lengths.max(initial=0)) < 2 * page_size, "an interval without a whole page has less than two pages"
    return ranges(begins, lengths.ravel()), lengths.sum(1)


def _own_part(layout: ForwardLayout, groups: ContextGroups, nodes: OwnNodes, num_beside: IntArray) -> OwnPart:
    device = layout.context.device
    num_rows = nodes.num_rows.astype(np.int64)
    rows = np.arange(num_rows.sum()) if nodes.rows is None else nodes.rows
    first = rows[np.cumsum(num_rows) - num_rows]
    group = np.searchsorted(groups.first_row, first, "right") - 1
    lengths = {
        "cu_seqlens_q": offsets(num_rows, device),
        "max_seqlen_q": int(num_rows.max()),
        "causal": nodes.is_causal,
    }
    of_rows = None if nodes.rows is None else to_device(nodes.rows, device)
    keys, num_keys = of_rows, num_rows + num_beside[group]
    if num_beside.any():
        first_beside = (np.cumsum(num_beside) - num_beside)[group] + int(layout.host.first_row[-1])
        begins = np.stack([first_beside, first], 1).ravel()
        keys = to_device(ranges(begins, np.stack([num_beside[group], num_rows], 1).ravel()), device)
    lengths |= {"cu_seqlens_k": offsets(num_keys, device), "max_seqlen_k": int(num_keys.max())}
    return OwnPart(of_rows, keys, lengths)


def _paged_part(layout: ForwardLayout, groups: ContextGroups, whole: IntArray) -> PagedPart | None:
    device = layout.context.device
    length = (whole[:, 1::2] - whole[:, ::2]).sum(1)
    has_pages = length > 0
    if not has_pages.any():
        return None
    some = groups.where(has_pages)
    whole, length = whole[has_pages], length[has_pages]
    num_pages = -(-(whole[:, 1::2] - whole[:, ::2]) // layout.page_size)  # of both parts
    column = np.arange(num_pages.sum(1).max())
    is_first = column < num_pages[:, :1]
    page = np.where(is_first, whole[:, :1] // layout.page_size, whole[:, 2:3] // layout.page_size - num_pages[:, :1])
    is_there = column < num_pages.sum(1)[:, None]
    place = np.where(is_there, page + column, 0)
    request = np.where(is_there, some.request[:, None], 0)
    table = layout.page_table[to_device(request, device), to_device(place, device)]
    lengths = {
        "cu_seqlens_q": offsets(some.num_rows.astype(np.int64), device),
        "max_seqlen_q": int(some.num_rows.max()),
        "seqused_k": to_device(length.astype(np.int32), device),
        "max_seqlen_k": int(length.max()),
        "block_table": table.masked_fill(~to_device(is_there, device), 0),
        "causal": False,
    }
    is_all = len(some.rows) == layout.host.first_row[-1]
    return PagedPart(None if is_all else to_device(some.rows, device), lengths)


def _index(layout: ForwardLayout, request: IntArray, position: IntArray) -> PagedIndex:
    device = layout.context.device
    places = to_device(np.stack([request, position // layout.page_size, position % layout.page_size]), device)
    return PagedIndex(layout.page_table[places[0], places[1]].long(), places[2])
