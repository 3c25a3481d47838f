"""Partly filled answers: tokens that a request gives of its answer, its *pins*, which stay.

A pin is known from the beginning of its block on: it is in the canvas when the block begins. In a bidirectional model a
refresh of the sequence has the pins of the blocks behind, too. Which positions are pinned is known on the host, and a
step without such a request does nothing for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.arrays import BoolArray, IntArray, to_device

OPEN = -1
"""In place of a token: it is to be generated."""


@dataclass(frozen=True, slots=True)
class Pins:
    """What is given of an answer.

    Attributes:
        begin: absolute position behind the prompt.
        token_ids: [length] int64 from there on, `OPEN` where a token is to be generated; so it is behind them.
    """

    begin: int
    token_ids: IntArray

    @property
    def end(self) -> int:
        """Absolute position behind the last of `token_ids`."""
        return self.begin + len(self.token_ids)

    def of(self, first: int, length: int) -> IntArray:
        """Return what is given of some positions from an absolute one on; [length], `OPEN` where nothing is."""
        found = np.full(length, OPEN, dtype=np.int64)
        low, high = max(first, self.begin), min(first + length, self.end)
        if low < high:
            found[low - first : high - first] = self.token_ids[low - self.begin : high - self.begin]
        return found

    def count(self, first: int, length: int) -> int:
        """Return how many of some positions from an absolute one on are pinned."""
        return int((self.of(first, length) != OPEN).sum())

    def num_masked(self, start: int, block_length: int) -> int:
        """Return how many positions of the block at `start` are masked when it begins."""
        return block_length - max(0, self.begin - start) - self.count(start, block_length)


class PinState:
    """Pins of the requests in some slots.

    Args:
        block_length: positions per block.
        device: of canvases and rows.
    """

    def __init__(self, block_length: int, device: torch.device) -> None:
        self._block_length, self._device = block_length, device
        self._pins: dict[int, Pins] = {}
        self._begun: dict[int, tuple[int, int]] = {}  # of the block under way: where it begins, how many are pinned

    def put(self, slot: int, pins: Pins | None) -> None:
        """Replace a slot's pins by those of its next request."""
        self._begun.pop(slot, None)
        self._pins.pop(slot, None)
        if pins is not None:
            self._pins[slot] = pins

    def of(self, slots: IntArray) -> Iterator[tuple[int, Pins]]:
        """Yield the requests that have pins, by their place among some slots."""
        if self._pins:
            yield from ((i, self._pins[slot]) for i, slot in enumerate(slots.tolist()) if slot in self._pins)

    def begin(self, canvas: Tensor, slots: IntArray, start: IntArray) -> None:
        """Put the pins into the canvases of blocks that begin.

        A block has its pins from its first step on, and no later: a step that was scheduled behind it before its end
        was known still names it, and must leave the next one as it is.

        Args:
            canvas: [num_slots, block_length] int64, where what is not prompt is masked; written to.
            slots: [num_reqs], of the step's requests.
            start: [num_reqs], absolute position of each one's block.
        """
        rows = []
        for i, pins in self.of(slots):
            slot, block_start = int(slots[i]), int(start[i])
            if self._begun.get(slot, (OPEN, 0))[0] != block_start:
                own = pins.of(block_start, self._block_length)
                self._begun[slot] = block_start, int((own != OPEN).sum())
                rows.append([slot, *own.tolist()])
        if rows:
            packed = to_device(np.array(rows, dtype=np.int64), self._device)
            index, own_tokens = packed[:, 0], packed[:, 1:]
            canvas[index] = torch.where(own_tokens == OPEN, canvas[index], own_tokens)

    def known_end(self, prompt_len: Tensor, slots: IntArray, start: Tensor) -> Tensor:
        """Return where prompts end, as if they had as many positions more as the blocks under way have pins.

        Args:
            prompt_len: [num_reqs] int64.
            slots: [num_reqs].
            start: [num_reqs] int64, absolute position of each one's block.

        Returns: [num_reqs] int64; `prompt_len` where a block has no pins.
        """
        counts = {i: self._begun[int(slots[i])][1] for i, _ in self.of(slots)}
        if not counts:
            return prompt_len
        count = to_device(np.array([counts.get(i, 0) for i in range(len(slots))], dtype=np.int64), self._device)
        return torch.where(count > 0, torch.maximum(prompt_len, start) + count, prompt_len)

    def is_next_open(self, slots: IntArray, start: IntArray) -> BoolArray:
        """Tell of whom no position of the block behind the one at `start` is pinned; [num_reqs]."""
        is_open = np.ones(len(slots), dtype=bool)
        for i, pins in self.of(slots):
            is_open[i] = not pins.count(int(start[i]) + self._block_length, self._block_length)
        return is_open
