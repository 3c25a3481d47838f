"""Who sees whom in a forward, as the small tensors that attention takes, and where rows store their K/V.

A *node* is a segment of a step (`engine.plan`): packed rows that see each other (in a *causal* node each one itself and
those before it), and besides their *context*, two intervals of their request's stored positions, and nothing else
(csrc/include/dllm/visible.h):

    block     0 ......... block_start |  own block  | block_end ......... end of the sequence
              context                                 context (empty in a block-causal model)
    refresh   0 ......... begin | own rows .............................. end of the sequence
              context (empty when begin is 0)

A layer stores before it attends, so what the same forward stores is a part of the context.

Nodes of a request are consecutive and share its page table; rows of a node are consecutive. The host knows all lengths
before the forward, so a layout is made on the host and travels in one copy. Entries of a page table that no context
needs are never used.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.arrays import BoolArray, Int32Array, IntArray, to_device, write
from vllm_dllm.attention.tiles import TILE_FIELDS, max_num_tiles, query_tiles

_NO_TILES: Int32Array = np.zeros((0, TILE_FIELDS), dtype=np.int32)


@dataclass(frozen=True, slots=True)
class PagedIndex:
    """Places in a paged K/V cache."""

    page: Tensor  # [...] int64
    offset: Tensor  # [...] int64, within the page


@dataclass(frozen=True, slots=True)
class HostLayout:
    """Which rows make which node, which nodes make which request, and what they see; on the host."""

    first_node: Int32Array  # [num_requests + 1], nodes of request r are [first_node[r], first_node[r + 1])
    first_row: Int32Array  # [num_nodes + 1], rows of node n are [first_row[n], first_row[n + 1])
    context: Int32Array  # [num_nodes, 4], positions [begin, end) twice, disjoint and ascending
    is_causal: Int32Array  # [num_nodes], 1: a row sees of its node's rows itself and those before it; 0: all

    @property
    def num_requests(self) -> int:
        """Requests, empty ones included."""
        return len(self.first_node) - 1

    @property
    def num_nodes(self) -> int:
        """Nodes of all requests."""
        return len(self.first_row) - 1

    @property
    def own_len(self) -> Int32Array:
        """Rows of each node, [num_nodes]."""
        return np.diff(self.first_row)

    @property
    def context_len(self) -> Int32Array:
        """Stored positions that each node sees, [num_nodes]."""
        length: Int32Array = (self.context[:, 1::2] - self.context[:, ::2]).sum(1, dtype=np.int32)
        return length

    @property
    def span(self) -> int:
        """Stored positions from the first that a node sees to the last, of the node that has the most."""
        is_seen = self.context[:, 1::2] > self.context[:, ::2]
        begin = np.where(is_seen[:, 0], self.context[:, 0], self.context[:, 2])
        end = np.where(is_seen[:, 1], self.context[:, 3], self.context[:, 1])
        return int(np.where(is_seen.any(1) & (self.own_len > 0), end - begin, 0).max(initial=0))


@dataclass(frozen=True, slots=True)
class ForwardLayout:
    """All that attention needs to know of a forward, the same for every layer; fields as in `HostLayout`."""

    page_table: Tensor  # [num_requests, max_pages] int32
    first_node: Tensor  # [num_requests + 1] int32
    first_row: Tensor  # [num_nodes + 1] int32
    context: Tensor  # [num_nodes, 4] int32
    is_causal: Tensor  # [num_nodes] int32
    tiles: Tensor  # [num_tiles, 8] int32, as `query_tiles` makes them; none on a CPU
    max_span: int  # as `HostLayout.span`; of a captured CUDA graph: what its page table has room for; 0 on a CPU
    page_size: int  # positions per page
    host: HostLayout  # of a captured CUDA graph: that of the capture
    is_captured: bool = False  # whether a CUDA graph reads it


def host_layout(
    num_nodes: IntArray, own_len: IntArray, context: IntArray, is_causal: BoolArray | None = None
) -> HostLayout:
    """Lay out nodes, those of a request one after another.

    Args:
        num_nodes: [num_requests], of each.
        own_len: [num_nodes], rows of each.
        context: [num_nodes, 4], as in `HostLayout`.
        is_causal: [num_nodes], whether a row sees of its node's rows itself and those before it alone; None: none does.
    """
    return HostLayout(
        first_node=np.concatenate([[0], np.cumsum(num_nodes)]).astype(np.int32),
        first_row=np.concatenate([[0], np.cumsum(own_len)]).astype(np.int32),
        context=context.astype(np.int32),
        is_causal=np.zeros(len(own_len), dtype=np.int32) if is_causal is None else is_causal.astype(np.int32),
    )


def denoise_layout(block_start: IntArray, visible_end: IntArray, *, num_nodes: int, block_length: int) -> HostLayout:
    """Lay out canvases of requests alone: each sees what its request sees but the block, and itself.

    Args:
        block_start: [num_requests].
        visible_end: [num_requests], end of the positions that the block sees: of the sequence, or of the block itself.
        num_nodes: canvases of each request.
        block_length: positions per block.
    """
    intervals = [np.zeros_like(block_start), block_start, block_start + block_length, visible_end]
    context = np.stack(intervals, 1).repeat(num_nodes, 0)
    return host_layout(np.full(len(block_start), num_nodes), np.full(len(context), block_length), context)


def lone_layout(num_rows: int) -> HostLayout:
    """Lay out rows of nobody, which see each other and nothing stored."""
    return host_layout(np.ones(1, dtype=np.int64), np.array([num_rows]), np.zeros((1, 4), dtype=np.int64))


def empty_layout() -> HostLayout:
    """Lay out a step of no requests."""
    none = np.zeros(0, dtype=np.int64)
    return host_layout(none, none, none.reshape(0, 4))


def pad_layout(host: HostLayout, *, num_rows: int, num_requests: int, block_length: int) -> HostLayout:
    """Fill a denoising step up to a captured shape: padding nodes see only themselves.

    One more request holds them, and the requests after it are empty.

    Args:
        host: the step, of fewer than `num_requests` requests.
        num_rows: rows of the result, a multiple of `block_length`.
        num_requests: requests of the result.
        block_length: rows of each node.
    """
    num_nodes = num_rows // block_length
    first_node = np.full(num_requests + 1, num_nodes, dtype=np.int32)
    first_node[: len(host.first_node)] = host.first_node
    return HostLayout(
        first_node=first_node,
        first_row=np.arange(num_nodes + 1, dtype=np.int32) * np.int32(block_length),
        context=np.pad(host.context, ((0, num_nodes - host.num_nodes), (0, 0))),
        is_causal=np.pad(host.is_causal, (0, num_nodes - host.num_nodes)),
    )


def forward_layout(host: HostLayout, page_table: Tensor, page_size: int, heads_per_kv: int) -> ForwardLayout:
    """Copy a layout to the device of its page table, without waiting for the copy.

    Args:
        host: the layout.
        page_table: [num_requests, max_pages] int32.
        page_size: positions per page.
        heads_per_kv: query heads that share a K/V head.
    """
    device = page_table.device
    has_tiles = takes_tiles(device)
    tiles = query_tiles(host, heads_per_kv) if has_tiles else _NO_TILES
    packed = to_device(_pack(host, tiles), device)
    return _unpack(packed, host, len(tiles), page_table, page_size, host.span if has_tiles else 0)


def takes_tiles(device: torch.device) -> bool:
    """Tell whether kernels of a device are told which CTA takes which queries; not those of a CPU."""
    return device.type != "cpu"


class CapturedLayout:
    """Persistent tensors, so that a captured CUDA graph finds every step's layout at the same addresses.

    The number of rows alone decides the captured shape: as many nodes as blocks fit, and one request more than could
    take part, for the padding.
    """

    def __init__(
        self,
        *,
        max_num_requests: int,
        max_num_nodes: int,
        max_pages: int,
        block_length: int,
        heads_per_kv: int,
        device: torch.device,
    ) -> None:
        self._page_table = torch.zeros((max_num_requests + 1, max_pages), dtype=torch.int32, device=device)
        self._block_length, self._heads_per_kv = block_length, heads_per_kv
        most = 4 * max_num_nodes + (max_num_requests + 2) + (max_num_nodes + 1) + max_num_nodes
        most += TILE_FIELDS * max_num_tiles(
            max_num_nodes * block_length, max_num_requests + 1, block_length, heads_per_kv
        )
        self._packed = torch.zeros(most, dtype=torch.int32, device=device)

    def fill(self, host: HostLayout, page_table: Tensor, *, num_rows: int, page_size: int) -> ForwardLayout:
        """Write a denoising step, padded to a captured number of rows, and return where it is.

        Args:
            host: the step.
            page_table: [num_requests, max_pages or more] int32, of the step's requests.
            num_rows: rows of the captured graph, a multiple of the block length.
            page_size: positions per page.
        """
        num_requests = min(num_rows // self._block_length, len(self._page_table) - 1) + 1
        padded = pad_layout(host, num_rows=num_rows, num_requests=num_requests, block_length=self._block_length)
        pages = self._page_table[:num_requests]
        pages[: len(page_table)] = page_table[:, : pages.shape[1]]
        tiles = self._tiles(padded, num_rows)
        packed = _pack(padded, tiles)
        target = self._packed[: len(packed)]
        write(packed, target)
        layout = _unpack(target, padded, len(tiles), pages, page_size, pages.shape[1] * page_size)
        return replace(layout, is_captured=True)

    def _tiles(self, padded: HostLayout, num_rows: int) -> Int32Array:
        """Make the tiles, as many as the captured shape may need: those behind the last one have no rows."""
        if not takes_tiles(self._packed.device):
            return _NO_TILES
        most = max_num_tiles(num_rows, padded.num_requests, self._block_length, self._heads_per_kv)
        tiles = query_tiles(padded, self._heads_per_kv)
        return np.pad(tiles, ((0, most - len(tiles)), (0, 0)))


def _pack(host: HostLayout, tiles: Int32Array) -> Int32Array:
    """Put all arrays into one, context and tiles first, since kernels read them 16 bytes at a time."""
    return np.concatenate([host.context.ravel(), tiles.ravel(), host.first_node, host.first_row, host.is_causal])


def _unpack(
    packed: Tensor, host: HostLayout, num_tiles: int, page_table: Tensor, page_size: int, max_span: int
) -> ForwardLayout:
    arrays = (host.first_node, host.first_row, host.is_causal)
    sizes = [host.context.size, num_tiles * TILE_FIELDS, *map(len, arrays)]
    context, tiles, first_node, first_row, is_causal = packed.split(sizes)
    return ForwardLayout(
        page_table=page_table,
        first_node=first_node,
        first_row=first_row,
        context=context.view(-1, 4),
        is_causal=is_causal,
        tiles=tiles.view(-1, TILE_FIELDS),
        max_span=max_span,
        page_size=page_size,
        host=host,
    )
