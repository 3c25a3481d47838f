"""Attention by xFormers: gathered context, own rows, a merge of both by their log-sum-exp.

Written by the sources of xFormers 0.0.35 and tested with a stand-in; it has not run on a GPU.
"""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.arrays import Int32Array, to_device
from vllm_dllm.attention.groups import ContextGroups, OwnNodes, context_groups, context_index, own_nodes
from vllm_dllm.attention.interface import Heads, Setting, Support
from vllm_dllm.attention.layout import ForwardLayout, PagedIndex

CHUNK_BYTES = 256 << 20
"""Bound of the K/V that are gathered at a time, as in `plain`."""


class XformersAttention:
    """`xformers`: `memory_efficient_attention_partial` over ragged groups, once for the context, once for own rows.

    The library has no output argument, so its result is copied.
    """

    support: ClassVar[Support] = Support(
        device_types={"cuda"},
        dtypes={torch.float16, torch.bfloat16},
        head_dims=range(32, 257, 8),
        page_sizes=range(1, 1 << 20),
        casts_cache=True,
        cuda_graphs=False,
        least_capability=(8, 0),
    )

    @staticmethod
    def unavailable(setting: Setting) -> str | None:
        """Return None if the library is installed; it is not imported."""
        if find_spec("xformers") is None:
            return "xFormers is not installed; install it: `pip install xformers`"
        return None

    @staticmethod
    def temporary_bytes(query: Tensor, max_context_len: int) -> int:
        """Return the bytes of a chunk's gathered K/V, and of both parts of the output and their merge."""
        return CHUNK_BYTES + 3 * query.numel() * query.element_size()

    def __init__(self, heads: Heads, kv_cache: Tensor) -> None:
        self.fmha = import_module("xformers.ops.fmha")
        self.heads = heads
        self.device = kv_cache.device

    def plan(self, layout: ForwardLayout) -> "XformersPlan":
        """Describe the groups to the library."""
        own = tuple(self._own_part(nodes) for nodes in own_nodes(layout.host))
        groups = context_groups(layout)
        groups = groups.where(groups.context_len > 0)
        position_bytes = 2 * self.heads.num_kv_heads * self.heads.head_dim * self.heads.dtype.itemsize
        chunk = np.cumsum(groups.context_len.astype(np.int64) * position_bytes) // CHUNK_BYTES
        parts = tuple(self._part(layout, groups.where(chunk == number)) for number in np.unique(chunk))
        return XformersPlan(self, own, parts)

    def _part(self, layout: ForwardLayout, groups: ContextGroups) -> "ContextPart":
        rows = to_device(groups.rows, self.device)
        return ContextPart(rows, context_index(layout, groups), self._bias(groups.num_rows, groups.context_len))

    def _own_part(self, nodes: OwnNodes) -> "OwnPart":
        rows = None if nodes.rows is None else to_device(nodes.rows, self.device)
        return OwnPart(rows, self._bias(nodes.num_rows, nodes.num_rows, is_causal=nodes.is_causal))

    def _bias(self, num_rows: Int32Array, num_keys: Int32Array, *, is_causal: bool = False) -> object:
        masks = self.fmha.attn_bias
        mask = masks.BlockDiagonalCausalMask if is_causal else masks.BlockDiagonalMask
        bias: object = mask.from_seqlens(num_rows.tolist(), num_keys.tolist(), device=self.device)
        return bias


@dataclass(frozen=True, slots=True)
class OwnPart:
    """Nodes that see their rows alike."""

    rows: Tensor | None  # [num_rows] int64, theirs; None: all
    bias: object


@dataclass(frozen=True, slots=True)
class ContextPart:
    """Some groups that have a context."""

    rows: Tensor  # [num_rows] int64
    index: PagedIndex  # [num_positions]
    bias: object


@dataclass(frozen=True, slots=True)
class XformersPlan:
    """The groups of a forward."""

    attention: XformersAttention
    own: tuple[OwnPart, ...]
    parts: tuple[ContextPart, ...]

    def run(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, out: Tensor) -> None:
        """Attend to the own rows, and merge what the rows with a context see there."""
        query = query.unflatten(1, (key.shape[1], -1))[None]  # [1, num_rows, num_kv_heads, heads of each, head_dim]
        own, own_lse = self._attend_own(query, key, value)
        out.copy_(own[0].flatten(1, 2))
        for part in self.parts:
            stored_key, stored_value = kv_cache[part.index.page, :, part.index.offset].to(key.dtype).chunk(2, dim=-1)
            seen, seen_lse = self._attend(query[:, part.rows], stored_key, stored_value, part)
            merged, _ = self.attention.fmha.merge_attentions(
                [own[:, part.rows], seen], [own_lse[..., part.rows], seen_lse], write_lse=False
            )
            out[part.rows] = merged[0].flatten(1, 2)

    def _attend_own(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if len(self.own) == 1:
            return self._attend(query, key, value, self.own[0])
        own, lse = torch.empty_like(query), query.new_empty(1, *query.shape[2:4], query.shape[1], dtype=torch.float32)
        for part in self.own:
            own[:, part.rows], lse[..., part.rows] = self._attend(
                query[:, part.rows], key[part.rows], value[part.rows], part
            )
        return own, lse

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, part: OwnPart | ContextPart) -> tuple[Tensor, Tensor]:
        attend, scale = self.attention.fmha.memory_efficient_attention_partial, self.attention.heads.scale
        result: tuple[Tensor, Tensor] = attend(query, *_grouped(key, value, query), attn_bias=part.bias, scale=scale)
        return result


def _grouped(key: Tensor, value: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat keys and values [num_rows, num_kv_heads, head_dim] for each query head of theirs, without a copy."""
    shape = (1, key.shape[0], key.shape[1], query.shape[3], key.shape[2])
    return key[None, :, :, None].expand(shape), value[None, :, :, None].expand(shape)
