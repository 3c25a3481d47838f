"""What each CTA of the CUDA kernel works on, and how many share a context: made on the host, once per step.

A *tile* is up to 64 queries of one request and one K/V head. A query is a row's vector of one head; those of a request
that share a K/V head are numbered row by row (csrc/include/dllm/draft_graph_attention.h).
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_dllm.arrays import Int32Array

if TYPE_CHECKING:
    from vllm_dllm.attention.layout import HostLayout

TILE_QUERIES = 64
TILE_FIELDS = 8
"""Request, its query that is the tile's first, its first and end row, the tile's first and end node; two are unused."""

LEAST_SPLIT, MAX_SPLITS = 128, 32
CTAS_PER_MULTIPROCESSOR = 2
H200_MULTIPROCESSORS = 132


def query_tiles(host: "HostLayout", heads_per_kv: int, num_rows: int | None = None) -> Int32Array:
    """Cut a forward's queries into tiles, [num_tiles, 8], in the order of the rows.

    Args:
        host: who sees whom.
        heads_per_kv: query heads that share a K/V head.
        num_rows: of the forward; those behind the layout's are nobody's and see nothing. None: there are no others.
    """
    bounds = host.first_row[host.first_node].astype(np.int64)  # rows of requests, and of nobody behind them
    bounds = np.append(bounds, bounds[-1] if num_rows is None else num_rows)
    num_tiles = -(-np.diff(bounds) * heads_per_kv // TILE_QUERIES)
    request = np.arange(len(num_tiles)).repeat(num_tiles)
    first_query = (np.arange(len(request)) - (np.cumsum(num_tiles) - num_tiles)[request]) * TILE_QUERIES
    first_row, end_row = bounds[request], bounds[request + 1]
    first = first_row + first_query // heads_per_kv
    last = np.minimum(first_row + (first_query + TILE_QUERIES - 1) // heads_per_kv, end_row - 1)
    first_node = np.searchsorted(host.first_row, first, "right") - 1
    end_node = np.searchsorted(host.first_row, last, "right")
    of_nobody = request == host.num_requests
    first_node[of_nobody] = end_node[of_nobody] = 0
    tiles = np.zeros((len(request), TILE_FIELDS), dtype=np.int32)
    tiles[:, :6] = np.stack([request, first_query, first_row, end_row, first_node, end_node], 1)
    return tiles


def max_num_tiles(num_rows: int, num_requests: int, block_length: int, heads_per_kv: int) -> int:
    """Return how many tiles rows may be cut into that are blocks of as many requests or fewer.

    Args:
        num_rows: of the forward, a multiple of `block_length`.
        num_requests: at most, those that hold padding included.
        block_length: rows of each node.
        heads_per_kv: query heads that share a K/V head.
    """
    num_blocks = num_rows // block_length
    of_block = block_length * heads_per_kv
    lost = TILE_QUERIES - math.gcd(of_block, TILE_QUERIES)  # queries that the last tile of a request lacks, at most
    return (num_blocks * of_block + min(num_requests, num_blocks) * lost) // TILE_QUERIES


def num_multiprocessors(device: torch.device) -> int:
    """Return those of a GPU; of another device those of an H200, to calculate with."""
    if device.type != "cuda":
        return H200_MULTIPROCESSORS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def num_splits(num_rows: int, num_heads: int, num_kv_heads: int, max_span: int, num_multiprocessors: int) -> int:
    """Return among how many CTAs a context is divided: as many as fill the GPU once.

    Args:
        num_rows: of the forward, or of the captured graph.
        num_heads, num_kv_heads: a K/V head has a CTA per tile and split.
        max_span: stored positions, from the first that a node sees to the last.
        num_multiprocessors: of the GPU.
    """
    num_tiles = -(-num_rows * (num_heads // num_kv_heads) // TILE_QUERIES)  # if all were full
    wanted = CTAS_PER_MULTIPROCESSOR * num_multiprocessors // max(1, num_tiles * num_kv_heads)
    return max(1, min(wanted, MAX_SPLITS, -(-max_span // LEAST_SPLIT)))


def workspace_bytes(head_dim: int, num_multiprocessors: int) -> int:
    """Return the most bytes that splits take to hand over their sums: they have no more queries than CTAs of a wave."""
    return 4 * CTAS_PER_MULTIPROCESSOR * num_multiprocessors * TILE_QUERIES * (head_dim + 2)
