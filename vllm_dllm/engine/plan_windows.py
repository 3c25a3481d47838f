"""The plan of a step of windows: of self-speculation (`state.windows`), and of those that slide (`state.sliding`)."""

from collections.abc import Sequence

import numpy as np

from vllm_dllm.arrays import IntArray
from vllm_dllm.engine.plan import STORES, Role, StepPlan
from vllm_dllm.state.kv import KvStep


def plan_windows(
    kv: KvStep,
    *,
    start: IntArray,
    length: IntArray,
    block_length: int,
    drafts: Sequence[Sequence[int]] | None = None,
) -> StepPlan:
    """Make the plan of a step of windows: of each request one, as a ROOT, with drafts beside it, or verified.

    Args:
        kv: what it stores; a new request's prompt is a PREFILL, but for its last token, which is its first window.
        start, length: [num_reqs], of the windows.
        block_length: positions of a canvas.
        drafts: rows of the drafts of each request; None: there are none.
    """
    num_reqs, none = len(start), np.zeros_like(start)
    num_drafts = none if drafts is None else np.array([len(each) for each in drafts], dtype=np.int64)
    count = np.stack([kv.begin < start, ~kv.stores_alone, kv.stores_alone, num_drafts], 1).astype(np.int64).ravel()
    request = np.arange(num_reqs).repeat(4).repeat(count)
    role = np.tile([Role.PREFILL, Role.ROOT, Role.VERIFY, Role.DRAFT], num_reqs).repeat(count)
    is_prefill = role == Role.PREFILL
    begin = np.where(is_prefill, kv.begin[request], start[request])
    end = np.where(is_prefill, start[request], (start + length)[request])
    if drafts is not None:
        is_draft = role == Role.DRAFT
        end[is_draft] = begin[is_draft] + [rows for each in drafts for rows in each]
    context = np.stack([np.zeros_like(begin), begin, end, end], 1)
    return StepPlan(
        block_length,
        start,
        num_drafts,
        none > 0,
        request,
        role,
        begin,
        end,
        context,
        is_long=True,
        is_causal=STORES[role],
    )
