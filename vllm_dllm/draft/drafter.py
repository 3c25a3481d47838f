"""Who guesses the canvases that follow the present ones.

A draft is accepted where it equals the canvas that the decoder makes (`unmask.walk`), so any drafter is lossless: its
guesses decide how many forwards are taken, never a token. `draft.calibrated` has the one that serves.
"""

from collections.abc import Sequence
from typing import Protocol

from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.drafts import DraftState
from vllm_dllm.unmask.walk import Nodes


class Drafter(Protocol):
    """Makes the drafts of every step. The scheduler's process has one for `prior` alone, a worker's attaches its own.

    Attributes:
        look_ahead_from: the smallest budget with a look-ahead (`draft.look_ahead`); None: none has one.
        memory: what it observes, there once it is attached: the last decided step of each slot, written by the end of
            every step, also of one without drafts (`state.settle`), and forgotten when a block begins; None: nothing.
    """

    look_ahead_from: int | None
    memory: DraftState | None

    def prior(self) -> Sequence[float]:
        """Return how many transitions its drafts are expected to save per step, by budget 0, 1, ... up to the largest.

        The first is 0, all others are more; measurements correct them (`draft.budget`).
        """

    def attach(self, canvases: CanvasState) -> None:
        """Make whatever is kept by slot; called once, before anything below."""

    def propose(self, blocks: Blocks, num_drafts: int, *, looks_ahead: bool) -> Nodes:
        """Return the true canvases and behind them the drafts of some requests, the most promising first.

        Args:
            blocks: of the requests.
            num_drafts: how many of each, 0 or more. One that means nothing is not valid.
            looks_ahead: whether a look-ahead is asked for, too.
        """
