"""The metadata of each forward: its layout, planned by the chosen implementation, the same for every layer."""

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_dllm.attention.csrc import CsrcAttention, check_layout
from vllm_dllm.attention.interface import Plan
from vllm_dllm.attention.layout import (
    CapturedLayout,
    ForwardLayout,
    HostLayout,
    PagedIndex,
    denoise_layout,
    forward_layout,
    lone_layout,
)
from vllm_dllm.engine.attention import ForwardAttention, implementation_of
from vllm_dllm.engine.worker_check import CheckLevel, check_level
from vllm_dllm.state.step_rows import NULL_PAGE


class StepAttention:
    """Makes the layers' metadata, once there is a cache."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        block_length: int,
        device: torch.device,
        *,
        stores: bool,
    ) -> None:
        groups = kv_cache_config.kv_cache_groups
        assert len(groups) == 1, f"all layers attend alike, so they share one cache group; got {len(groups)}"
        self.layer_names = list(groups[0].layer_names)
        self.page_size = groups[0].kv_cache_spec.block_size
        self.num_pages = kv_cache_config.num_blocks
        self.block_length = block_length
        self.device = device
        self.stores = stores
        layer = vllm_config.compilation_config.static_forward_context[self.layer_names[0]]
        heads = layer.impl.heads(vllm_config.model_config.dtype)
        self.heads_per_kv = heads.num_heads // heads.num_kv_heads
        self.implementation = implementation_of(vllm_config)(heads, layer.kv_cache)
        self.checks_layouts = isinstance(self.implementation, CsrcAttention) and check_level() == CheckLevel.STEP
        self.max_pages = -(-vllm_config.model_config.max_model_len // self.page_size)
        self.captured: CapturedLayout | None = None
        self.captured_store: PagedIndex | None = None
        if vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
            self.prepare_capture(vllm_config)

    def prepare_capture(self, vllm_config: VllmConfig) -> None:
        """Make the tensors that captured graphs read."""
        scheduler = vllm_config.scheduler_config
        self.captured = CapturedLayout(
            max_num_requests=scheduler.max_num_seqs,
            max_num_nodes=scheduler.max_num_batched_tokens // self.block_length,
            max_pages=self.max_pages,
            block_length=self.block_length,
            heads_per_kv=self.heads_per_kv,
            device=self.device,
        )
        if self.stores:
            nowhere = torch.zeros(scheduler.max_num_batched_tokens, dtype=torch.int64, device=self.device)
            self.captured_store = PagedIndex(nowhere, nowhere.clone())

    def eager(
        self, host: HostLayout, page_table: Tensor, store: PagedIndex | None = None
    ) -> dict[str, ForwardAttention]:
        """Return the metadata of a forward that is run as it comes.

        Args:
            host: the layout.
            page_table: [num_requests, max_pages] int32.
            store: [num_rows], where the rows' K/V go; None: nowhere.
        """
        layout = forward_layout(host, page_table, self.page_size, self.heads_per_kv)
        return dict.fromkeys(self.layer_names, ForwardAttention(self._plan(layout), store))

    def _plan(self, layout: ForwardLayout) -> Plan:
        if self.checks_layouts:
            check_layout(layout, num_pages=self.num_pages, heads_per_kv=self.heads_per_kv)
        return self.implementation.plan(layout)

    def lone(self, num_rows: int) -> dict[str, ForwardAttention]:
        """Return the metadata of rows that belong to nobody, and see each other."""
        return self.eager(lone_layout(num_rows), torch.zeros((1, 1), dtype=torch.int32, device=self.device))

    def graph(
        self, host: HostLayout, page_table: Tensor, num_rows: int, store: PagedIndex | None
    ) -> dict[str, ForwardAttention]:
        """Return the metadata of a denoising step that is captured or replayed.

        Args:
            host, page_table, num_rows: as in `CapturedLayout.fill`.
            store: [num_rows or fewer], as in `eager`; rows without store into the page that belongs to nobody.
        """
        assert self.captured is not None, "a graph is captured only where graphs are on"
        layout = self.captured.fill(host, page_table, num_rows=num_rows, page_size=self.page_size)
        captured = self._fill_store(store, num_rows)
        return dict.fromkeys(self.layer_names, ForwardAttention(self._plan(layout), captured))

    def _fill_store(self, store: PagedIndex | None, num_rows: int) -> PagedIndex | None:
        """Write where a captured step stores, and return where it is written."""
        if self.captured_store is None:
            return None
        captured = PagedIndex(self.captured_store.page[:num_rows], self.captured_store.offset[:num_rows])
        captured.page.fill_(NULL_PAGE)
        if store is not None:
            captured.page[: len(store.page)] = store.page
            captured.offset[: len(store.offset)] = store.offset
        return captured

    def example(
        self, num_reqs: int, num_nodes: int, context_len: int, graph_rows: int | None = None
    ) -> dict[str, ForwardAttention]:
        """Return the metadata of a denoising step of nobody's canvases, over pages as they would be: all different.

        Args:
            num_reqs: requests.
            num_nodes: canvases of each.
            context_len: positions that each has stored.
            graph_rows: of a captured graph that is to be replayed; None: the step is run as it comes.
        """
        start = np.full(num_reqs, context_len)
        host = denoise_layout(start, start + self.block_length, num_nodes=num_nodes, block_length=self.block_length)
        pages_each = -(-context_len // self.page_size)
        page = torch.arange(num_reqs * pages_each, dtype=torch.int32, device=self.device) % self.num_pages
        page_table = page.view(num_reqs, pages_each)
        if graph_rows is None:
            return self.eager(host, page_table)
        # As wide as that of a batch: a captured graph finds all pages that a request may have.
        wide = torch.nn.functional.pad(page_table, (0, self.max_pages - pages_each))
        return self.graph(host, wide, graph_rows, None)
