"""Attention of all nodes of all requests to their paged context and to their own rows."""

import torch
from torch import Tensor

from vllm_dllm.ops.load import check_one_device, require


def draft_graph_attention(  # noqa: PLR0913 - the arguments of the op, once per layer and step
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    first_node: Tensor,
    first_row: Tensor,
    context: Tensor,
    is_causal: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor | None = None,
    tiles: Tensor | None = None,
    num_splits: int = 1,
) -> None:
    """Attend from each row to its node's context and to its node's rows, into `out` and `lse`.

    A row's result does not depend on the other nodes and requests of the call, bit for bit. Rows behind the last
    request's nodes see nothing and get 0 and a log-sum-exp of -inf. Requests and nodes may be empty.

    Args:
        query: [num_rows, num_heads, head_dim] float32, float16 or bfloat16; head_dim 32..256, a multiple of 8.
        key, value: [num_rows, num_kv_heads, head_dim] of the same rows; num_kv_heads divides num_heads.
        kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_dim], keys before values; page_size 16..256. Read only
            where a context says so.
        page_table: [num_requests, max_pages] int32; entries that no context needs may be anything.
        first_node: [num_requests + 1] int32; the nodes of request r are [first_node[r], first_node[r + 1]).
        first_row: [num_nodes + 1] int32; the rows of node n are [first_row[n], first_row[n + 1]).
        context: [num_nodes, 4] int32, positions [begin, end) of two disjoint intervals in ascending order.
        is_causal: [num_nodes] int32; 1 where a row sees of its node's rows itself and those before it, 0 where all.
        scale: factor of the scores, positive.
        out: [num_rows, num_heads, head_dim], written.
        lse: [num_rows, num_heads] float32, written; natural logarithm.
        tiles: [num_tiles, 8] int32, as `attention.tiles.query_tiles` makes them; needed on CUDA alone.
        num_splits: CTAs that share a context, CUDA alone. Low bits of a row depend on it.

    All float tensors but `lse` are of one dtype. All tensors are contiguous in the last dimension, `context` and `lse`
    in both.

    Raises:
        KernelUnavailable: the op is not built for the device of `query`.
        RuntimeError: an argument breaks the rules above; the message names it. Values of the int32 tensors are checked
            on the CPU alone.
    """
    require("draft_graph_attention", query.device.type)
    layout = (page_table, first_node, first_row, context, is_causal)
    torch.ops.vllm_dllm.draft_graph_attention(query, key, value, kv_cache, *layout, scale, out, lse, tiles, num_splits)


def fake(*arguments: Tensor | float | None) -> None:
    """Return nothing: results go to `out` and `lse`."""
    check_one_device("draft_graph_attention", *(value for value in arguments if isinstance(value, Tensor)))
