"""Attention by this package's own kernel, which reads the layout as it is."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_dllm import ops
from vllm_dllm.attention.interface import Heads, Setting, Support
from vllm_dllm.attention.layout import ForwardLayout
from vllm_dllm.errors import KernelUnavailable
from vllm_dllm.ops.library import cpu_isa

LARGEST_PAGE = 256
SPLIT_LEN, MAX_SPLITS = 1024, 16
"""How the CUDA kernel splits a context; as in csrc/include/dllm/draft_graph_attention.h."""


class CsrcAttention:
    """`csrc`: `ops.draft_graph_attention`, which shares one pass over the context among a request's nodes."""

    support: ClassVar[Support] = Support(
        device_types={"cpu", "cuda"},
        dtypes={torch.float32, torch.float16, torch.bfloat16},
        head_dims=range(32, 257, 8),
        page_sizes=range(16, LARGEST_PAGE + 1),
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
        num_splits = min(MAX_SPLITS, -(-(max_context_len + LARGEST_PAGE) // SPLIT_LEN))
        if query.device.type == "cpu" or num_splits == 1:
            return 0
        num_rows, num_heads, head_dim = query.shape
        return 4 * num_splits * num_rows * num_heads * (head_dim + 2)

    def __init__(self, heads: Heads, kv_cache: Tensor) -> None:
        self.scale = heads.scale

    def plan(self, layout: ForwardLayout) -> "CsrcPlan":
        """Keep the layout: there is nothing to prepare."""
        return CsrcPlan(layout, self.scale)


@dataclass(frozen=True, slots=True)
class CsrcPlan:
    """A layout."""

    layout: ForwardLayout
    scale: float

    def run(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, out: Tensor) -> None:
        """Call the kernel."""
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
        )
