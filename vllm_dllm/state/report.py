"""The columns of a step's report, and what a worker fills in; `engine.report` says how it travels. No vLLM here."""

from dataclasses import dataclass
from enum import IntEnum, IntFlag

import torch
from torch import Tensor

MAX_DEPTH = 16
"""Depth up to which drafts are counted apart; deeper ones count as this."""


class Column(IntEnum):
    """Columns of a step's report, `[num_reqs, REPORT_LEN] int32`; those from `PROPOSED` on count drafts by depth.

    The op `settle_step` has them in the same order.
    """

    FORWARDS = 0
    REFRESHES = 1
    UNMASKED = 2
    ACCEPTED = 3
    FINISHED = 4
    STORED = 5
    WROTE = 6
    COMMITS = 7
    LEFT = 8
    FAULTS = 9
    PROPOSED = 10


REPORT_LEN = Column.PROPOSED + MAX_DEPTH


class Failed(IntFlag):
    """In `FAULTS`: why a request has to end, and no other. Nobody else's fault has these bits."""

    POLICY = 4  # its policy, a user's, failed at it
    TOKEN = 8  # a token was chosen for it that its constraint does not allow
    CANVAS = 16  # its block cannot be completed under its constraint


FAILED = int(Failed.POLICY | Failed.TOKEN | Failed.CANVAS)


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What a step did for some requests, on the device: what the worker fills in.

    Attributes:
        forwards: 1 where the forward decided a step.
        refreshes: 1 where K/V of a bidirectional model were recomputed.
        unmasked: positions.
        accepted: transitions made through accepted drafts, a next root among them.
        finished: 1 where the block was emitted.
        stored: positions before the request's block, the next one where that was begun by the step; a block-causal
            model's have K/V in the cache.
        wrote: positions whose K/V the step stored, as its plan says, apart from look-aheads that did not come true.
        commits: 1 where the K/V of the block before were among them.
        left: positions of the emitted block that are masked, behind the answer's end.
        depth: of each draft in the draft graph; next roots among them.
        proposed: whether a draft was evaluated.
    """

    forwards: Tensor  # [num_reqs], as all of them of any whole or bool dtype
    refreshes: Tensor  # [num_reqs]
    unmasked: Tensor  # [num_reqs]
    accepted: Tensor  # [num_reqs]
    finished: Tensor  # [num_reqs]
    stored: Tensor  # [num_reqs]
    wrote: Tensor  # [num_reqs]
    commits: Tensor  # [num_reqs]
    left: Tensor  # [num_reqs]
    depth: Tensor  # [num_reqs, num_drafts]
    proposed: Tensor  # [num_reqs, num_drafts]

    def rows(self) -> Tensor:
        """Return the rows of the report; [num_reqs, REPORT_LEN] int32."""
        rows = torch.zeros(len(self.forwards), REPORT_LEN, dtype=torch.int32, device=self.forwards.device)
        rows[:, Column.FORWARDS] = self.forwards
        rows[:, Column.REFRESHES] = self.refreshes
        rows[:, Column.UNMASKED] = self.unmasked
        rows[:, Column.ACCEPTED] = self.accepted
        rows[:, Column.FINISHED] = self.finished
        rows[:, Column.STORED] = self.stored
        rows[:, Column.WROTE] = self.wrote
        rows[:, Column.COMMITS] = self.commits
        rows[:, Column.LEFT] = self.left
        column = Column.PROPOSED - 1 + self.depth.clamp(1, MAX_DEPTH)
        return rows.scatter_add_(1, column, self.proposed.int())


def with_canvases(report: Tensor, shown: Tensor, log_probs: Tensor) -> Tensor:
    """Add the canvases behind a step to its report, and log-probabilities of their tokens, as bits.

    Args:
        report: [num_reqs, n] int32.
        shown: [num_reqs, block_length] int64, the canvases; what is negative is masked.
        log_probs: [num_reqs, block_length] float32.

    Returns: [num_reqs, n + 2 * block_length] int32.
    """
    return torch.cat([report, shown.int(), log_probs.contiguous().view(torch.int32)], 1)
