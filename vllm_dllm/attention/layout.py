"""Index tensors of a forward: where each group of rows finds its context, and where it stores its own K/V.

A group is the rows of one request that see each other: the block of one node in a denoising step, everything from
`begin` on in a refresh. The nodes of a request share its context and do not see each other. A context is two intervals
of positions, [0, prefix_end) and [suffix_begin, suffix_end):

    denoise   0 ......... block_start |  own block  | block_end ......... row_len
              context                                 context
    refresh   0 ......... begin | own rows .............................. row_len
              context (empty when begin is 0)

Columns of the index tensors that stand for no position point at position 0, which every request has stored before it
attends, so that a hidden column never reads a page of somebody else.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PagedIndex:
    """Places in a paged K/V cache."""

    page: Tensor  # [...] int64
    offset: Tensor  # [...] int64, within the page


@dataclass(frozen=True, slots=True)
class Context:
    """The stored positions that groups see, `ForwardLayout.num_nodes` groups each."""

    index: PagedIndex  # [num_contexts, max_context_len]
    is_visible: Tensor  # [num_contexts, max_context_len] bool


@dataclass(frozen=True, slots=True)
class Ragged:
    """Groups of different lengths, as a padded rectangle over the packed rows."""

    row: Tensor  # [num_groups, max_own_len] int64, the packed row; any row where nothing is
    is_own: Tensor  # [num_groups, max_own_len] bool


@dataclass(frozen=True, slots=True)
class ForwardLayout:
    """All that attention needs to know of a forward, the same for every layer."""

    num_groups: int
    num_nodes: int  # groups that share a context, one after another
    context: Context | None  # None: no group has any
    ragged: Ragged | None  # None: groups of equal length, one after another
    store: PagedIndex | None  # [num_rows]; None: nothing is stored


def paged_index(page_table: Tensor, positions: Tensor, page_size: int) -> PagedIndex:
    """Look positions up in the page tables.

    Args:
        page_table: [num_groups, max_pages] int32, the pages of each group's request.
        positions: [num_groups, n] int64.
        page_size: positions per page.
    """
    page = page_table.gather(1, positions // page_size).long()
    return PagedIndex(page, positions % page_size)


class ContextBuffers:
    """Persistent context tensors, so that a captured CUDA graph finds every step's context at the same address."""

    def __init__(self, max_num_contexts: int, max_context_len: int, device: torch.device) -> None:
        shape = (max_num_contexts, max_context_len)
        self.page = torch.zeros(shape, dtype=torch.int64, device=device)
        self.offset = torch.zeros(shape, dtype=torch.int64, device=device)
        self.is_visible = torch.zeros(shape, dtype=torch.bool, device=device)

    def fill(
        self, page_table: Tensor, block_start: Tensor, row_len: Tensor, *, block_length: int, page_size: int, width: int
    ) -> None:
        """Write the denoising context of the given requests: their whole row but the block.

        Args:
            page_table: [num_reqs, max_pages] int32.
            block_start: [num_reqs] int64.
            row_len: [num_reqs] int64.
            block_length: positions per block.
            page_size: positions per page.
            width: columns to write, at least the longest context.
        """
        num_reqs = block_start.shape[0]
        column = torch.arange(width, device=block_start.device)
        is_visible = column < (row_len - block_length)[:, None]
        positions = torch.where(column < block_start[:, None], column, column + block_length)
        index = paged_index(page_table, positions.masked_fill_(~is_visible, 0), page_size)
        self.page[:num_reqs, :width] = index.page
        self.offset[:num_reqs, :width] = index.offset
        self.is_visible[:num_reqs, :width] = is_visible

    def clear(self, begin: int, end: int) -> None:
        """Empty the contexts [begin, end), the padding of a captured batch."""
        self.page[begin:end].zero_()
        self.offset[begin:end].zero_()
        self.is_visible[begin:end] = False

    def layout(self, num_contexts: int, num_nodes: int, width: int) -> ForwardLayout:
        """Return the layout of a denoising step in which `num_nodes` groups share each of the first contexts."""
        index = PagedIndex(self.page[:num_contexts, :width], self.offset[:num_contexts, :width])
        context = Context(index, self.is_visible[:num_contexts, :width])
        return ForwardLayout(num_contexts * num_nodes, num_nodes, context, None, None)


@dataclass(frozen=True, slots=True)
class RefreshRows:
    """Packed rows of a refresh: for each group the positions [begin, row_len)."""

    group: Tensor  # [num_rows] int64
    position: Tensor  # [num_rows] int64


def refresh_rows(begin: Tensor, row_len: Tensor, num_rows: int) -> RefreshRows:
    """Pack the rows of a refresh.

    Args:
        begin: [num_groups] int64.
        row_len: [num_groups] int64.
        num_rows: sum of `row_len - begin`, known to the host.
    """
    own_len = row_len - begin
    groups = torch.arange(begin.shape[0], device=begin.device)
    group = torch.repeat_interleave(groups, own_len, output_size=num_rows)
    first_row = own_len.cumsum(0) - own_len
    row = torch.arange(num_rows, device=begin.device)
    return RefreshRows(group, row - first_row[group] + begin[group])


def refresh_layout(
    page_table: Tensor, begin: Tensor, rows: RefreshRows, *, page_size: int, max_own_len: int, max_begin: int
) -> ForwardLayout:
    """Lay out a refresh: each group sees its stored positions before `begin` and its own rows, and stores the latter.

    Args:
        page_table: [num_groups, max_pages] int32.
        begin: [num_groups] int64.
        rows: the packed rows.
        page_size: positions per page.
        max_own_len: longest group, known to the host.
        max_begin: largest `begin`, known to the host.
    """
    num_groups, device = begin.shape[0], begin.device
    context = None
    if max_begin > 0:
        column = torch.arange(max_begin, device=device)
        is_visible = column < begin[:, None]
        positions = column.expand(num_groups, -1).masked_fill(~is_visible, 0)
        context = Context(paged_index(page_table, positions, page_size), is_visible)
    in_group = rows.position - begin[rows.group]
    place = rows.group * max_own_len + in_group
    row = torch.zeros(num_groups * max_own_len, dtype=torch.int64, device=device)
    is_own = torch.zeros(num_groups * max_own_len, dtype=torch.bool, device=device)
    row[place] = torch.arange(place.shape[0], device=device)
    is_own[place] = True
    ragged = Ragged(row.view(num_groups, -1), is_own.view(num_groups, -1))
    page = page_table[rows.group, rows.position // page_size].long()
    return ForwardLayout(num_groups, 1, context, ragged, PagedIndex(page, rows.position % page_size))
