"""The plan of a step of self-speculation (`state.windows`)."""

import numpy as np

from vllm_dllm.engine.plan import STORES, Role, StepPlan
from vllm_dllm.state.kv import IntArray, KvStep


def plan_windows(kv: KvStep, *, start: IntArray, length: IntArray, block_length: int) -> StepPlan:
    """Make the plan of a step of self-speculation: a window of each request, drafted as a ROOT or verified.

    Args:
        kv: what it stores; a new request's prompt is a PREFILL, but for its last token, which is its first window.
        start, length: [num_reqs], of the windows.
        block_length: positions of a canvas.
    """
    num_reqs, none = len(start), np.zeros_like(start)
    count = np.stack([kv.begin < start, ~kv.stores_alone, kv.stores_alone], 1).astype(np.int64).ravel()
    request = np.arange(num_reqs).repeat(3).repeat(count)
    role = np.tile([Role.PREFILL, Role.ROOT, Role.VERIFY], num_reqs).repeat(count)
    is_prefill = role == Role.PREFILL
    begin = np.where(is_prefill, kv.begin[request], start[request])
    end = np.where(is_prefill, start[request], (start + length)[request])
    context = np.stack([np.zeros_like(begin), begin, end, end], 1)
    return StepPlan(
        block_length, start, none, none > 0, request, role, begin, end, context, is_long=True, is_causal=STORES[role]
    )
