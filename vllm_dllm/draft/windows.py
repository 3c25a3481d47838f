"""Drafts of windows that slide (`state.sliding`): a chain, as `reference.wedlm_spiffy` has it.

The masked positions that a step left are ordered by its entropies, with the penalty; draft k knows the first k of them,
each with the token that its step would choose from the same logits if it came alone. What came into the window since
has no logits, and is in no draft.

The order is known when the step ends, and with it how many positions each draft knows at its front. It travels with
the report of the window (`with_order`), so that the scheduler knows what rows drafts need, and which mean something.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.draft.calibrated import DEPTH_CHANCE
from vllm_dllm.draft.propose import drawn_tokens
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.drafts import DraftState
from vllm_dllm.unmask.stats import Candidates
from vllm_dllm.unmask.walk import Nodes
from vllm_dllm.unmask.windows import num_at_front

_OPEN = -1
"""Stands for a masked position that is in no draft; the k-th draft's is this minus k."""


class WindowDrafter:
    """Makes the chains of windows.

    Args:
        max_drafts: of a window.
    """

    look_ahead_from: int | None = None

    def __init__(self, max_drafts: int) -> None:
        self._max_drafts = max_drafts
        self.memory: DraftState | None = None

    def prior(self) -> list[float]:
        """Return how many transitions the first drafts of a chain are expected to save: each depends on all before."""
        return [0.0, *accumulate(DEPTH_CHANCE**depth for depth in range(1, self._max_drafts + 1))]

    def attach(self, canvases: CanvasState) -> None:
        """Make room for the candidates of every slot, and for the order of its positions."""
        self._canvases = canvases
        self.memory = DraftState(canvases)
        self._rank = torch.zeros_like(canvases.canvas)

    @property
    def _kept(self) -> DraftState:
        assert self.memory is not None, "attach comes before"
        return self.memory

    def observe(self, slots: Tensor, penalised: Tensor, candidates: Candidates, shift: Tensor) -> None:
        """Take note of the windows that a step decided last, in the places that they have in the next ones.

        Args:
            slots: [num_reqs] int64.
            penalised: [num_reqs, window] float64, entropies of what is masked behind the step, infinite elsewhere.
            candidates: [num_reqs, window, num_candidates], of the windows.
            shift: [num_reqs] int64, by how many positions the next windows begin behind these.
        """
        window = penalised.shape[1]
        index = torch.arange(window, device=slots.device) + shift[:, None]
        is_left, index = index < window, index.clamp(max=window - 1)
        ordered = penalised.argsort(dim=1, stable=True)
        rank = ordered.argsort(1).gather(1, index)
        of_tokens = index[..., None].expand(-1, -1, candidates.token_ids.shape[2])
        moved = Candidates(candidates.token_ids.gather(1, of_tokens), candidates.log_probs.gather(1, of_tokens))
        self._rank[slots] = rank
        self._kept.put(slots, moved, is_left & penalised.gather(1, index).isfinite())

    def turns(self, slots: Tensor) -> Tensor:
        """Return which draft of the present windows is the first to know a position, from 1 on; 0 for none.

        Returns: [num_reqs, window] int64.
        """
        has_turn = self._kept.was_masked[slots] & self._kept.is_known[slots, None]
        return torch.where(has_turn, 1 + self._rank[slots], 0)

    def propose(self, blocks: Blocks, num_drafts: int, *, looks_ahead: bool) -> Nodes:
        """Return the windows, and behind them the first drafts of their chains, where there are any.

        One without a masked position before the row's end means nothing, since the request has ended then.
        """
        canvases = self._canvases
        root, mask = canvases.canvas[blocks.slots], canvases.mask_token_id
        if num_drafts == 0:
            return Nodes.of_roots(root, mask)
        room = canvases.seq_len[blocks.slots] - blocks.start
        wide = torch.cat([root, torch.full_like(root, mask)], 1)
        is_behind = torch.arange(wide.shape[1], device=root.device) >= room[:, None]
        wide = wide.masked_fill(is_behind, int(mask == 0))
        turn, depth = self.turns(blocks.slots), torch.arange(1, 1 + num_drafts, device=root.device)
        knows = (turn[:, None] > 0) & (turn[:, None] <= depth[:, None])
        own = torch.where(knows, self._tokens(blocks, root, turn, room)[:, None], root[:, None])
        draft = torch.cat([own, wide[:, None, root.shape[1] :].expand_as(own)], 2)
        is_there = depth <= turn.amax(1, keepdim=True)
        is_valid = is_there & (num_at_front(draft, room[:, None], mask) < room[:, None])
        return Nodes.of_roots(wide, mask).with_drafts(draft, is_valid, depth.expand_as(is_valid), mask)

    def _tokens(self, blocks: Blocks, root: Tensor, turn: Tensor, room: Tensor) -> Tensor:
        """Return what positions would take in their turns, [num_reqs, window] int64.

        A draw depends on how many positions are masked in the window of the draft before.
        """
        candidates = self._kept.candidates(blocks.slots)
        noise = self._canvases.draft_noise(blocks)
        if noise is None:
            return candidates.token_ids[..., 0]
        window = root.shape[1]
        before = torch.arange(window, device=root.device)  # drafts before a turn, of all turns
        is_within = before < room[:, None]
        is_known = is_within & (root != self._canvases.mask_token_id)
        first = torch.where(is_known, 0, torch.where(turn > 0, turn, 1 + window)).cummax(1).values
        front = ((first[:, None] <= before[:, None]) & is_within[:, None]).sum(2)  # of the draft before each turn
        num_known = is_known.sum(1, keepdim=True) + before
        num_masked = torch.minimum(front + window, room[:, None]) - num_known
        masked_then = num_masked.gather(1, (turn - 1).clamp(min=0))
        return drawn_tokens(candidates, noise, masked_then)


def with_order(canvas: Tensor, turn: Tensor, mask_token_id: int) -> Tensor:
    """Return windows as they are reported, [num_reqs, window] int64: a masked position is negative, and says its turn.

    Args:
        canvas: [num_reqs, window] int64.
        turn: [num_reqs, window] int64, as of `WindowDrafter.turns`.
        mask_token_id: what stands for masked.
    """
    return torch.where(canvas == mask_token_id, _OPEN - turn, canvas)


def draft_fronts(shown: Sequence[int], room: int) -> list[int]:
    """Return how many positions the drafts of a window know at their fronts, of each that may mean something.

    Args:
        shown: the window, as reported.
        room: positions up to where the request ends; a draft that knows them all means nothing.
    """
    window = np.array(shown[:room], dtype=np.int64)
    known_from = np.where(window >= 0, 0, np.where(window == _OPEN, len(shown) + 1, _OPEN - window))
    run = np.maximum.accumulate(known_from)
    num_drafts = max((_OPEN - token for token in shown if token < 0), default=0)
    fronts: list[int] = (run <= np.arange(1, 1 + num_drafts)[:, None]).sum(1).tolist()
    return [front for front in fronts if front < room]
