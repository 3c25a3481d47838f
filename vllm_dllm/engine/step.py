"""The requests of a batch that take a denoising step, and the rows that they have in its forward."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_dllm.attention.layout import HostLayout, PagedIndex, denoise_layout, empty_layout
from vllm_dllm.denoiser import Evaluated
from vllm_dllm.draft.look_ahead import NUM_NODES
from vllm_dllm.state.canvas import Blocks
from vllm_dllm.state.kv import BoolArray, IntArray
from vllm_dllm.unmask.walk import Nodes

NULL_PAGE = 0
"""vLLM's page that belongs to nobody: what is stored there is never read."""


@dataclass(slots=True)
class Group:
    """Requests of a step with equally many nodes: the evaluated canvases, then padding or the block to commit.

    Of a look-ahead the end comes before the evaluated canvases, so that it shares its context with what follows, and
    the next root is the last of them.
    """

    index_np: IntArray  # [num_reqs], in the batch
    index: Tensor | slice  # the same on the device
    blocks: Blocks
    block_length: int  # rows of a node
    num_scheduled: int  # rows of each request that vLLM counts
    num_nodes: int  # of each request in the forward; 0: its block is finished, nothing is left to compute
    num_drafts: int  # of each request, evaluated besides the root, without a look-ahead
    commits: bool  # whether the last node is the block before the present one, to be stored
    looks_ahead: bool  # whether the first node is the block's end, to be stored, and the last one the next root
    nodes: Nodes | None = None  # what is evaluated, once what must be stored before is stored
    came_over: Tensor | None = None  # [num_reqs] bool, whose look-ahead came true, once that is known

    @property
    def num_rows(self) -> int:
        """Rows in the forward."""
        return len(self.index_np) * self.num_nodes * self.block_length

    def evaluated(self, hidden: Tensor) -> Evaluated:
        """Return what was evaluated, of the group's rows [num_rows, hidden_size]."""
        assert self.nodes is not None, "the forward ran on them"
        first, num_evaluated = int(self.looks_ahead), 1 + self.num_drafts + self.looks_ahead
        if self.num_nodes != num_evaluated:
            by_node = hidden.unflatten(0, (-1, self.num_nodes, self.block_length))
            hidden = by_node[:, first : first + num_evaluated].flatten(0, 2)
        return Evaluated(self.blocks, self.nodes, hidden)

    @property
    def last_shift(self) -> int:
        """Positions by which the block of the last node lies behind the present one."""
        return self.block_length * (self.looks_ahead - self.commits)


@dataclass(slots=True)
class DenoiseStep:
    """The requests of a batch that take a denoising step, its first `num_reqs`; the arrays are in its order."""

    batch: InputBatch
    blocks: Blocks
    num_known: Tensor  # [num_reqs] int64, tokens; those behind `blocks.start` are the tail of a prompt
    block_start_np: IntArray  # [num_reqs], `blocks.start` on the host
    visible_end_np: IntArray  # [num_reqs], end of what the blocks see
    commits_np: BoolArray  # [num_reqs], who stores the block before
    num_refreshes: Tensor  # [num_reqs] int64, 0 or 1
    num_unmasked: Tensor  # [num_reqs] int64, positions, by the refresh
    num_stored: Tensor  # [num_reqs] int64, positions whose K/V were stored before the forward
    is_finished_np: BoolArray  # [num_reqs], by the refresh, as far as the host knows
    groups: list[Group] = field(default_factory=list)  # once that is known; the forward's rows are in their order
    store: PagedIndex | None = None  # [num_rows], where the forward stores K/V; None: nowhere

    @property
    def num_reqs(self) -> int:
        """Requests that take the step."""
        return len(self.block_start_np)

    def layout(self) -> HostLayout:
        """Say who sees whom."""
        groups = self._evaluated
        if not groups:
            return empty_layout()
        order = np.concatenate([group.index_np for group in groups])
        size = [len(group.index_np) for group in groups]
        return denoise_layout(
            self.block_start_np[order],
            self.visible_end_np[order],
            num_nodes=np.repeat([group.num_nodes for group in groups], size),
            block_length=groups[0].block_length,
            last_shift=np.repeat([group.last_shift for group in groups], size),
        )

    @property
    def num_rows(self) -> int:
        """Rows of the forward."""
        return sum(group.num_rows for group in self.groups)

    def split(self, hidden: Tensor) -> Iterator[tuple[Group, Tensor]]:
        """Yield the groups, and their rows of the forward's [num_rows, hidden_size]."""
        return zip(self.groups, hidden.split([group.num_rows for group in self.groups]), strict=True)

    def came_over(self) -> tuple[IntArray, IntArray]:
        """Return the slots and starts of the blocks that look-aheads stored; waits for the step if it had any."""
        has_left = np.zeros(self.num_reqs, dtype=bool)
        for group in self.groups:
            if group.came_over is not None:
                has_left[group.index_np] = group.came_over.cpu().numpy()
        return self.blocks.slots_np[has_left], self.block_start_np[has_left]

    def rows(self, page_table: Tensor, page_size: int, all_token_ids: Tensor) -> "Rows":
        """Return the rows of the forward, and keep where they are stored; arguments as in `rows_of`."""
        parts = [rows_of(group, page_table, page_size, all_token_ids) for group in self._evaluated]
        rows = Rows(*(torch.cat(of_groups) for of_groups in zip(*parts, strict=True)))
        if any(group.last_shift for group in self.groups):
            self.store = PagedIndex(rows.pages, rows.positions % page_size)
        return rows

    def page_table(self, of_batch: Tensor) -> Tensor:
        """Return the page table [num_reqs, max_pages] in the order of the forward's rows."""
        return torch.cat([of_batch[:0], *(of_batch[: self.num_reqs][group.index] for group in self._evaluated)])

    @property
    def _evaluated(self) -> list[Group]:
        return [group for group in self.groups if group.num_rows]


def split_groups(
    blocks: Blocks,
    num_rows: IntArray,
    commits: BoolArray,
    is_finished: BoolArray,
    *,
    block_length: int,
    max_drafts: int,
    look_ahead_from: int | None,
) -> Iterator[Group]:
    """Group the requests of a step: those that commit, which have no drafts yet, the others, and those without rows.

    Args:
        blocks: of the requests.
        num_rows: [num_reqs], that each was scheduled.
        commits: [num_reqs].
        is_finished: [num_reqs], whose block is finished before the forward; none of them commits.
        block_length: rows of a node.
        max_drafts: how many of the canvases besides the root are drafts at most, the others are padding.
        look_ahead_from: the smallest budget with a look-ahead; None: none has one.

    Raises: RuntimeError where the rows are not as many for all of a group, or no whole nodes, or too few to commit.
    """
    for is_commit, is_out in ((True, False), (False, False), (False, True)):
        index_np = np.flatnonzero((commits == is_commit) & (is_finished == is_out))
        if not len(index_np):
            continue
        nodes = int(num_rows[index_np[0]]) // block_length
        if (num_rows[index_np] != nodes * block_length).any() or nodes < 1 + is_commit:
            raise RuntimeError(
                f"vLLM scheduled {num_rows[index_np].tolist()} rows for requests that need the same multiple of "
                f"{block_length}, at least {1 + is_commit} of it; the token budget or max_model_len was changed behind "
                "the configuration"
            )
        is_all = len(index_np) == len(commits)
        index = slice(None) if is_all else torch.from_numpy(index_np).to(blocks.slots.device, non_blocking=True)
        of_group = Blocks(blocks.slots[index], blocks.slots_np[index_np], blocks.start[index])
        num_drafts = 0 if is_commit or is_out else min(nodes - 1, max_drafts)
        looks_ahead = look_ahead_from is not None and num_drafts >= look_ahead_from
        num_drafts -= NUM_NODES * looks_ahead
        num_nodes = 0 if is_out else nodes
        yield Group(
            index_np, index, of_group, block_length, nodes * block_length, num_nodes, num_drafts, is_commit, looks_ahead
        )


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
    if group.nodes.end is not None:
        canvas = torch.cat([group.nodes.end[:, None], canvas], 1)
    padding = canvas[:, :1].expand(-1, group.num_nodes - canvas.shape[1], -1)
    canvas = torch.cat([canvas, padding], 1)
    position = group.blocks.start[:, None] + torch.arange(group.block_length, device=canvas.device)
    positions = position[:, None].repeat(1, group.num_nodes, 1)
    positions[:, -1] += group.last_shift
    pages = torch.full_like(positions, NULL_PAGE)
    if group.commits:
        canvas[:, -1] = all_token_ids[group.blocks.slots[:, None], positions[:, -1]]
    if group.last_shift:
        stored = -1 if group.commits else 0
        pages[:, stored] = page_table[group.index].gather(1, positions[:, stored] // page_size)
    return Rows(canvas.flatten(), positions.flatten(), pages.flatten())
