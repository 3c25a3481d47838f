"""Two methods of vLLM's `BlockTables` for a CPU without Triton.

Their kernels get the tables of all KV-cache groups as addresses; the methods have the tensors themselves. Written for
vLLM 0.32 and 0.33: same attributes, one more parameter of `gather_block_tables` in 0.33.

vLLM's block is our page; its names are kept here because these are its methods.
"""

import inspect

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.block_table import BlockTables

from vllm_dllm.engine.cpu.binding import require_accepts
from vllm_dllm.engine.cpu.kernels import lens_of


def _require_plain(tables: BlockTables) -> None:
    """Reject cache layouts that no model of ours has, rather than read them wrongly."""
    has_windows = getattr(tables, "has_sliding_window_groups", False)
    if tables.cp_size != 1 or has_windows or not all(tables._slot_mapping_enabled):
        raise NotImplementedError(
            "A CPU without Triton supports plain paged KV caches only: no context parallelism, no sliding window, "
            "no group without slots."
        )


def gather_block_tables(
    self: BlockTables,
    idx_mapping: Tensor,
    num_reqs_padded: int,
    out: tuple[Tensor, ...] | None = None,
    out_ptrs: Tensor | None = None,
    num_computed_tokens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Copy the table rows of the batch, in batch order; the rows behind them become 0.

    Args:
        self: the tables of all slots.
        idx_mapping: [num_reqs] int64.
        num_reqs_padded: rows to return.
        out: per group [max_num_reqs, max_num_blocks] int32; the persistent input tables if absent.
        out_ptrs: addresses of `out`; unused.
        num_computed_tokens: [num_slots] int32, for sliding windows (0.33); unused.

    Returns: per group [num_reqs_padded, max_num_blocks] int32; entries past a request's own blocks are stale.
    """
    _require_plain(self)
    num_reqs = idx_mapping.shape[0]
    tables = tuple(self.input_block_tables) if out is None else out
    for source, table in zip(self.block_tables, tables, strict=True):
        torch.index_select(source.gpu, 0, idx_mapping, out=table[:num_reqs])
        table[num_reqs:].zero_()
    return tuple(table[:num_reqs_padded] for table in tables)


def compute_slot_mappings(
    self: BlockTables,
    idx_mapping: Tensor,
    query_start_loc: Tensor,
    positions: Tensor,
    num_tokens_padded: int,
    out: Tensor | None = None,
) -> Tensor:
    """Find the KV slot of each scheduled token; padding gets `PAD_SLOT_ID`.

    Args:
        self: the tables of all slots.
        idx_mapping: [num_reqs] int64; -1 marks a request without blocks, whose tokens count as padding.
        query_start_loc: [>= num_reqs + 1] int32.
        positions: [max_num_tokens] int64.
        num_tokens_padded: columns to return.
        out: [num_groups, max_num_tokens] int64; the persistent mapping if absent.

    Returns: [num_groups, num_tokens_padded] int64.
    """
    _require_plain(self)
    slot_mappings = self.slot_mappings if out is None else out
    num_reqs = idx_mapping.shape[0]
    cu_lens = query_start_loc.numpy()
    num_tokens = cu_lens[num_reqs]
    rows = np.repeat(idx_mapping.numpy(), lens_of(cu_lens, num_reqs))
    token_positions = positions.numpy()[:num_tokens]
    for group_slots, table, block_size in zip(slot_mappings.numpy(), self.block_tables, self.block_sizes, strict=True):
        block_idx, offset = np.divmod(token_positions, block_size)
        block_ids = table.gpu.numpy()[rows, block_idx].astype(np.int64)
        group_slots[:num_tokens] = np.where(rows >= 0, block_ids * block_size + offset, PAD_SLOT_ID)
        group_slots[num_tokens:] = PAD_SLOT_ID
    return slot_mappings[:, :num_tokens_padded]


METHODS = (gather_block_tables, compute_slot_mappings)


def install_methods() -> None:
    """Put the methods into `BlockTables`.

    Raises:
        RuntimeError: the installed vLLM gives one of them other parameters.
    """
    for method in METHODS:
        parameters = tuple(inspect.signature(getattr(BlockTables, method.__name__)).parameters)
        require_accepts(f"BlockTables.{method.__name__}", parameters, method)
    for method in METHODS:
        setattr(BlockTables, method.__name__, method)
