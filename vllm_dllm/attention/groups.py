"""Groups of rows that see the same stored positions: what libraries for paged or ragged attention take."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_dllm.arrays import BoolArray, Int32Array, IntArray, to_device
from vllm_dllm.attention.layout import ForwardLayout, HostLayout, PagedIndex


@dataclass(frozen=True, slots=True)
class ContextGroups:
    """Runs of nodes with one request and one context; on the host. Groups are in the order of their rows."""

    first_row: Int32Array  # [num_groups]
    num_rows: Int32Array  # [num_groups]
    request: Int32Array  # [num_groups]
    context: Int32Array  # [num_groups, 4], as in `HostLayout`
    context_len: Int32Array  # [num_groups]

    def where(self, is_wanted: BoolArray) -> "ContextGroups":
        """Return the groups that a mask [num_groups] marks."""
        return ContextGroups(
            self.first_row[is_wanted],
            self.num_rows[is_wanted],
            self.request[is_wanted],
            self.context[is_wanted],
            self.context_len[is_wanted],
        )

    @property
    def rows(self) -> IntArray:
        """The packed rows of all groups."""
        return ranges(self.first_row, self.num_rows)


def context_groups(layout: ForwardLayout) -> ContextGroups:
    """Find the groups of a layout that have rows."""
    host = layout.host
    request = np.arange(host.num_requests, dtype=np.int32).repeat(np.diff(host.first_node))
    seen = np.column_stack([request, host.context])[: host.num_nodes]
    begins = np.flatnonzero(np.r_[True, (seen[1:] != seen[:-1]).any(1)][: host.num_nodes])
    ends = np.r_[begins[1:], host.num_nodes].astype(np.int64)[: len(begins)]
    first_row = host.first_row[begins]
    num_rows = host.first_row[ends] - first_row
    groups = ContextGroups(first_row, num_rows, request[begins], host.context[begins], host.context_len[begins])
    return groups.where(num_rows > 0)


@dataclass(frozen=True, slots=True)
class OwnNodes:
    """The nodes of a layout that have rows and see them alike, causally or not; on the host."""

    is_causal: bool
    rows: IntArray | None  # packed rows, one node's after another's; None: those of all nodes, as they lie
    num_rows: Int32Array  # [num_nodes of these]


def own_nodes(host: HostLayout) -> tuple[OwnNodes, ...]:
    """Divide the nodes of a layout by how they see their own rows."""
    own_len, is_causal = host.own_len, host.is_causal != 0
    kinds = np.unique(is_causal[own_len > 0])
    if len(kinds) == 1:
        return (OwnNodes(bool(kinds[0]), None, own_len[own_len > 0]),)
    wanted = [(bool(kind), (is_causal == kind) & (own_len > 0)) for kind in kinds]
    return tuple(
        OwnNodes(kind, ranges(host.first_row[:-1][where], own_len[where]), own_len[where]) for kind, where in wanted
    )


def context_index(layout: ForwardLayout, groups: ContextGroups) -> PagedIndex:
    """Return the places of the groups' contexts, one after another, [sum(context_len)]."""
    device = layout.page_table.device
    total = int(groups.context_len.sum())
    table = np.column_stack([groups.request, groups.context, groups.context_len]).astype(np.int64)
    lengths = to_device(table, device)
    first = lengths[:, 5].cumsum(0) - lengths[:, 5]
    group = torch.repeat_interleave(lengths[:, 5], output_size=total)
    request, begin0, end0, begin1 = lengths[group, :4].unbind(1)
    number = torch.arange(total, device=device) - first[group]
    length = end0 - begin0
    position = torch.where(number < length, begin0 + number, begin1 - length + number)
    return PagedIndex(layout.page_table[request, position // layout.page_size].long(), position % layout.page_size)


def ranges(first: NDArray[Any], length: NDArray[Any]) -> IntArray:
    """Return the numbers from each `first` on, as many as `length` says, one range after another."""
    begin = np.cumsum(length, dtype=np.int64) - length
    number: IntArray = np.arange(length.sum(), dtype=np.int64) + (first - begin).repeat(length)
    return number
