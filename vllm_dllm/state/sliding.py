"""Windows that slide over an answer (`reference.wedlm`): WeDLM's canvases.

A request's canvas is a *window*, the positions behind its final tokens. A step decides some of it. What is then known
at its front, before its first masked position, is final: it is emitted, and the window slides behind it. Attention is
causal in a *physical* order of the window's rows: known tokens first, then masked ones, then what lies behind the end
of the request's row, each in the order of their positions. The rows of a window are in flight alone. Final tokens are
stored by the next step, in the segment before the window's, where they see what they would in an autoregressive model:
a prompt's in the first step, in each one what the step before emitted.

A step may evaluate drafts of a window beside it (`draft.windows`), which are windows further on. They and their root
are then canvases of twice the window's positions from the root's begin on, `unmask.windows` decides them, and a
step emits up to two windows.
"""

from collections.abc import Collection, Hashable, Sequence, Set
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.arrays import IntArray
from vllm_dllm.state.kv import KvSchedule, KvStep
from vllm_dllm.state.pins import Pins
from vllm_dllm.state.report import StepFacts
from vllm_dllm.state.settle import Emission, Ledger
from vllm_dllm.state.step_rows import RowPlan
from vllm_dllm.unmask.walk import Nodes
from vllm_dllm.unmask.windows import WalkedWindows


class SlidingSchedule(KvSchedule):
    """What steps store: what became final in the step before.

    Args:
        window: positions of a window, but where the request's row ends.
    """

    def __init__(self, window: int) -> None:
        super().__init__("window", None, window)
        self._stored: dict[Hashable, tuple[int, bool]] = {}  # positions, and whether a step was decided

    @property
    def known(self) -> Set[Hashable]:
        """Requests of which anything is remembered."""
        return self._stored.keys()

    def block_start(self, num_known: IntArray) -> IntArray:
        """Return where windows begin, of requests with so many known tokens."""
        return num_known

    def stored_behind(self, start: int) -> Collection[int]:
        """Return how many positions may be stored behind a step of a window that began at `start`."""
        return (start,)

    def add(self, request: Hashable, num_hit: int, prompt_len: int = 0, pins: Pins | None = None) -> None:
        """Begin a request, or begin it anew; it finds so many positions in the prefix cache."""
        self._stored[request] = num_hit, False

    def forget(self, request: Hashable) -> None:
        """Forget a request, which may be unknown."""
        self._stored.pop(request, None)

    def note(self, request: Hashable, stored: int) -> None:
        """Take note of a decided step, behind which so many positions are stored."""
        self._stored[request] = stored, True

    def lengths(self, _requests: Sequence[Hashable], num_known: IntArray, seq_len: IntArray) -> IntArray:
        """Return the lengths of the windows of the next steps, [num_reqs]; arguments as of `step`."""
        lengths: IntArray = np.minimum(self.block_length, seq_len - num_known)
        return lengths

    def num_unstored(self, requests: Sequence[Hashable], num_known: IntArray) -> IntArray:
        """Return how many final tokens of requests the next step stores, [num_reqs]."""
        return num_known - np.array([self._stored[request][0] for request in requests], dtype=np.int64)

    def step(self, requests: Sequence[Hashable], num_known: IntArray, seq_len: IntArray) -> KvStep:
        """Decide what the next step stores."""
        nobody = np.zeros(len(requests), dtype=bool)
        return KvStep(
            num_known=num_known,
            begin=num_known - self.num_unstored(requests, num_known),
            end=num_known,
            commits=nobody,
            is_new=np.array([not self._stored[request][1] for request in requests], dtype=bool),
            stores_alone=nobody,
            is_undrafted=~nobody,
            is_short=seq_len < num_known + self.block_length,
            span_begin=num_known,
            span_end=num_known + self.block_length,
            is_wide=nobody,
            is_delayed=nobody,
        )


def physical_order(canvas: Tensor, length: Tensor, mask_token_id: int) -> Tensor:
    """Return the positions of canvases in the order of their rows.

    Args:
        canvas: [num_canvases, width] int64.
        length: [num_canvases] int64, rows of each.
        mask_token_id: what stands for masked.

    Returns: [num_canvases, width] int64.
    """
    is_behind = torch.arange(canvas.shape[1], device=canvas.device) >= length[:, None]
    kind = torch.where(is_behind, 2, (canvas == mask_token_id).long())
    return kind.argsort(dim=1, stable=True)


def reorder(rows: RowPlan, head: Tensor, order: Tensor, evaluated: Tensor) -> tuple[RowPlan, Tensor]:
    """Put the rows of evaluated canvases into their order.

    Args:
        rows: of the step, those of a canvas in the order of their positions.
        head: [num_evaluated, width] int64, the rows of each one's positions.
        order: [num_evaluated, width] int64, positions in a canvas.
        evaluated: as in `unmask.walk.Nodes`.

    Returns: the rows, and those of each one's positions.
    """
    width = order.shape[1]
    place = rows.source.clamp(min=0)  # among the positions of all canvases
    own = evaluated.flatten()[place // width].clamp(min=0)
    moved = torch.where(rows.source < 0, 0, order[own, place % width] - place % width)
    row = torch.empty_like(order).scatter_(1, order, torch.arange(width, device=order.device).expand_as(order))
    ordered = replace(rows, source=rows.source + moved, position=rows.position + moved)
    return ordered, torch.minimum(head[:, :1] + row, head[:, -1:])


def penalised_entropy(entropy: Tensor, is_masked: Tensor, penalty: Tensor) -> Tensor:
    """Return entropies of masked positions with the penalty, see `reference.wedlm.WindowRule`; infinite for the others.

    Args:
        entropy: [num_windows, window] float64, nats.
        is_masked: [num_windows, window] bool.
        penalty: [num_windows] float64, nats for each position behind the first masked one.

    Returns: [num_windows, window] float64.
    """
    place = torch.arange(entropy.shape[1], device=entropy.device)
    first = torch.where(is_masked, place, len(place)).amin(1, keepdim=True)
    return (entropy + penalty[:, None] * (place - first)).masked_fill(~is_masked, torch.inf)


def unmasked_in_windows(penalised: Tensor, bound: Tensor) -> Tensor:
    """Say which positions of windows a step unmasks, see `reference.wedlm.WindowRule`.

    Args:
        penalised: [num_windows, window] float64, as of `penalised_entropy`; finite somewhere in each.
        bound: [num_windows] float64, nats.

    Returns: [num_windows, window] bool.
    """
    place = torch.arange(penalised.shape[1], device=penalised.device)
    is_below = penalised < bound[:, None]
    is_least = penalised == penalised.amin(1, keepdim=True)
    is_lowest = place == torch.where(is_least, place, len(place)).amin(1, keepdim=True)
    return torch.where(is_below.any(1, keepdim=True), is_below, is_lowest)


def slide(
    nodes: Nodes, walked: WalkedWindows, start: Tensor, ledger: Ledger, mask_token_id: int
) -> tuple[Tensor, Emission]:
    """Settle a step: emit what is known at the windows' fronts, and slide them behind it.

    Args:
        nodes: what was evaluated; canvases [num_reqs, num_nodes, width] int64.
        walked: what came of it; canvases [num_reqs, width] int64.
        start: [num_reqs] int64, where the roots begin.
        ledger: of the step. vLLM counts the positions of a canvas that lie within the row.
        mask_token_id: what stands for masked.

    Returns: what lies behind what is emitted [num_reqs, width] int64, first the next window, and what the step comes
        to.
    """
    before, canvas = nodes.canvas[:, 0], walked.canvas
    offset = torch.arange(canvas.shape[1], device=canvas.device)
    is_within = offset < ledger.num_counted[:, None]
    num_final = ((canvas != mask_token_id) & is_within).long().cumprod(1).sum(1)
    none = torch.zeros_like(num_final)
    facts = StepFacts(
        forwards=torch.ones_like(num_final),
        refreshes=none,
        unmasked=(canvas != before).sum(1),
        accepted=walked.num_accepted,
        finished=num_final > 0,
        stored=start,
        wrote=none if ledger.planned is None else ledger.planned[2],
        commits=none,
        left=none,
        depth=nodes.depth[:, 1:],
        proposed=nodes.is_valid[:, 1:],
    )
    known = canvas.masked_fill(~is_within, mask_token_id)  # what is behind the row's end is no token
    longer = torch.cat([known, torch.full_like(canvas, mask_token_id)], 1)
    return longer.gather(1, num_final[:, None] + offset), ledger.emission(canvas, num_final, facts)
