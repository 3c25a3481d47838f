"""Blocks that are not decoded but scored: their first step says how likely the tokens are that a request gives.

The step's rows are those of the root, in which a sample of `likelihood` has its masks. All masked positions take the
given tokens at once, whatever the policy would take, so the block ends with the step.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.arrays import to_device
from vllm_dllm.unmask.walk import Nodes, Trajectory


@dataclass(frozen=True, slots=True)
class Scored:
    """The requests of a batch whose blocks are scored."""

    place: Tensor  # [num_scored] int64, in the batch
    targets: Tensor  # [num_scored, block_length] int64

    def taken(self, nodes: Nodes, done: Trajectory) -> Trajectory:
        """Return what a step did where these take their targets."""
        place, is_masked = self.place, nodes.is_masked[self.place, 0]
        one, none = torch.ones_like(place), torch.zeros_like(place)
        canvas = torch.where(is_masked, self.targets, nodes.canvas[place, 0])
        path = torch.full_like(done.path[place], -1)
        path[:, 0] = 0
        of_those = {
            "canvas": canvas,
            "next_canvas": canvas,
            "path": path,
            "step": torch.where(is_masked, 0, -1),
            "node": none,
            "num_steps": one,
            "num_unmasked": is_masked.sum(1),
            "is_finished": one.bool(),
            "came_over": none.bool(),
        }
        put = {name: getattr(done, name).index_copy(0, place, its) for name, its in of_those.items()}
        return replace(done, **put)


class TargetState:
    """The tokens that the blocks of some slots are scored by, on the host: a request is there for a step.

    Args:
        block_length: positions per block.
        device: of what a step takes.
    """

    def __init__(self, block_length: int, device: torch.device) -> None:
        self._block_length, self._device = block_length, device
        self._tokens: dict[int, np.ndarray] = {}

    def put(self, slot: int, tokens: tuple[int, ...] | None) -> None:
        """Note what a slot's request is scored by, at most a block; None: it is decoded."""
        self._tokens.pop(slot, None)
        if tokens is not None:
            self._tokens[slot] = np.pad(np.array(tokens, dtype=np.int64), (0, self._block_length - len(tokens)))

    def is_scored(self, slots_np: np.ndarray) -> np.ndarray:
        """Tell whose blocks are scored, [num_reqs] bool."""
        return np.array([slot in self._tokens for slot in slots_np.tolist()], dtype=bool)

    def of(self, slots_np: np.ndarray) -> Scored | None:
        """Return those of a batch; None: nobody."""
        place = np.flatnonzero(self.is_scored(slots_np)) if self._tokens else np.zeros(0, dtype=np.int64)
        if not len(place):
            return None
        rows = np.stack([np.array([i, *self._tokens[int(slots_np[i])]]) for i in place.tolist()])
        packed = to_device(rows, self._device)
        return Scored(packed[:, 0], packed[:, 1:])
