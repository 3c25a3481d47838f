"""What a step did, summed for the metrics of the front end, and what a request took, for its output. No vLLM here."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_dllm.state.report import MAX_DEPTH

if TYPE_CHECKING:
    from vllm_dllm.engine.report import RequestReport

NUM_NUMBERS = 8 + 2 * MAX_DEPTH
"""Of a step."""


@dataclass(slots=True)
class StepStats:
    """Sums over the requests of a step, or of several.

    Attributes:
        budgets: steps by the budget they had.
        forwards, refreshes: requests that took part.
        unmasked: positions.
        blocks: emitted.
        left_masked: positions of emitted blocks that stayed masked, behind their answers' ends.
        held: requests that waited for the next step, since not all rows fitted into this one.
        rows: that the forwards were given, without padding.
        proposed: drafts that were evaluated, by depth 1..MAX_DEPTH in the graph.
        accepted: drafts that came true, by the steps 1..MAX_DEPTH that they were ahead.
    """

    budgets: dict[int, int] = field(default_factory=dict)
    forwards: int = 0
    refreshes: int = 0
    unmasked: int = 0
    blocks: int = 0
    left_masked: int = 0
    held: int = 0
    rows: int = 0
    proposed: list[int] = field(default_factory=lambda: [0] * MAX_DEPTH)
    accepted: list[int] = field(default_factory=lambda: [0] * MAX_DEPTH)

    @classmethod
    def of_step(cls, budget: int, held: int, rows: int, reports: Collection["RequestReport"]) -> "StepStats":
        """Sum the reports of a step's requests."""
        lengths = [report.accepted for report in reports]
        accepted = [0] * MAX_DEPTH
        for depth in range(1, max(lengths, default=0) + 1):
            accepted[min(depth, MAX_DEPTH) - 1] += sum(length >= depth for length in lengths)
        return cls(
            budgets={budget: 1},
            forwards=sum(report.forwards for report in reports),
            refreshes=sum(report.refreshes for report in reports),
            # A policy may mask positions again; counters of metrics only grow.
            unmasked=sum(max(0, report.unmasked) for report in reports),
            blocks=sum(report.finished for report in reports),
            left_masked=sum(report.left for report in reports),
            held=held,
            rows=rows,
            proposed=[sum(column) for column in zip([0] * MAX_DEPTH, *(r.proposed for r in reports), strict=True)],
            accepted=accepted,
        )

    @property
    def total_accepted(self) -> int:
        """Transitions made through drafts."""
        return sum(self.accepted)

    @property
    def nfe(self) -> int:
        """Forwards, refreshes included, counted once for each request in them."""
        return self.forwards + self.refreshes

    def add(self, other: "StepStats") -> None:
        """Add the sums of other steps."""
        for budget, num_steps in other.budgets.items():
            self.budgets[budget] = self.budgets.get(budget, 0) + num_steps
        self.forwards += other.forwards
        self.refreshes += other.refreshes
        self.unmasked += other.unmasked
        self.blocks += other.blocks
        self.left_masked += other.left_masked
        self.held += other.held
        self.rows += other.rows
        self.proposed = [a + b for a, b in zip(self.proposed, other.proposed, strict=True)]
        self.accepted = [a + b for a, b in zip(self.accepted, other.accepted, strict=True)]

    def numbers(self) -> list[int]:
        """Return the numbers of one step, for `of_numbers`; [NUM_NUMBERS]."""
        (budget,) = self.budgets
        counts = [self.forwards, self.refreshes, self.unmasked, self.blocks, self.left_masked, self.held, self.rows]
        return [budget, *counts, *self.proposed, *self.accepted]

    @classmethod
    def of_numbers(cls, numbers: Sequence[int]) -> "StepStats":
        """Read what `numbers` returned."""
        budget, forwards, refreshes, unmasked, blocks, left, held, rows, *depths = numbers
        counts = forwards, refreshes, unmasked, blocks, left, held, rows
        return cls({budget: 1}, *counts, depths[:MAX_DEPTH], depths[MAX_DEPTH:])


@dataclass(slots=True)
class RequestTotals:
    """What a request took so far, over all its preemptions."""

    forwards: int = 0
    refreshes: int = 0
    proposed: int = 0
    accepted: int = 0
    canvas: dict[str, Any] | None = field(default=None, compare=False)
    """What is known of the block behind the last step, as the output shows it, where that is shown."""

    def add(self, report: "RequestReport") -> None:
        """Add a step."""
        self.forwards += report.forwards
        self.refreshes += report.refreshes
        self.accepted += report.accepted
        self.proposed += sum(report.proposed)
        self.canvas = None

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
                **(self.canvas or {}),
            }
        }
