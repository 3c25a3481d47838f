"""What policies keep of a block from step to step, and by what they decide then.

A policy with a memory names tensors of so many numbers per position of a block. They lie in the slot-indexed store
(`state.canvas`), are empty when a block begins, and change where the policy decides a canvas of it, refreshed or not: a
draft that did not come true changes nothing. Whether a draft came true is asked of its canvas alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from vllm_dllm.ops.vocab_stats import Distribution, PartialStats

if TYPE_CHECKING:
    from vllm_dllm.unmask.policy import PolicyParams

PolicyState = dict[str, Tensor]
"""Field -> [num_canvases, block_length, width], of what is kept once per block or request [num_canvases, 1, width];
empty where no policy of the batch has a memory."""


@dataclass(frozen=True, slots=True)
class StateField:
    """One tensor of a memory.

    Attributes:
        width: numbers per position, block or request; or what says so of a block length.
        dtype: of them.
        empty: what each is at first.
        per: what it is kept of. What is kept of positions and blocks is empty when a block begins; what is kept of a
            request, when it is admitted, and a request that comes back after a preemption goes on with what it had when
            its block began.
    """

    width: int | Callable[[int], int]
    dtype: torch.dtype
    empty: float
    per: Literal["position", "block", "request"] = "position"

    def new(self, num_canvases: int, block_length: int, device: torch.device) -> Tensor:
        """Return an empty one: [num_canvases, block_length or 1, width]."""
        width = self.width if isinstance(self.width, int) else self.width(block_length)
        shape = (num_canvases, block_length if self.per == "position" else 1, width)
        return torch.full(shape, self.empty, dtype=self.dtype, device=device)


@dataclass(frozen=True, slots=True)
class Shown:
    """What some canvases show to a policy with a memory."""

    rows: PartialStats  # [num_canvases * block_length], with `given_logits`
    given_ids: Tensor  # [num_canvases, block_length, num_given] int64, what `given_logits` are of
    is_masked: Tensor  # [num_canvases, block_length] bool
    is_open: Tensor  # [num_canvases, block_length] bool, those of the masked positions that the step may unmask


@dataclass(frozen=True, slots=True)
class Recalled:
    """What a policy makes of canvases by its memory."""

    token_ids: Tensor  # [num_canvases * block_length] int64, in place of the drawn ones
    distribution: Distribution  # [num_canvases * block_length], in place of the rows' own
    state: PolicyState  # when the canvases are decided


@dataclass(frozen=True, slots=True)
class Memory:
    """What a policy remembers.

    Attributes:
        fields: of its state.
        asks: the field with the ids whose logits it asks the head for, at every canvas of a step.
        knows: whether the rows say all that `recall` needs; [num_canvases] bool. They do at the root, since its state
            asked; a canvas where they do not is the next step's root.
        recall: what it makes of canvases, given its state before them.
    """

    fields: Mapping[str, StateField]
    asks: str
    knows: Callable[[Shown, PolicyState], Tensor]
    recall: Callable[[Shown, "PolicyParams", PolicyState], Recalled]


def select(where: Tensor, yes: PolicyState, no: PolicyState) -> PolicyState:
    """Take the states of `yes` where [num_canvases] bool says so, else those of `no`."""
    return {name: torch.where(where[:, None, None], yes[name], no[name]) for name in no}
