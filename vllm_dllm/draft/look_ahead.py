"""Drafts across a block's end, for block-causal models: the *look-ahead*.

A block sees the blocks before it once their K/V are stored, so its first step must wait for the block before to end;
unless that end is guessed. Of a step that looks ahead two canvases are none of the draft graph's:

- the *end*: the block, finished with its likeliest tokens. Its K/V are stored where those of the true block will be.
- the *next root*: the block behind it, all masked, which sees what the end has just stored.

If the step finishes the block, and as the end has it, the K/V that are stored are true, and the next root was the
decoder's next canvas: its statistics decide the first step of the next block, which the request *came over* to. Else
nobody reads these K/V before a later end, or the commit, overwrites them. So the guess decides what a step saves, never
a token.
"""

from typing import TYPE_CHECKING

import numpy as np

from vllm_dllm.arrays import BoolArray, IntArray

if TYPE_CHECKING:
    from vllm_dllm.config import DllmConfig

NUM_NODES = 2
"""Nodes of a budget that a look-ahead takes: the end and the next root."""
MIN_BUDGET = 5
"""Smallest budget with a look-ahead. In simulations of blocks of 4 and 8, one in place of the last two of five drafts
saved forwards for every policy, in place of fewer it did not."""
MAX_BLOCK_LENGTH = 8
"""Longest block with a look-ahead: the longer a block, the more rarely it ends, and as foreseen."""


def smallest_budget(settings: "DllmConfig", *, is_async: bool, stores_alone: bool = False) -> int | None:
    """Return the budget from which on steps look ahead; None where none does.

    Args:
        settings: of the server.
        is_async: whether steps are scheduled before it is known what the step before came to.
        stores_alone: whether a block begins with a step that only stores, to which a look-ahead does not reach.
    """
    is_served = settings.is_block_causal and settings.block_length <= MAX_BLOCK_LENGTH
    return MIN_BUDGET if is_served and not is_async and not stores_alone else None


def looking_ahead(num_drafts: IntArray, look_ahead_from: int | None, is_next_open: BoolArray | None) -> BoolArray:
    """Return which requests look ahead, [num_reqs].

    Args:
        num_drafts: [num_reqs], of each.
        look_ahead_from: the smallest number of drafts with a look-ahead; None: none has one.
        is_next_open: [num_reqs], of whom the next block begins all masked, as a next root is; None: of all.
    """
    if look_ahead_from is None:
        return np.zeros(len(num_drafts), dtype=bool)
    looks_ahead: BoolArray = num_drafts >= look_ahead_from
    return looks_ahead if is_next_open is None else looks_ahead & is_next_open
