"""Attention by FlashInfer (https://docs.flashinfer.ai): paged context without a mask, own rows, a merge of both.

FlashInfer's K/V come in whole pages of which only the last may be partly seen, whereas a context begins again in the
middle of a page, behind the block. So each position is given as a page of one, which every layout of the cache allows:
places in the cache are counted in steps of one position, whatever lies between two pages. This is exact and needs no
mask; the list of places costs 4 bytes per position and forward.

Written by the documentation of FlashInfer 0.6 and tested with a stand-in; it has not run on a GPU.
"""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.arrays import Int32Array, to_device
from vllm_dllm.attention.groups import OwnNodes, context_groups, context_index, own_nodes
from vllm_dllm.attention.interface import Heads, Setting, Support
from vllm_dllm.attention.layout import ForwardLayout

WORKSPACE_BYTES = 128 << 20
"""What FlashInfer recommends."""


class FlashInferAttention:
    """`flashinfer`: the two prefill wrappers of the library, and its merge of states."""

    support: ClassVar[Support] = Support(
        device_types={"cuda"},
        dtypes={torch.float16, torch.bfloat16},
        head_dims={64, 128, 256},
        page_sizes=range(1, 1 << 20),
        casts_cache=False,
        cuda_graphs=False,
        least_capability=(8, 0),
    )

    @staticmethod
    def unavailable(setting: Setting) -> str | None:
        """Return None if the library is installed; it is not imported."""
        if find_spec("flashinfer") is None:
            return "FlashInfer is not installed; install it: `pip install flashinfer-python`"
        return None

    @staticmethod
    def temporary_bytes(query: Tensor, max_context_len: int) -> int:
        """Return the bytes of the context's part of the output; both parts' sums add a few per cent."""
        return query.numel() * query.element_size() * 9 // 8

    def __init__(self, heads: Heads, kv_cache: Tensor) -> None:
        flashinfer = import_module("flashinfer")
        self.heads = heads
        self.positions_per_page = kv_cache.stride(0) // kv_cache.stride(2)
        assert kv_cache.stride(0) % kv_cache.stride(2) == 0, "a page begins where a position could"
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=kv_cache.device)
        # All wrappers work one after another in one stream. Of the library's kernels "fa2" runs on every GPU.
        self.context = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
        ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper
        self.own = {is_causal: ragged(workspace, "NHD", backend="fa2") for is_causal in (False, True)}
        self.merge_in_place = flashinfer.merge_state_in_place

    def plan(self, layout: ForwardLayout) -> "FlashInferPlan":
        """Plan both parts; a plan holds until the next one is made."""
        heads = self.heads
        numbers: dict[str, Any] = {
            "num_qo_heads": heads.num_heads,
            "num_kv_heads": heads.num_kv_heads,
            "head_dim_qk": heads.head_dim,
            "sm_scale": heads.scale,
            "q_data_type": heads.dtype,
            "kv_data_type": heads.dtype,
            # Splits depend on the batch, and with them the order of a row's sums.
            "disable_split_kv": True,
        }
        own = own_nodes(layout.host)
        for nodes in own:
            offsets = _offsets(nodes.num_rows)
            self.own[nodes.is_causal].plan(offsets, offsets, causal=nodes.is_causal, **numbers)
        groups = context_groups(layout)
        if groups.context_len.any():
            index = context_index(layout, groups)
            self.context.plan(
                qo_indptr=_offsets(groups.num_rows),
                paged_kv_indptr=_offsets(groups.context_len),
                paged_kv_indices=(index.page * self.positions_per_page + index.offset).int(),
                paged_kv_last_page_len=torch.from_numpy(np.minimum(groups.context_len, 1)),
                page_size=1,
                causal=False,
                **numbers,
            )
        parts = tuple(self._own_part(nodes, layout.context.device) for nodes in own)
        return FlashInferPlan(self, parts, has_context=bool(groups.context_len.any()))

    def _own_part(self, nodes: OwnNodes, device: torch.device) -> "OwnPart":
        rows = None if nodes.rows is None else to_device(nodes.rows, device)
        return OwnPart(self.own[nodes.is_causal], rows)


@dataclass(frozen=True, slots=True)
class OwnPart:
    """Nodes that see their rows alike."""

    wrapper: Any
    rows: Tensor | None  # [num_rows] int64, theirs; None: all


@dataclass(frozen=True, slots=True)
class FlashInferPlan:
    """A forward that the wrappers are planned for."""

    attention: FlashInferAttention
    own: tuple[OwnPart, ...]
    has_context: bool

    def run(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, out: Tensor) -> None:
        """Attend to the own rows, then to the context, and merge the latter in."""
        own_lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        for part in self.own:
            if part.rows is None:
                _, own_lse = part.wrapper.run(query, key, value, out=out, return_lse=True)
            else:
                rows = part.rows
                out[rows], own_lse[rows] = part.wrapper.run(query[rows], key[rows], value[rows], return_lse=True)
        if self.has_context:
            seen, seen_lse = self.attention.context.run(query, _positions(kv_cache), return_lse=True)
            self.attention.merge_in_place(out, own_lse, seen, seen_lse)


def _positions(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """View a layer's keys and values as pages of one position, counted as in `FlashInferAttention.plan`."""
    num_pages, num_kv_heads, page_size, width = kv_cache.shape
    page_stride, head_stride, position_stride, _ = kv_cache.stride()
    num_places = (num_pages - 1) * (page_stride // position_stride) + page_size
    places = kv_cache.as_strided(
        (num_places, 1, num_kv_heads, width), (position_stride, position_stride, head_stride, 1)
    )
    return places[..., : width // 2], places[..., width // 2 :]


def _offsets(length: Int32Array) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(length)]).astype(np.int32))
