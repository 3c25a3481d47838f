"""Policies that decide a part of a block at a time, and choose its end: AdaBlock and Deferred Commitment Decoding."""

import torch
from torch import Tensor

from vllm_dllm.unmask.memory import PolicyState, StateField
from vllm_dllm.unmask.parameter import Parameter
from vllm_dllm.unmask.torch_policy import Decision, Seen, TorchPolicy

MOST = 1024
"""Positions of a block."""


def _place(seen: Seen) -> Tensor:
    return torch.arange(seen.canvas.shape[1], device=seen.canvas.device)


def _first_masked(seen: Seen) -> Tensor:
    """Return the leftmost masked place of each canvas; [num_canvases] int64."""
    return seen.is_masked.byte().argmax(1)


def _reaching(seen: Seen, is_inside: Tensor) -> Tensor:
    """Return the open positions inside that reach the threshold, or the surest one inside."""
    is_open = seen.is_open & is_inside
    score = seen.confidence.masked_fill(~is_open, -torch.inf)
    surest = seen.highest(score, torch.ones_like(seen.step))
    return is_open & (surest | (seen.confidence >= seen.params.threshold[:, None]))


def _adablock(seen: Seen, state: PolicyState) -> Decision:
    """Begin a part where the one before is full: up to the surest delimiter ahead, or of a fixed length."""
    place, begin, values = _place(seen), _first_masked(seen), seen.values
    assert seen.params.own is not None, "these canvases have such a policy"
    length = seen.params.own.seq_len - seen.params.prompt_len
    ahead = (values["ahead"] * length.double()).long()
    is_ahead = (place >= begin[:, None]) & (place < (begin + ahead)[:, None])
    is_delimiter = is_ahead & (seen.token_ids == values["delimiter"].long()[:, None])
    sure, at = seen.confidence.masked_fill(~is_delimiter, -1.0).max(1)
    fixed = (begin + values["length"].long()).clamp(max=len(place))
    chosen = torch.where(is_delimiter.any(1) & (sure >= values["sure"]), at + 1, fixed)
    end = state["end"][:, 0, 0]
    end = torch.where(begin >= end, chosen, end)
    return Decision(seen.unmask(_reaching(seen, place < end[:, None])), {"end": end[:, None, None]})


def _deferred(seen: Seen, state: PolicyState) -> Decision:
    """Unmask inside the window; then it has as many masked positions again as at first, if that is not too long."""
    place, width = _place(seen), seen.values["width"].long()
    end = state["end"][:, 0, 0]
    end = torch.where(seen.step == 0, _first_masked(seen) + width, end).clamp(max=len(place))
    chosen = _reaching(seen, place < end[:, None])
    is_left = seen.is_masked & ~chosen
    begin = torch.where(is_left.any(1), is_left.byte().argmax(1), len(place))
    num_left = (is_left & (place < end[:, None])).sum(1)
    end = (end + width - num_left).minimum(begin + seen.values["most"].long())
    return Decision(seen.unmask(chosen), {"end": end[:, None, None]})


_END = {"end": StateField(1, torch.int64, 0, "block")}  # of the part or the window, in the block

ADABLOCK = TorchPolicy(
    _adablock,
    source="AdaBlock, arXiv:2509.26432",
    takes=("threshold",),
    parameters={
        "delimiter": Parameter(198, "the token that may end a part", high=2**31, is_whole=True),
        "sure": Parameter(0.3, "what its confidence has to reach"),
        "length": Parameter(32, "positions of a part without such a token", low=1, high=MOST, is_whole=True),
        "ahead": Parameter(0.25, "share of the generation in which it is looked for"),
    },
    state=_END,
)
DEFERRED = TorchPolicy(
    _deferred,
    source="DCD, arXiv:2601.02076",
    takes=("threshold",),
    parameters={
        "width": Parameter(16, "masked positions of the window", low=1, high=MOST, is_whole=True),
        "most": Parameter(128, "positions of the window, at most", low=1, high=MOST, is_whole=True),
    },
    state=_END,
)
