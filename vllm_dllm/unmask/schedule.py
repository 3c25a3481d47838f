"""How a block is spread over steps: tables that a request takes along, made on the host when it is added.

Published decoders count steps. A table is read by what the canvas tells instead: the positions of the block that are
unmasked already. So the next canvas stays a function of the canvas, and a step that would unmask nothing is left out.

Sources: LLaDA `get_num_transfer_tokens` and SDAR for `even`; Dream `diffusion_generate` for `timesteps` and `origin`,
and Fast-dLLM v1's port of Dream (arXiv:2505.22618) for a block whose first step unmasks its first position alone.
"""

import functools
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from vllm_dllm.config import DllmConfig
    from vllm_dllm.models.interface import ModelFamily

LAST_TIME = 1e-3
"""Dream's `eps`: the time before which the last step begins."""


@dataclass(frozen=True, slots=True)
class UnmaskRules:
    """What a server fixes of unmasking, for all requests and policies; see `ModelFamily`.

    Attributes:
        schedule: how steps share a block.
        unmasks_first_alone: whether a block's first position is unmasked first, and alone.
        sub_block_length: of parts of a block that are unmasked one after another; None: it has none.
        confidence: the distribution that confidence, margin and entropy are of.
        eos_id: the token that ends a reply; -1: unknown.
        eot_id: the token that ends a turn; -1: none.
    """

    schedule: Literal["even", "timesteps"] = "even"
    unmasks_first_alone: bool = False
    sub_block_length: int | None = None
    confidence: Literal["model", "sampled"] = "model"
    eos_id: int = -1
    eot_id: int = -1

    @property
    def end_ids(self) -> tuple[int, int]:
        """Both."""
        return self.eos_id, self.eot_id

    def open(self, is_masked: Tensor) -> Tensor:
        """Return which masked positions a step may unmask: those of the leftmost stage of the block that has any.

        Args:
            is_masked: [num_canvases, block_length] bool.

        Returns: the same shape.
        """
        is_open = self.leftmost_part(is_masked)
        if not self.unmasks_first_alone:
            return is_open
        is_first = torch.zeros_like(is_masked[:1])
        is_first[:, 0] = True
        return is_open & (is_first | ~is_masked[:, :1])

    def leftmost_part(self, is_masked: Tensor) -> Tensor:
        """Return the masked positions of the leftmost part that has any; arguments and result as of `open`."""
        if self.sub_block_length is None:
            return is_masked
        part = torch.arange(is_masked.shape[1], device=is_masked.device) // self.sub_block_length
        return is_masked & (part == part[is_masked.byte().argmax(1)][:, None])


def unmask_rules(family: "ModelFamily", settings: "DllmConfig") -> UnmaskRules:
    """Return what a family fixes of unmasking; without Fast-dLLM's caches a block's first step is as the others."""
    first_alone = family.unmasks_first_alone and settings.unmasks_first_alone
    return UnmaskRules(family.schedule, first_alone, family.sub_block_length, family.confidence)


@functools.lru_cache
def count_table(rules: UnmaskRules, block_length: int, steps: int) -> tuple[int, ...]:
    """Return, by the number of positions that are unmasked already, how many the next step unmasks.

    Args:
        rules: of the server.
        block_length: positions of a block, and the length of the table.
        steps: of a block, 1..block_length.
    """
    if rules.schedule == "even":
        first = int(rules.unmasks_first_alone)
        share, rest = divmod(block_length - first, steps)
        counts = [first, *(share + (step < rest) for step in range(steps))]
    else:
        counts = _timestep_counts(block_length, steps, begins_alone=rules.unmasks_first_alone)
    return tuple(np.repeat(counts, counts).tolist())


@functools.lru_cache
def reveal_times(block_length: int, steps: int) -> tuple[float, ...]:
    """Return the times at which the steps of `origin` end, descending, 0 for the last one and behind it.

    Args: as of `count_table`, whose length it has.
    """
    times = _times(steps)[1:-1].tolist()
    return tuple(times + [0.0] * (block_length - len(times)))


def _times(steps: int) -> NDArray[np.float32]:
    """Return when each step begins and the last one ends, in the published dtype; [steps + 1]."""
    times: NDArray[np.float32] = torch.linspace(1, LAST_TIME, steps + 1).numpy()
    return times


def _timestep_counts(block_length: int, steps: int, *, begins_alone: bool) -> list[int]:
    """Return what Dream's steps unmask, in float32 as published, without those that unmask nothing."""
    counts = [1] if begins_alone else []
    left = block_length - len(counts)
    for begin, end in pairwise(_times(steps)[len(counts) : -1]):
        counts.append(int(np.float32(left) * (1 - end / begin)))
        left -= counts[-1]
    return [count for count in [*counts, left] if count]
