"""vLLM's own attention on a CPU, as a contestant."""

import torch
from torch import Tensor
from vllm import _custom_ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from benchmarks.kernels.attention import PAGE_SIZE, AttentionProblem


class VllmCpuAttention:
    """Each node is a sequence: the pages of its request's context, which nodes share, then pages of its own."""

    def __init__(self, problem: AttentionProblem) -> None:
        shape = problem.shape
        self._problem = problem
        self._out = torch.empty_like(problem.query)
        self._isa = _get_attn_isa(shape.dtype, PAGE_SIZE, shape.head_dim)
        self._page_tables = self._layout()
        num_pages = 1 + int(self._page_tables.max())
        cache = torch.zeros(num_pages, shape.num_kv_heads, 2 * PAGE_SIZE, shape.head_dim, dtype=shape.dtype)
        self._key_cache, self._value_cache = cache.chunk(2, dim=2)
        self._store()
        self._first_row = torch.arange(0, shape.num_rows + 1, shape.block_length, dtype=torch.int32)
        self._seq_lens = torch.full((shape.num_nodes,), shape.context_len + shape.block_length, dtype=torch.int32)
        self._schedule = _custom_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=shape.num_nodes,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            seq_lens=self._seq_lens,
            dtype=shape.dtype,
            query_start_loc=self._first_row,
            causal=False,
            sliding_window_size=-1,
            isa=self._isa,
            enable_kv_split=True,
        )

    def attend(self, number: int) -> Tensor:
        """Attend to the K/V of a data set; [num_rows, num_heads, head_dim]."""
        visible = (False, None, -1, self._page_tables[number])  # causal, ALiBi slopes, sliding window
        _custom_ops.cpu_attention_with_kv_cache(
            self._problem.query,
            self._key_cache,
            self._value_cache,
            self._out,
            self._first_row,
            self._seq_lens,
            self._problem.scale,
            *visible,
            softcap=0.0,
            scheduler_metadata=self._schedule,
            s_aux=None,
        )
        return self._out

    def _layout(self) -> Tensor:
        """Return page tables; [num_sets, num_nodes, pages of a context and of own rows] int32."""
        problem, shape = self._problem, self._problem.shape
        num_context_pages, num_own_pages = shape.context_len // PAGE_SIZE, -(-shape.block_length // PAGE_SIZE)
        num_stored = problem.num_sets * shape.num_requests * num_context_pages
        stored = torch.randperm(num_stored).int().view(problem.num_sets, shape.num_requests, num_context_pages)
        own = num_stored + torch.arange(shape.num_nodes * num_own_pages, dtype=torch.int32).view(-1, num_own_pages)
        by_node = stored.repeat_interleave(1 + shape.num_drafts, 1)
        return torch.cat([by_node, own.expand(problem.num_sets, -1, -1)], dim=2)

    def _store(self) -> None:
        """Fill the cache, whose inner order is the kernel's own."""
        problem, shape = self._problem, self._problem.shape
        context = torch.arange(shape.context_len)
        own = shape.context_len + torch.arange(shape.block_length)
        for number in range(problem.num_sets):
            key, value = problem.gather(number).chunk(2, dim=-1)
            by_request = self._page_tables[number, :: 1 + shape.num_drafts]
            self._store_rows(key, value, by_request, context)
        self._store_rows(problem.by_node(problem.key), problem.by_node(problem.value), self._page_tables[0], own)

    def _store_rows(self, key: Tensor, value: Tensor, page_table: Tensor, positions: Tensor) -> None:
        slots = page_table[:, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE
        _custom_ops.cpu_attn_reshape_and_cache(
            key.flatten(0, 1).contiguous(),
            value.flatten(0, 1).contiguous(),
            self._key_cache,
            self._value_cache,
            slots.flatten(),
            self._isa,
        )
