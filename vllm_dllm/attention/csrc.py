"""Attention by this package's own kernel, which reads the layout as it is."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_dllm import ops
from vllm_dllm.arrays import BoolArray, to_device
from vllm_dllm.attention import varlen
from vllm_dllm.attention.interface import Heads, Setting, Support
from vllm_dllm.attention.layout import ForwardLayout
from vllm_dllm.attention.tiles import num_multiprocessors, num_splits, query_tiles, workspace_bytes
from vllm_dllm.attention.varlen import ContextFreeRun, VarlenAttention
from vllm_dllm.errors import KernelUnavailable
from vllm_dllm.ops.library import cpu_isa


class CsrcAttention:
    """`csrc`: `ops.draft_graph_attention`, which shares one pass over the context among a request's nodes."""

    support: ClassVar[Support] = Support(
        device_types={"cpu", "cuda"},
        dtypes={torch.float32, torch.float16, torch.bfloat16},
        head_dims=range(32, 257, 8),
        page_sizes=range(16, 257),
        casts_cache=False,
        cuda_graphs=True,
        least_capability=(8, 0),
    )

    @staticmethod
    def unavailable(setting: Setting) -> str | None:
        """Return the reason why the op cannot be called, with the command that builds it."""
        try:
            ops.require("draft_graph_attention", setting.device_type)
            cpu_isa()
        except (KernelUnavailable, RuntimeError) as error:  # VLLM_DLLM_ISA may name what this CPU lacks
            return str(error)
        return None

    @staticmethod
    def temporary_bytes(query: Tensor, max_context_len: int) -> int:
        """Return the bytes of the CUDA kernel's workspace: what the splits of the context hand over."""
        if query.device.type == "cpu":
            return 0
        return workspace_bytes(query.shape[2], num_multiprocessors(query.device))

    def __init__(self, heads: Heads, kv_cache: Tensor) -> None:
        self.heads = heads
        self.num_multiprocessors = num_multiprocessors(kv_cache.device)
        capability = torch.cuda.get_device_capability(kv_cache.device) if kv_cache.is_cuda else None
        setting = Setting(kv_cache.device.type, capability, heads.dtype, kv_cache.dtype, heads.head_dim, None)
        self.varlen = VarlenAttention(heads) if varlen.refusal(setting) is None else None

    def plan(self, layout: ForwardLayout) -> "CsrcPlan":
        """Choose among how many CTAs contexts are divided, and which rows without context FlashAttention takes."""
        # Parts have room for all rows, those of FlashAttention too.
        tiles, num_rows = layout.tiles, int(layout.host.first_row[-1])
        runs: tuple[ContextFreeRun, ...] = ()
        if self.varlen is not None and not layout.is_captured:
            is_free = varlen.context_free(layout.host)
            if is_free.any():
                runs = varlen.context_free_runs(layout, is_free)
                tiles = self._tiles_of_others(layout, is_free)
        num_heads, num_kv_heads = self.heads.num_heads, self.heads.num_kv_heads
        splits = num_splits(num_rows, num_heads, num_kv_heads, layout.max_span, self.num_multiprocessors)
        return CsrcPlan(layout, self.heads.scale, tiles, splits, self.varlen, runs)

    def _tiles_of_others(self, layout: ForwardLayout, is_free: BoolArray) -> Tensor:
        tiles = query_tiles(layout.host, self.heads.num_heads // self.heads.num_kv_heads)
        return to_device(tiles[~is_free[tiles[:, 0]]], layout.tiles.device)


def check_layout(layout: ForwardLayout, *, num_pages: int, heads_per_kv: int) -> None:
    """Check the values of a layout where it lies; on a GPU this waits for the device.

    Args:
        layout: of a forward.
        num_pages: of the cache.
        heads_per_kv: query heads that share a K/V head.

    Raises: RuntimeError that names what is wrong: a page that the cache does not have, an interval beyond the page
        table, what does not ascend, a tile that is not the layout's.
    """
    ops.require("draft_graph_attention", "cpu")
    names = ("page_table", "first_node", "first_row", "context", "is_causal", "tiles")
    tensors = [getattr(layout, name).cpu() for name in names]
    num_rows = int(layout.host.first_row[-1])
    torch.ops.vllm_dllm.draft_graph_attention_check(*tensors, num_rows, num_pages, layout.page_size, heads_per_kv)


@dataclass(frozen=True, slots=True)
class CsrcPlan:
    """A layout."""

    layout: ForwardLayout
    scale: float
    tiles: Tensor  # [num_tiles, 8], of the rows that the kernel takes
    num_splits: int  # 1 on a CPU
    varlen: VarlenAttention | None
    runs: tuple[ContextFreeRun, ...]  # which it takes

    def run(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, out: Tensor) -> None:
        """Call the kernel, then FlashAttention for its rows: what the kernel left there is written over."""
        if len(self.tiles) or not self.runs:
            self._run_kernel(query, key, value, kv_cache, out)
        for run in self.runs:
            assert self.varlen is not None
            rows = run.rows
            self.varlen(query[rows], key[rows], value[rows], run.lengths, out[rows])

    def _run_kernel(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, out: Tensor) -> None:
        layout = self.layout
        ops.draft_graph_attention(
            query,
            key,
            value,
            kv_cache,
            layout.page_table,
            layout.first_node,
            layout.first_row,
            layout.context,
            layout.is_causal,
            self.scale,
            out,
            tiles=self.tiles,
            num_splits=self.num_splits,
        )
