"""What requests ask of their logits, by slot, and what that comes to for the rows of a step.

Everything is a function of the canvas that a row is of, of the tokens before its block and of the request, so drafts
change nothing.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike
from torch import Tensor

from vllm_dllm.arrays import to_device, write
from vllm_dllm.unmask.edits import BadWords, Penalties, RowEdits
from vllm_dllm.unmask.walk import Keep, Nodes


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """What a request asks of its logits; nothing by default. Ids are of the vocabulary and not the mask token."""

    allowed_ids: tuple[int, ...] = ()  # empty: all
    bias: tuple[tuple[int, float], ...] = ()  # ids, and what is added to their logits
    end_ids: tuple[int, ...] = ()  # not allowed at the first `min_tokens` positions of the answer
    min_tokens: int = 0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that the answer may not have
    min_p: float = 0.0  # 0 keeps all; so it is for requests at temperature 0


NO_EDITS = LogitEdits()


class SlotTable:
    """Arrays by slot, padded to the largest of those that slots have; a slot has its own until the next request's.

    Args:
        num_slots: how many.
        dim: dimensions of a slot's array.
        padding: behind its ends.
        dtype: of NumPy.
        device: where `of` reads.
    """

    def __init__(self, num_slots: int, dim: int, padding: int, dtype: DTypeLike, device: torch.device) -> None:
        self._padding, self._device = padding, device
        self._host = np.full((num_slots, *[0] * dim), padding, dtype=dtype)
        self._shapes = np.zeros((num_slots, dim), dtype=np.int64)
        self.copy()

    def put(self, slot: int, values: ArrayLike) -> None:
        """Replace a slot's array."""
        array = np.asarray(values, dtype=self._host.dtype)
        self._shapes[slot] = array.shape if array.size else 0
        largest = self._shapes.max(0)
        if (largest != self._host.shape[1:]).any():
            kept = self._host[(slice(None), *map(slice, largest))]
            more = [(0, 0), *((0, new - old) for new, old in zip(largest, kept.shape[1:], strict=True))]
            self._host = np.pad(kept, more, constant_values=self._padding)  # a copy, so what was larger is freed
        self._host[slot] = self._padding
        if array.size:
            self._host[slot][tuple(map(slice, array.shape))] = array

    def copy(self) -> None:
        """Bring all arrays to the device."""
        self._tensor = to_device(self._host.copy(), self._device)  # a copy, since the host's changes

    def of(self, slots: Tensor, slots_np: np.ndarray) -> Tensor | None:
        """Return the arrays of some slots, [num_reqs, *shape]; None where all are empty."""
        shape = self._shapes[slots_np].max(0)
        if not shape.all():
            return None
        found = self._tensor[slots]
        for dim, size in enumerate(shape.tolist(), start=1):
            found = found.narrow(dim, 0, size)
        return found

    def has_any(self, slots: Tensor) -> Tensor:
        """Tell which of some slots have an array that is not empty; [num_reqs] bool."""
        return (self._tensor[slots] != self._padding).flatten(1).any(1)


class EditState:
    """Edits of up to `max_num_reqs` requests.

    Args:
        max_num_reqs: slots.
        block_length: positions per block.
        mask_token_id: pads lists of ids.
        device: of all tensors.
    """

    def __init__(self, max_num_reqs: int, block_length: int, mask_token_id: int, device: torch.device) -> None:
        self.block_length, self.mask_token_id, self.device = block_length, mask_token_id, device
        # [max_num_reqs, max_len] int32, the known tokens of each slot's request; None: nothing is before a block.
        self.history: Tensor | None = None
        self.is_edited_np = np.zeros(max_num_reqs, dtype=bool)
        ids = (max_num_reqs, 1, mask_token_id, np.int64, device)
        self._allowed, self._bias_ids, self._end_ids = SlotTable(*ids), SlotTable(*ids), SlotTable(*ids)
        self._bias = SlotTable(max_num_reqs, 1, 0, np.float32, device)
        self._words = SlotTable(max_num_reqs, 2, -1, np.int64, device)
        self._numbers_np = np.zeros((5, max_num_reqs))  # those of `_numbers_of`
        self._numbers = torch.zeros(5, max_num_reqs, dtype=torch.float64, device=device)
        self._is_staged = False

    def put(self, slot: int, edits: LogitEdits) -> None:
        """Stage a request's edits."""
        if edits == NO_EDITS and not self.is_edited_np[slot]:
            return
        self.is_edited_np[slot] = edits != NO_EDITS
        self._allowed.put(slot, edits.allowed_ids)
        self._bias_ids.put(slot, [token for token, _ in edits.bias])
        self._bias.put(slot, [added for _, added in edits.bias])
        self._end_ids.put(slot, edits.end_ids if edits.min_tokens else ())
        longest = max(map(len, edits.bad_words), default=0)
        words = [[*word, *[-1] * (longest - len(word))] for word in edits.bad_words]
        self._words.put(slot, np.array(words, dtype=np.int64).reshape(len(words), longest))
        self._numbers_np[:, slot] = [
            edits.repetition - 1,
            edits.frequency,
            edits.presence,
            edits.min_tokens,
            edits.min_p,
        ]
        self._is_staged = True

    def apply_staged_writes(self) -> None:
        """Copy what was staged to the device."""
        if self._is_staged:
            for table in (self._allowed, self._bias_ids, self._bias, self._end_ids, self._words):
                table.copy()
            write(self._numbers_np, self._numbers)
            self._is_staged = False

    def rows(self, slots: Tensor, slots_np: np.ndarray, scene: "Scene") -> tuple[RowEdits, Keep | None]:
        """Return the edits of a step's rows, in the order of canvases, positions, and what keeps bad words away.

        Args:
            slots: [num_reqs] int64, of the requests.
            slots_np: the same on the host.
            scene: their canvases.
        """
        num_canvases = len(scene.canvas)
        canvas = torch.arange(num_canvases, device=slots.device).repeat_interleave(self.block_length)
        of = scene.request
        is_edited = to_device(self.is_edited_np[slots_np], self.device)
        allowed, bias_ids, bias = (table.of(slots, slots_np) for table in (self._allowed, self._bias_ids, self._bias))
        numbers, numbers_np = self._numbers[:, slots][:, of], self._numbers_np[:, slots_np]
        bad_words = self._bad_words(slots, slots_np, scene)
        barred = [] if bad_words is None else [bad_words.barred()]
        if (end_ids := self._end_ids.of(slots, slots_np)) is not None:
            is_early = scene.position < (scene.prompt_len + numbers[3].long())[:, None]
            barred.append(torch.where(is_early[:, :, None], end_ids[of][:, None], self.mask_token_id))
        edits = RowEdits(
            canvas,
            is_edited[of][canvas],
            bool(self.is_edited_np[slots_np].all()),
            None if allowed is None else (allowed[of], self._allowed.has_any(slots)[of]),
            None if bias_ids is None or bias is None else (bias_ids[of], bias[of]),
            self._penalties(numbers, scene) if numbers_np[:3].any() else None,
            torch.cat(barred, 2).flatten(0, 1) if barred else None,
            numbers[4][canvas] if numbers_np[4].any() else None,
        )
        return edits, None if bad_words is None else scene.keep(bad_words)

    def _penalties(self, numbers: Tensor, scene: "Scene") -> Penalties:
        line = scene.line(self.history)
        is_answer = torch.arange(line.shape[1], device=line.device) >= scene.prompt_len[:, None]
        answer = torch.where(is_answer, line, self.mask_token_id)
        ordered, line = answer.sort(1).values, line.contiguous()
        count = torch.searchsorted(ordered, line, right=True) - torch.searchsorted(ordered, line)
        repetition, frequency, presence = numbers[:3].float()
        return Penalties(line, count.float(), 1 + repetition, frequency, presence)

    def _bad_words(self, slots: Tensor, slots_np: np.ndarray, scene: "Scene") -> BadWords | None:
        words = self._words.of(slots, slots_np)
        if words is None:
            return None
        line = scene.line(self.history)
        around = words.shape[2] - 1
        index = torch.arange(-around, self.block_length + around, device=line.device) + scene.start[:, None]
        is_answer = (index >= scene.prompt_len[:, None]) & (index < line.shape[1])
        window = line.gather(1, index.clamp(0, line.shape[1] - 1))
        return BadWords(words[scene.request], torch.where(is_answer, window, self.mask_token_id), self.mask_token_id)


@dataclass(frozen=True, slots=True)
class Scene:
    """The evaluated canvases of a step, and what is known around them."""

    nodes: Nodes
    request: Tensor  # [num_canvases] int64
    slots: Tensor  # [num_canvases] int64
    canvas: Tensor  # [num_canvases, block_length] int64
    begin: Tensor  # [num_canvases] int64, absolute position of the request's block
    start: Tensor  # [num_canvases] int64, that of the canvas: a block behind for a next root, behind a draft's front
    # [num_canvases, n] int64, what the canvas's draft knows from `begin` on up to it, the mask token for all else
    front: Tensor | None
    prompt_len: Tensor  # [num_canvases] int64
    seq_len: Tensor  # [num_canvases] int64
    longest: int  # at least the longest `seq_len`
    mask_token_id: int

    @property
    def position(self) -> Tensor:
        """[num_canvases, block_length] int64, absolute."""
        return self.start[:, None] + torch.arange(self.canvas.shape[1], device=self.start.device)

    def line(self, history: Tensor | None) -> Tensor:
        """Return the known tokens of each canvas's sequence; [num_canvases, length] int64, else the mask token.

        Args:
            history: [max_num_reqs, max_len], known tokens; None: none.
        """
        block_length = self.canvas.shape[1]
        index = torch.arange(self.longest + 2 * block_length, device=self.start.device)
        line = index.new_full((len(self.canvas), len(index)), self.mask_token_id)
        if history is not None:
            num_kept = min(len(index), history.shape[1])
            line[:, :num_kept] = history[self.slots, :num_kept].long()
            line.masked_fill_(index >= self.begin[:, None], self.mask_token_id)
        if self.front is not None:
            line.scatter_(1, self.begin[:, None] + index[: self.front.shape[1]], self.front)
        line.scatter_(1, self.position, self.canvas)
        return line.masked_fill_(index >= self.seq_len[:, None], self.mask_token_id)

    def keep(self, words: BadWords) -> Keep:
        """Return which of the chosen positions of a node of each request are unmasked: no word is completed."""
        num_reqs, num_nodes, _ = self.nodes.canvas.shape
        request = torch.arange(num_reqs, device=self.start.device)

        def keep(node: Tensor, chosen: Tensor, _score: Tensor, tokens: Tensor) -> Tensor:
            evaluated = self.nodes.evaluated
            of = request * num_nodes + node if evaluated is None else evaluated[request, node].clamp(min=0)
            return chosen & ~words.of(of).held(tokens, chosen)

        return keep


def scene_of(
    nodes: Nodes, slots: Tensor, start: Tensor, prompt_len: Tensor, seq_len: Tensor, longest: int, mask_token_id: int
) -> Scene:
    """Lay out the evaluated canvases of a step.

    Args:
        nodes: the canvases of the requests.
        slots: [num_reqs] int64.
        start: [num_reqs] int64, absolute position of each one's block.
        prompt_len: [num_reqs] int64.
        seq_len: [num_reqs] int64.
        longest: the longest of these.
        mask_token_id: what stands for masked.
    """
    num_reqs, num_nodes, block_length = nodes.canvas.shape
    request = torch.arange(num_reqs, device=slots.device)[:, None].expand(num_reqs, num_nodes)
    begin = start[:, None].repeat(1, num_nodes)
    if nodes.end is not None:
        begin[:, -1] += block_length
    of, own, canvas = (nodes.per_evaluated(each.contiguous()) for each in (request, begin, nodes.canvas))
    first, front = start[of], None
    if nodes.end is not None:
        front = torch.where((own > first)[:, None], nodes.end[of], mask_token_id)
    lengths = prompt_len[of], seq_len[of]
    return Scene(nodes, of, slots[of], canvas, first, own, front, *lengths, longest, mask_token_id)
