"""What a step evaluates, as a value: *segments* of rows, from which all that its forward needs is derived.

A segment is some consecutive rows of one request that are evaluated together. They see each other (in a causal segment
each row itself and those before it), up to two intervals of the request's stored positions, and nothing else
(csrc/include/dllm/visible.h). A layer stores before it attends, so segments of a step see what others of the same step
store:

    role       positions                    sees of what is stored           its rows
    REFRESH    from where on K/V are new    those before it                  are stored; those of the block decide
    PREFILL    a block of the prompt, or    the positions before it          are stored; the last row may decide the
               all of it                                                     block's first position
    COMMIT     the block before             the blocks before it             as of PREFILL
    END        the block (look-ahead)       as ROOT                          are stored
    ROOT       the block, or its span       all but its positions; in a      decide
    DRAFT                                   block-causal model what is       decide
                                            before it
    NEXT_ROOT  the block behind             what is before it                decide
    VERIFY     a window of drafts           what is before it                are stored; decide
    TWIN       the sequence, its prompt     none                             guide those of a canvas
               masked
    DELAYED    from where on K/V are new    all of the sequence, each row    are stored, but for tokens that were known
                                            for itself                       before; those of the block decide

Host arrays throughout, numpy alone: who takes part, where blocks begin and how many drafts there are is known before
the forward, so that nothing waits for the device.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from vllm_dllm.arrays import BoolArray, IntArray
from vllm_dllm.attention.layout import HostLayout, host_layout
from vllm_dllm.draft.look_ahead import NUM_NODES, looking_ahead
from vllm_dllm.names import BIDIRECTIONAL, KvPolicyName
from vllm_dllm.state.kv import KvStep


class Role(IntEnum):
    """What a segment is for, in the order of a request's segments."""

    END = 0
    REFRESH = 1
    PREFILL = 2
    ROOT = 3
    DRAFT = 4
    NEXT_ROOT = 5
    COMMIT = 6
    VERIFY = 7
    DELAYED = 8
    TWIN = 9


_ROLES = np.arange(len(Role))
STORES = np.isin(_ROLES, [Role.END, Role.REFRESH, Role.PREFILL, Role.COMMIT, Role.VERIFY, Role.DELAYED])
_DECIDES = np.isin(_ROLES, [Role.REFRESH, Role.ROOT, Role.DRAFT, Role.NEXT_ROOT, Role.VERIFY, Role.DELAYED])
_IS_CANVAS = np.isin(_ROLES, [Role.ROOT, Role.DRAFT, Role.TWIN])
_HAS_BLOCK = _IS_CANVAS | np.isin(_ROLES, [Role.REFRESH, Role.DELAYED])  # and maybe more around it
_BLOCKS_BEHIND = np.array([0, 0, 0, 0, 0, 1, -1, 0, 0, 0])  # of a segment's block, as seen from the present one


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The segments of a step, those of a request one after another, requests in the order of the batch."""

    block_length: int
    block_start: IntArray  # [num_reqs], where each one's block begins
    num_drafts: IntArray  # [num_reqs], drafts of each, without a look-ahead
    looks_ahead: BoolArray  # [num_reqs]
    request: IntArray  # [num_segments]
    role: IntArray  # [num_segments]
    begin: IntArray  # [num_segments], first position
    end: IntArray  # [num_segments]
    context: IntArray  # [num_segments, 4], stored positions that are seen, [begin, end) twice, disjoint and ascending
    is_long: bool = False  # whether no captured CUDA graph has its shape, as `KvStep` says
    # [num_reqs], whose step stores and nothing else; its last row decides the block's first position
    stores_alone: BoolArray | None = None  # None: nobody's
    is_causal: BoolArray | None = (
        None  # [num_segments], where a row sees of its segment's those up to it; None: nowhere
    )
    prompt_len: IntArray | None = None  # [num_reqs], prompts of guided requests, 0 for the others; None: nobody is

    @property
    def num_reqs(self) -> int:
        """Requests that take the step."""
        return len(self.block_start)

    @property
    def first_row(self) -> IntArray:
        """Rows of segment s are [first_row[s], first_row[s + 1]); [num_segments + 1]."""
        return np.concatenate([[0], np.cumsum(self.end - self.begin)])

    @property
    def num_rows(self) -> int:
        """Rows of the forward."""
        return int((self.end - self.begin).sum())

    @property
    def rows_of_requests(self) -> IntArray:
        """Rows of each request, [num_reqs]."""
        rows = np.bincount(self.request, self.end - self.begin, self.num_reqs)
        return rows.astype(np.int64)

    def has(self, role: Role) -> BoolArray:
        """Tell which requests have a segment of a role, [num_reqs]."""
        found: BoolArray = np.bincount(self.request[self.role == role], minlength=self.num_reqs) > 0
        return found

    @property
    def stores(self) -> BoolArray:
        """Whose rows' K/V are written, [num_segments]."""
        return STORES[self.role]

    @property
    def num_stored(self) -> IntArray:
        """Positions of each request whose K/V are written whatever the step comes to, [num_reqs]."""
        length = (self.end - self.begin) * (self.stores & (self.role != Role.END))
        return np.bincount(self.request, length, self.num_reqs).astype(np.int64)

    @property
    def decides(self) -> BoolArray:
        """Of which segments the rows go to the LM head that predict the block, [num_segments]."""
        return _DECIDES[self.role] | self.decides_first

    @property
    def decides_first(self) -> BoolArray:
        """Which segments decide the first position of a block by their last row, [num_segments]."""
        if self.stores_alone is None:
            return np.zeros(len(self.role), dtype=bool)
        is_last = np.append(self.request[1:] != self.request[:-1], True)[: len(self.role)]
        found: BoolArray = is_last & self.stores_alone[self.request]
        return found

    @property
    def max_drafts(self) -> int:
        """Drafts of a request, at most."""
        return int(self.num_drafts.max(initial=0))

    @property
    def has_look_ahead(self) -> bool:
        """Whether any request looks ahead."""
        return bool(self.looks_ahead.any())

    @property
    def num_nodes(self) -> int:
        """Canvases of a request that decide, at most: the root, its drafts, the next root."""
        return 1 + self.max_drafts + self.has_look_ahead

    def layout(self) -> HostLayout:
        """Say what each segment sees; each row of a delayed one sees for itself, since others may be as stored."""
        length, context, request = self.end - self.begin, self.context, self.request
        is_apart = self.role == Role.DELAYED
        if is_apart.any():
            segment = np.arange(len(length)).repeat(np.where(is_apart, length, 1))
            length, is_apart, request = np.where(is_apart, 1, length)[segment], is_apart[segment], request[segment]
            position = np.arange(len(segment)) - np.searchsorted(segment, segment) + self.begin[segment]
            own = np.stack([np.zeros_like(position), position, position + 1, context[segment, 3]], 1)
            context = np.where(is_apart[:, None], own, context[segment])
        return host_layout(np.bincount(request, minlength=self.num_reqs), length, context, self.is_causal)

    @property
    def is_plain(self) -> bool:
        """Whether all requests have the root and equally many drafts, and nothing else: then all rows decide."""
        is_node = (self.role == Role.ROOT) | (self.role == Role.DRAFT)
        is_whole = self.end - self.begin == self.block_length
        is_ordered = self.is_causal is None or not self.is_causal.any()  # rows of windows are not
        return bool(is_ordered and (is_node & is_whole).all() and (self.num_drafts == self.num_drafts[:1]).all())

    @property
    def position(self) -> IntArray:
        """Of each row, [num_rows]."""
        length = self.end - self.begin
        return np.arange(length.sum()) - (self.first_row[:-1] - self.begin).repeat(length)

    def rows(self, *, logit_shift: bool = False) -> "PlanRows":
        """Say of each row what the device needs to know besides its position.

        Args:
            logit_shift: whether a position is predicted by the row on its left; where that is not in the segment, any
                row stands for it, see `CanvasState.predicting_rows`.
        """
        length, first_row = self.end - self.begin, self.first_row
        segment = np.arange(len(length)).repeat(length)
        decided = np.flatnonzero(self.decides)
        in_block = (self.block_start[self.request] - self.begin)[decided]
        has_block = _HAS_BLOCK[self.role[decided]]
        offset = np.arange(self.block_length)
        head = first_row[:-1][decided, None] + np.where(has_block, in_block, 0)[:, None] + offset - logit_shift
        last = first_row[1:][decided, None] - 1  # a short block has fewer rows than a canvas has positions
        head = np.where(self.decides_first[decided, None], last, head).clip(0, last)
        node, twins = self._nodes(decided), np.flatnonzero(self.role == Role.TWIN)
        prompt_len = np.zeros(self.num_reqs, dtype=np.int64) if self.prompt_len is None else self.prompt_len
        twin_of = np.flatnonzero(prompt_len[self.request[decided]])
        to_block = (self.block_start[self.request] - self.begin)[twins, None]
        last_of_twins = first_row[1:][twins, None] - 1  # as of `last`
        return PlanRows(
            request=self.request[segment],
            source=self._sources(node, segment, prompt_len, twin_of),
            is_stored=self.stores[segment] + (self.role == Role.DELAYED).astype(np.int64)[segment],
            head=head,
            is_left_fresh=has_block & (in_block > 0),
            node=node,
            twin_head=(first_row[:-1][twins, None] + to_block + offset - logit_shift).clip(max=last_of_twins),
            twin_of=twin_of,
        )

    def _nodes(self, decided: IntArray) -> IntArray:
        """Return which decided segment is which node of which request, -1 for none; [num_reqs, num_nodes]."""
        node = np.full((self.num_reqs, self.num_nodes), -1)
        request = self.request[decided]
        first = np.searchsorted(request, np.arange(self.num_reqs))
        number = np.arange(len(decided)) - first[request]
        number[self.role[decided] == Role.NEXT_ROOT] = self.num_nodes - 1
        node[request, number] = np.arange(len(decided))
        return node

    def _sources(self, node: IntArray, segment: IntArray, prompt_len: IntArray, twin_of: IntArray) -> IntArray:
        """Return where each row's token is, as `PlanRows.source`."""
        num_reqs, num_nodes, block_length = self.num_reqs, self.num_nodes, self.block_length
        number = np.zeros(len(self.request), dtype=np.int64)
        request, of_request = np.nonzero(node >= 0)
        decided = np.flatnonzero(self.decides)
        number[decided[node[request, of_request]]] = of_request
        number[self.role == Role.TWIN] = number[decided[twin_of]]
        first = (self.request * num_nodes + number) * block_length  # of the segment's canvas
        is_end = self.role == Role.END
        first[is_end] = (num_reqs * num_nodes + self.request[is_end]) * block_length
        role = self.role[segment]
        block = np.where(_HAS_BLOCK[self.role], self.block_start[self.request], self.begin)
        in_block = self.position - block[segment]
        source = first[segment] + in_block
        mask = (num_reqs * num_nodes + num_reqs * self.has_look_ahead) * block_length
        is_hidden = (role == Role.TWIN) & (self.position < prompt_len[self.request[segment]])
        is_known = (role == Role.PREFILL) | (role == Role.COMMIT) | (_HAS_BLOCK[role] & (in_block < 0))
        is_mask = is_hidden | (in_block >= block_length)
        return np.where(is_known & ~is_hidden, -1, np.where(is_mask, mask, source))


@dataclass(frozen=True, slots=True)
class PlanRows:
    """What each row of a plan is; in the order of the rows, nodes in that of the segments that decide."""

    request: IntArray  # [num_rows]
    # [num_rows], place of the token: among the canvases [num_reqs, num_nodes, block_length], then the ends [num_reqs,
    # block_length] if there is a look-ahead, then one mask; -1: the token at the position is known
    source: IntArray
    is_stored: IntArray  # [num_rows], 1 for those that are, 2 for those that are if `state.delayed` says so
    head: IntArray  # [num_decided, block_length], rows that predict the nodes' positions
    is_left_fresh: BoolArray  # [num_decided], whether the row left of the block is in the step, and so in the segment
    node: IntArray  # [num_reqs, num_nodes], of the decided; -1: the request has fewer nodes
    twin_head: IntArray  # [num_twins, block_length], rows of twins as `head` has those of nodes
    twin_of: IntArray  # [num_twins], of which decided segment each is


def plan_step(  # noqa: PLR0913 - what decides a step
    kv: KvStep,
    *,
    block_start: IntArray,
    seq_len: IntArray,
    num_drafts: IntArray,
    block_length: int,
    kv_policy: KvPolicyName,
    look_ahead_from: int | None = None,
    prompt_len: IntArray | None = None,
    is_next_open: BoolArray | None = None,
) -> StepPlan:
    """Make the plan of a step.

    Args:
        kv: what it stores.
        block_start, seq_len: [num_reqs], where blocks begin and rows end.
        num_drafts: [num_reqs], drafts that each may have; none where nothing of the block is known yet.
        block_length, kv_policy: of the server.
        look_ahead_from, is_next_open: as of `looking_ahead`.
        prompt_len: as in `StepPlan`.
    """
    num_reqs, is_causal = len(block_start), kv_policy not in BIDIRECTIONAL
    num_drafts = np.where(kv.is_undrafted, 0, num_drafts)
    looks_ahead = looking_ahead(num_drafts, look_ahead_from, is_next_open)
    num_drafts = num_drafts - NUM_NODES * looks_ahead
    num_stored = kv.end - kv.begin
    refreshes = (num_stored > 0) & (not is_causal)
    prefill_length = num_stored.clip(1) if kv_policy == "causal" else block_length
    num_prefills = num_stored // prefill_length * is_causal
    roots = ~refreshes & ~kv.stores_alone
    whole, delayed = refreshes & ~kv.is_delayed, refreshes & kv.is_delayed
    stored = [whole, num_prefills, roots, num_drafts, looks_ahead, kv.commits, np.zeros_like(roots), delayed]
    stored.append(np.zeros_like(roots) if prompt_len is None else (prompt_len > 0) * (1 + num_drafts))
    count = np.stack([looks_ahead, *stored], 1).astype(np.int64).ravel()
    request = np.arange(num_reqs).repeat(len(Role)).repeat(count)
    role = np.tile(_ROLES, num_reqs).repeat(count)
    first = (np.cumsum(count) - count).repeat(count)
    begin, end = _extents(kv, request, role, first, block_start, block_length, kv_policy)
    end = np.where(kv.is_short[request], np.minimum(end, seq_len[request]), end)
    begin = begin.clip(0)  # behind a reply that ended, a step that was scheduled before may find less than a block
    visible_end = end if is_causal else seq_len[request]
    context = np.stack([np.zeros_like(begin), begin, end, visible_end], 1)
    return StepPlan(
        block_length,
        block_start,
        num_drafts,
        looks_ahead,
        request,
        role,
        begin,
        end,
        context,
        is_long=bool(kv.is_long.any()),
        stores_alone=kv.stores_alone if kv.stores_alone.any() else None,
        is_causal=STORES[role] if kv_policy == "causal" else None,
        prompt_len=prompt_len,
    )


def _extents(
    kv: KvStep,
    request: IntArray,
    role: IntArray,
    first: IntArray,
    block_start: IntArray,
    block_length: int,
    kv_policy: KvPolicyName,
) -> tuple[IntArray, IntArray]:
    """Return the positions [begin, end) of segments, [num_segments] each.

    Args:
        kv: what the step stores.
        request, role: of the segments.
        first: [num_segments], the first one of the same request and role.
        block_start, block_length, kv_policy: as of `plan_step`.
    """
    begin = block_start[request] + block_length * _BLOCKS_BEHIND[role]
    end = begin + block_length
    is_prefill, is_refresh = role == Role.PREFILL, (role == Role.REFRESH) | (role == Role.DELAYED)
    if is_prefill.any() or is_refresh.any():
        number = np.arange(len(role)) - first  # among those of role and request
        begin = np.where(is_prefill, kv.begin[request] + block_length * number, begin)
        end = np.where(is_prefill, kv.end[request] if kv_policy == "causal" else begin + block_length, end)
        begin, end = np.where(is_refresh, kv.begin[request], begin), np.where(is_refresh, kv.end[request], end)
    if kv.is_wide.any():
        begin = np.where(_IS_CANVAS[role], kv.span_begin[request], begin)
        end = np.where(_IS_CANVAS[role], kv.span_end[request], end)
    return begin, end
