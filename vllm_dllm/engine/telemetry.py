"""What a step did, from the scheduler to the metrics of the front end; what a request took, to its output.

vLLM sends the front end `SchedulerStats` at each step. Its part for speculative decoding has a list of counts per draft
position, which vLLM leaves unused with diffusion models: there `StepStats` travels, as plain whole numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_dllm.state.counters import MAX_DEPTH, REPORT_LEN, Column


@dataclass(slots=True)
class StepStats:
    """Sums over the requests of a step, or of several.

    Attributes:
        budgets: steps by the budget they had.
        forwards, refreshes: requests that took part.
        unmasked: positions.
        blocks: emitted.
        proposed: drafts that were evaluated, by depth 1..MAX_DEPTH in the graph.
        accepted: drafts that came true, by the steps 1..MAX_DEPTH that they were ahead.
    """

    budgets: dict[int, int] = field(default_factory=dict)
    forwards: int = 0
    refreshes: int = 0
    unmasked: int = 0
    blocks: int = 0
    proposed: list[int] = field(default_factory=lambda: [0] * MAX_DEPTH)
    accepted: list[int] = field(default_factory=lambda: [0] * MAX_DEPTH)

    @classmethod
    def of_step(cls, budget: int, rows: Sequence[Sequence[int]]) -> "StepStats":
        """Sum the rows of a step's report, each of `REPORT_LEN` numbers (`state.counters.Column`)."""
        sums = [sum(column) for column in zip(*rows, strict=True)] if rows else [0] * REPORT_LEN
        lengths = [row[Column.ACCEPTED] for row in rows]
        accepted = [0] * MAX_DEPTH
        for depth in range(1, max(lengths, default=0) + 1):
            accepted[min(depth, MAX_DEPTH) - 1] += sum(length >= depth for length in lengths)
        return cls(
            budgets={budget: 1},
            forwards=sums[Column.FORWARDS],
            refreshes=sums[Column.REFRESHES],
            unmasked=sums[Column.UNMASKED],
            blocks=sums[Column.FINISHED],
            proposed=sums[Column.PROPOSED :],
            accepted=accepted,
        )

    @property
    def total_accepted(self) -> int:
        """Transitions made through drafts."""
        return sum(self.accepted)

    @property
    def nfe(self) -> int:
        """Forwards, refreshes included."""
        return self.forwards + self.refreshes

    def add(self, other: "StepStats") -> None:
        """Add the sums of other steps."""
        for budget, num_steps in other.budgets.items():
            self.budgets[budget] = self.budgets.get(budget, 0) + num_steps
        self.forwards += other.forwards
        self.refreshes += other.refreshes
        self.unmasked += other.unmasked
        self.blocks += other.blocks
        self.proposed = [a + b for a, b in zip(self.proposed, other.proposed, strict=True)]
        self.accepted = [a + b for a, b in zip(self.accepted, other.accepted, strict=True)]

    def encode(self) -> list[int]:
        """Return the numbers of one step, for `decode`."""
        (budget,) = self.budgets
        return [budget, self.forwards, self.refreshes, self.unmasked, self.blocks, *self.proposed, *self.accepted]

    @classmethod
    def decode(cls, numbers: Sequence[int]) -> "StepStats | None":
        """Read what `encode` wrote; None for the list of a step that has no report."""
        if not numbers:
            return None
        budget, forwards, refreshes, unmasked, blocks, *depths = numbers
        return cls({budget: 1}, forwards, refreshes, unmasked, blocks, depths[:MAX_DEPTH], depths[MAX_DEPTH:])


@dataclass(slots=True)
class RequestTotals:
    """What a request took so far, over all its preemptions."""

    forwards: int = 0
    refreshes: int = 0
    proposed: int = 0
    accepted: int = 0

    def add(self, row: Sequence[int]) -> None:
        """Add the request's row of a step's report."""
        self.forwards += row[Column.FORWARDS]
        self.refreshes += row[Column.REFRESHES]
        self.accepted += row[Column.ACCEPTED]
        self.proposed += sum(row[Column.PROPOSED :])

    def as_output(self, exactness: str | None) -> dict[str, Any]:
        """Return what a request's output shows as `kv_transfer_params`.

        Args:
            exactness: of speculation, None without.
        """
        return {
            "dllm": {
                "exactness": exactness,
                "nfe": self.forwards + self.refreshes,
                "nfe_refresh": self.refreshes,
                "proposed": self.proposed,
                "accepted": self.accepted,
            }
        }
