"""The requests of a batch that take a denoising step, and the rows that they have in its forward."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_dllm.attention.layout import HostLayout, PagedIndex, denoise_layout
from vllm_dllm.denoiser import Nodes
from vllm_dllm.state.canvas import Blocks
from vllm_dllm.state.kv import BoolArray, IntArray

NULL_PAGE = 0
"""vLLM's page that belongs to nobody: what is stored there is never read."""


@dataclass(slots=True)
class Group:
    """Requests of a step with equally many nodes: the evaluated canvases, then padding or the block to commit."""

    index_np: IntArray  # [num_reqs], in the batch
    index: Tensor | slice  # the same on the device
    blocks: Blocks
    block_length: int  # rows of a node
    num_nodes: int  # of each request in the forward
    num_drafts: int  # of each request, evaluated besides the root
    commits: bool  # whether the last node is the block before the present one, to be stored
    nodes: Nodes | None = None  # what is evaluated, once what must be stored before is stored

    @property
    def num_rows(self) -> int:
        """Rows in the forward."""
        return len(self.index_np) * self.num_nodes * self.block_length

    def evaluated(self, hidden: Tensor) -> Tensor:
        """Take the rows of the evaluated canvases out of the group's rows [num_rows, ...]."""
        if self.num_nodes == 1 + self.num_drafts:
            return hidden
        by_node = hidden.unflatten(0, (-1, self.num_nodes, self.block_length))
        return by_node[:, : 1 + self.num_drafts].flatten(0, 2)


@dataclass(slots=True)
class DenoiseStep:
    """The requests of a batch that take a denoising step, its first `num_reqs`; the arrays are in its order."""

    batch: InputBatch
    blocks: Blocks
    num_known: Tensor  # [num_reqs] int64, tokens; those behind `blocks.start` are the tail of a prompt
    block_start_np: IntArray  # [num_reqs], `blocks.start` on the host
    visible_end_np: IntArray  # [num_reqs], end of what the blocks see
    groups: list[Group]  # the forward's rows are in their order
    num_refreshes: Tensor  # [num_reqs] int64, 0 or 1
    num_unmasked: Tensor  # [num_reqs] int64, positions, by the refresh
    store: PagedIndex | None = None  # [num_rows], where the forward stores K/V; None: nowhere

    @property
    def num_reqs(self) -> int:
        """Requests that take the step."""
        return len(self.block_start_np)

    def layout(self) -> HostLayout:
        """Say who sees whom."""
        order = np.concatenate([group.index_np for group in self.groups])
        size = [len(group.index_np) for group in self.groups]
        return denoise_layout(
            self.block_start_np[order],
            self.visible_end_np[order],
            num_nodes=np.repeat([group.num_nodes for group in self.groups], size),
            block_length=self.groups[0].block_length,
            commits=np.repeat([group.commits for group in self.groups], size),
        )

    @property
    def num_rows(self) -> int:
        """Rows of the forward."""
        return sum(group.num_rows for group in self.groups)

    def split(self, hidden: Tensor) -> Iterator[tuple[Group, Tensor]]:
        """Yield the groups that have rows, and their rows of the forward's [num_rows, hidden_size]."""
        rows = hidden.split([group.num_rows for group in self.groups])
        return ((group, of_group) for group, of_group in zip(self.groups, rows, strict=True) if len(of_group))

    def rows(self, page_table: Tensor, page_size: int, all_token_ids: Tensor) -> "Rows":
        """Return the rows of the forward, and keep where they are stored; arguments as in `rows_of`."""
        parts = [rows_of(group, page_table, page_size, all_token_ids) for group in self.groups]
        rows = Rows(*(torch.cat(of_groups) for of_groups in zip(*parts, strict=True)))
        if any(group.commits for group in self.groups):
            self.store = PagedIndex(rows.pages, rows.positions % page_size)
        return rows

    def page_table(self, of_batch: Tensor) -> Tensor:
        """Return the page table [num_reqs, max_pages] in the order of the forward's rows."""
        return torch.cat([of_batch[: self.num_reqs][group.index] for group in self.groups])


def split_groups(
    blocks: Blocks, num_rows: IntArray, commits: BoolArray, *, block_length: int, max_drafts: int
) -> Iterator[Group]:
    """Group the requests of a step: those that commit, which have no drafts yet, and the others.

    Args:
        blocks: of the requests.
        num_rows: [num_reqs], that each was scheduled.
        commits: [num_reqs].
        block_length: rows of a node.
        max_drafts: how many of the canvases besides the root are drafts at most, the others are padding.

    Raises: RuntimeError where the rows are not as many for all of a group, or no whole nodes, or too few to commit.
    """
    for is_commit in (True, False) if commits.any() else (False,):
        index_np = np.flatnonzero(commits == is_commit)
        if not len(index_np) and len(commits):
            continue
        nodes = int(num_rows[index_np[0]]) // block_length if len(index_np) else 1
        if (num_rows[index_np] != nodes * block_length).any() or nodes < 1 + is_commit:
            raise RuntimeError(
                f"vLLM scheduled {num_rows[index_np].tolist()} rows for requests that need the same multiple of "
                f"{block_length}, at least {1 + is_commit} of it; the token budget or max_model_len was changed behind "
                "the configuration"
            )
        is_all = len(index_np) == len(commits)
        index = slice(None) if is_all else torch.from_numpy(index_np).to(blocks.slots.device, non_blocking=True)
        of_group = Blocks(blocks.slots[index], blocks.slots_np[index_np], blocks.start[index])
        num_drafts = 0 if is_commit else min(nodes - 1, max_drafts)
        yield Group(index_np, index, of_group, block_length, nodes, num_drafts, is_commit)


class Rows(NamedTuple):
    """Rows of a forward; each [num_rows] int64."""

    input_ids: Tensor
    positions: Tensor
    pages: Tensor  # where their K/V go


def rows_of(group: Group, page_table: Tensor, page_size: int, all_token_ids: Tensor) -> Rows:
    """Return the rows of a group.

    Args:
        group: with its nodes.
        page_table: [num_reqs or more, max_pages] int32, of the step.
        page_size: positions per page.
        all_token_ids: [num_slots, max_model_len], the known tokens.
    """
    assert group.nodes is not None, "the nodes are made before the rows"
    canvas = group.nodes.canvas
    padding = canvas[:, :1].expand(-1, group.num_nodes - canvas.shape[1], -1)
    canvas = torch.cat([canvas, padding], 1)
    position = group.blocks.start[:, None] + torch.arange(group.block_length, device=canvas.device)
    positions = position[:, None].repeat(1, group.num_nodes, 1)
    pages = torch.full_like(positions, NULL_PAGE)
    if group.commits:
        before = position - group.block_length
        canvas[:, -1] = all_token_ids[group.blocks.slots[:, None], before]
        positions[:, -1] = before
        pages[:, -1] = page_table[group.index].gather(1, before // page_size)
    return Rows(canvas.flatten(), positions.flatten(), pages.flatten())
